"""A small process between us and a program we start: when it ends, nothing of the program is left, in whatever session it hid.

    python supervisor.py GRACE PARENT COMMAND...

It is its program's subreaper (Linux, prctl(2)): orphaned descendants become its children instead of init's, so that none can slip
away, not even by a session of its own. It ends the program when it is sent SIGTERM, which the kernel also does when PARENT, the process
that started it, is gone, killed with SIGKILL included (0 ties it to nobody); SIGINT ends it at once. Then, or when the program ends by
itself, it kills what is left and ends the same way.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_AWAITED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
KILL_SECONDS = 5
"""Only a process that the kernel cannot end now, such as one that waits for a broken disk, takes so long."""


def die_with_parent(parent: int) -> None:
    """In a child that process `parent` started: be sent SIGTERM when the thread that started it ends.

    Not for the `preexec_fn` of a process with threads: Python then first destroys what those had, and torch's process groups wait for ever.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above took effect; nobody will signal us any more
        os._exit(128 + signal.SIGTERM)


def supervise(command: list[str], grace: float) -> int:
    """Run `command` until it ends, or at most `grace` seconds longer than the first SIGTERM; SIGINT cuts them short.

    (Not a second SIGTERM: when our parent is killed, the kernel may send one for each of its threads.)
    Returns its wait status; SIGKILL's if it had to be killed.
    """
    import psutil  # noqa: F401 - before there is anything to end

    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    # A session of its own: a signal to its group does not reach us. (Kept in a variable: a Popen that goes may collect the exit status.)
    started = subprocess.Popen(command, start_new_session=True, preexec_fn=partial(_in_program, os.getpid()))
    program, deadline = started.pid, None
    while (status := _reap(program)) is None:
        received = signal.sigtimedwait(_AWAITED, 60 if deadline is None else max(0, deadline - time.monotonic()))
        number = None if received is None else received.si_signo
        if number == signal.SIGINT or (deadline is not None and time.monotonic() >= deadline):
            break
        if number in (signal.SIGTERM, signal.SIGHUP) and deadline is None:
            deadline = time.monotonic() + grace
            with suppress(ProcessLookupError):
                os.killpg(program, signal.SIGTERM)
    _kill_the_rest()
    return signal.SIGKILL if status is None else status


def _in_program(parent: int) -> None:
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)


def _reap(program: int) -> int | None:
    """Collect ended children; the wait status of `program` if it is among them."""
    status = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = ended[1] if ended[0] == program else status
    return status


def _kill_the_rest() -> None:
    """Again and again, because a process may fork while we look: the orphans of a killed one are ours."""
    import psutil

    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return
        time.sleep(0.02)


def main() -> None:
    """End as the program ended."""
    grace, parent, *command = sys.argv[1:]
    if int(parent):
        die_with_parent(int(parent))
    try:
        status = supervise(command, float(grace))
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves the program's core, not ours beside it
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
