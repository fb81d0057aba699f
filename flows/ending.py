"""Processes that outlived the program that started them: found by id and birth, or by a mark; and ended in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

KILL_SECONDS = 15


def birth(process: psutil.Process) -> str:
    """Tells it from others of its id: in which boot of the machine it began, and how many seconds after that.

    Not by the time of day: psutil's time of creation moves with every correction of the clock, such as after a virtual machine slept.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {process.create_time() - psutil.boot_time():.2f}"


def living(pid: int, born: str) -> psutil.Process | None:
    """The living process that has this id and this birth; ids are used again."""
    try:
        process = psutil.Process(pid)
        return process if birth(process) == born and _runs(process) else None
    except psutil.NoSuchProcess:
        return None


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Every process in whose environment `variable` has this value: what a process so started has started itself, too."""
    return [process for process in psutil.process_iter() if _variable(process, variable) == value]


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def end(processes: list[psutil.Process], grace: float) -> None:
    """SIGTERM to those that none of the others will tell, also if they stand still, and SIGKILL to what is left after `grace` seconds."""
    ids = {process.pid for process in processes}
    for process in processes:
        if _parent(process) not in ids:
            _tell(process, signal.SIGTERM)
            _tell(process, signal.SIGCONT)
    for process in _left_after(grace, processes):
        _tell(process, signal.SIGKILL)
    _left_after(KILL_SECONDS, processes)


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """It stands still during the block, unless it is ended there; afterwards it goes on, however the block ends (Ctrl-C, say)."""
    _tell(process, signal.SIGSTOP)
    try:
        yield
    finally:
        _tell(process, signal.SIGCONT)


def _left_after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run then; not waited for longer than needed. (psutil's own wait also waits until the parent collects them.)"""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _tell(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
