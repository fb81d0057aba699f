"""Child processes that never outlive us: under a supervisor, output to a file that is followed.

Why a file: a pipe would kill the child with EPIPE when its reader dies. Why a session of its own: the terminal's Ctrl-C reaches only us,
and we end the child in order. Why a supervisor: it ends the child and everything the child started, also if we are killed with SIGKILL.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines import supervisor
from pipelines.supervisor import KILL_SECONDS

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Child:
    """A running child and the file its output goes to, from byte `start` on (earlier bytes are of an earlier attempt)."""

    process: subprocess.Popen[bytes]
    output: Path
    start: int
    grace: float
    """Seconds it has after SIGTERM."""


@contextmanager
def child(command: Sequence[str | Path], output: Path, env: Mapping[str, str], grace: float, cwd: Path | None = None) -> Iterator[Child]:
    """Start `command` with stdout and stderr appended to `output`; however the block ends, none of its processes is left.

    `grace`: seconds between SIGTERM and SIGKILL. Enter and leave the block in one thread: the child is ended when the
    thread that started it ends, not only when the whole process does.

    Raises:
        FileNotFoundError: there is no such program.
    """
    words = [str(part) for part in command]
    if shutil.which(words[0], path=env.get("PATH")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), words[0])
    with open(output, "ab") as sink:
        start = sink.tell()
        process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, str(grace), str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield Child(process, output, start, grace)
    finally:
        _end(process, grace)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Have it ended in order; a second Ctrl-C cuts its grace short. Only a supervisor that does not answer is killed."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace + KILL_SECONDS)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2 * KILL_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()


def follow(running: Child, on_line: Callable[[str], None], timeout: float | None = None) -> int:
    """Hand each line the child writes to `on_line` until it ends; returns its exit status (of a progress bar, its last state).

    Polls, never blocks, so that a signal or a Prefect timeout gets through at once; the child is then ended in order, and what it still
    says is handed on as well.

    Raises:
        TimeoutError: the process ran longer than `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with open(running.output, "rb") as stream:
        stream.seek(running.start)
        rest = b""

        def hand_on(ended: bool) -> None:
            nonlocal rest
            *lines, rest = (rest + stream.read()).split(b"\n")
            for line in [*lines, rest] if ended and rest else lines:
                on_line(_shown(line))

        try:
            while True:
                status = running.process.poll()  # before the read: what an ended process wrote is all there
                hand_on(ended=status is not None)
                if status is not None:
                    return status
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"still running after {timeout:.0f} s")
                time.sleep(POLL_SECONDS)
        except BaseException:
            _end(running.process, running.grace)
            hand_on(ended=True)
            raise


def _shown(line: bytes) -> str:
    """What a terminal would show of a line in which a progress bar goes back to the start."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log file, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
