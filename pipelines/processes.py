"""Child processes that never outlive us: own session, output to a file that is followed, killed as a group.

Why so: a pipe would kill the child with EPIPE when its reader dies, and torchrun starts every rank in a session of its own,
so a signal must go to the launcher's group and each rank must watch its parent (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path



_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
POLL_SECONDS = 0.2


def die_with_parent() -> None:
    """In a freshly forked child: a new session, and SIGTERM when the parent thread ends."""
    os.setsid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Child:
    """A running child and the file its output goes to, from byte `start` on (earlier bytes are of an earlier attempt)."""

    process: subprocess.Popen[bytes]
    output: Path
    start: int


@contextmanager
def child(command: Sequence[str | Path], output: Path, env: Mapping[str, str], grace: float, cwd: Path | None = None) -> Iterator[Child]:
    """Start `command` with stdout and stderr appended to `output`; however the block ends, no process of its group is left.

    `grace`: seconds between SIGTERM and SIGKILL.
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
            preexec_fn=die_with_parent,
        )
    try:
        yield Child(process, output, start)
    finally:
        end_group(process, grace)


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM to the whole group, wait up to `grace` seconds for the leader, then SIGKILL what is left."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def follow(running: Child, on_line: Callable[[str], None], timeout: float | None = None) -> int:
    """Hand each line the child writes to `on_line` until it ends; returns its exit status.

    Polls, never blocks, so that a signal or a Prefect timeout gets through at once.

    Raises:
        TimeoutError: the process ran longer than `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with open(running.output, "rb") as stream:
        stream.seek(running.start)
        rest = b""
        while True:
            status = running.process.poll()
            *lines, rest = (rest + stream.read()).split(b"\n")
            for line in lines:
                on_line(line.decode(errors="replace").rstrip("\r"))
            if status is not None:
                if rest:
                    on_line(rest.decode(errors="replace"))
                return status
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"still running after {timeout:.0f} s")
            time.sleep(POLL_SECONDS)


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log file, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
