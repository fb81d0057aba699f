"""How far a long piece of work is, in bytes: a bar on a terminal, otherwise a line in the log now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_SECONDS = 10.0
Log = Callable[[str], None]
"""Takes a line for the log."""
Advance = Callable[[int], None]
"""Takes the number of bytes that were just done."""


@contextmanager
def progress(label: str, total: int, log: Log) -> Iterator[Advance]:
    """Show how much of `total` bytes is done, at which speed, and when it will end."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total, log)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)  # standard output stays what the command prints
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total: int, log: Log) -> Advance:
    started = told = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= EVERY_SECONDS:
            told = now
            speed = done / (now - started)
            left = f"{(total - done) / speed:.0f} s left" if speed else "time left unknown"
            log(f"{label}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, {left}")

    return advance
