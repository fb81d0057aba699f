"""How far a long piece of work is: a bar on a terminal, otherwise a line in the log now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

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


@contextmanager
def shown(total: int, label: str = "writing") -> Iterator[Advance]:
    """A bar of `total` bytes on a terminal, elsewhere nothing: what a conversion's `wrote` is told, `with shown(total) as wrote`."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield lambda count: None


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


class Step(Protocol):
    """What the bar shows of a training step (metrics.StepMetrics); seconds and shares."""

    @property
    def step(self) -> int: ...
    @property
    def total_loss(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def tgs(self) -> float: ...
    @property
    def mfu(self) -> float | None: ...
    @property
    def eta(self) -> float: ...


@contextmanager
def training_bar(first: int, total: int) -> Iterator[Callable[[Step], None]]:
    """On a terminal a bar below the log with the last step's numbers, `first` of `total` steps being done; elsewhere nothing.

    What is printed meanwhile appears above the bar.
    """
    if not sys.stdout.isatty():
        yield lambda step: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(MofNCompleteColumn(), BarColumn(16), TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("", total=total, completed=first)
        yield lambda step: bar.update(task, completed=step.step, description=_told(step))


def _told(step: Step) -> str:
    mfu = "" if step.mfu is None else f" · MFU {step.mfu:.1%}"
    left = timedelta(seconds=round(step.eta))
    return f"loss {step.total_loss:.3f} · lr {step.lr:.1e} · {step.tgs:.0f} tok/s{mfu} · {left} left"
