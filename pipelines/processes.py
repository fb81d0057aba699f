"""Child processes that never outlive us: own session, output to a file that is followed, ended as a group.

Why a file: a pipe would kill the child with EPIPE when its reader dies. Why a session: the terminal's Ctrl-C reaches only us,
and we end the child in order. Why PR_SET_PDEATHSIG: it works even if we are killed with SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
POLL_SECONDS = 0.2


def die_with_parent(parent: int) -> None:
    """In a child that process `parent` just forked: be sent SIGTERM when the thread that forked it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above took effect; nobody will signal us any more
        os._exit(128 + signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Child:
    """A running child and the file its output goes to, from byte `start` on (earlier bytes are of an earlier attempt)."""

    process: subprocess.Popen[bytes]
    output: Path
    start: int


@contextmanager
def child(command: Sequence[str | Path], output: Path, env: Mapping[str, str], grace: float, cwd: Path | None = None) -> Iterator[Child]:
    """Start `command` with stdout and stderr appended to `output`; however the block ends, none of its processes is left.

    `grace`: seconds between SIGTERM and SIGKILL. Enter and leave the block in one thread: the child is signalled when the
    thread that started it ends, not only when the whole process does.
    """
    with open(output, "ab") as sink:
        start = sink.tell()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # safe beside threads: two system calls
        )
    try:
        yield Child(process, output, start)
    finally:
        end_group(process, grace)


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM to the group, up to `grace` seconds for its leader to end, then SIGKILL to all that is left.

    A leader whose children are in sessions of their own (torchrun's ranks) must forward SIGTERM, as torchrun does: `grace` has to
    be longer than it gives them. Killed are they too if the leader is still there, but not if it died and left them behind.
    A second Ctrl-C cuts the grace short.
    """
    try:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        elsewhere = _descendants(process)
        _signal_group(process.pid, signal.SIGKILL)
        for orphan in elsewhere:
            with suppress(psutil.Error):
                orphan.kill()
        process.wait()


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Children and their children, whatever their session; none if the process has ended (its number may be another's by now)."""
    if process.poll() is not None:
        return []
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def follow(running: Child, on_line: Callable[[str], None], timeout: float | None = None) -> int:
    """Hand each line the child writes to `on_line` until it ends; returns its exit status (of a progress bar, its last state).

    Polls, never blocks, so that a signal or a Prefect timeout gets through at once.

    Raises:
        TimeoutError: the process ran longer than `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with open(running.output, "rb") as stream:
        stream.seek(running.start)
        rest = b""
        while True:
            status = running.process.poll()  # before the read: what an ended process wrote is all there
            *lines, rest = (rest + stream.read()).split(b"\n")
            for line in lines:
                on_line(_shown(line))
            if status is not None:
                if rest:
                    on_line(_shown(rest))
                return status
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"still running after {timeout:.0f} s")
            time.sleep(POLL_SECONDS)


def _shown(line: bytes) -> str:
    """What a terminal would show of a line in which a progress bar goes back to the start."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log file, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
