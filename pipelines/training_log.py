"""What a training's log tells those who watch it: warnings and errors as such, a step now and then, how far it is.

All of it stays in the log file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from pipelines.stage import Work

STEP_SECONDS = 10.0
"""Between the lines of two steps."""
_OURS = re.compile(r"\[XTuner\].*?\[(INFO|WARNING|ERROR)\] (.*)")
_TORCHRUN = re.compile(r"([WE])\d{4} [\d:.]+ +\d+ \S+\] (.*\S)")
_LEVELS = {"INFO": "", "WARNING": "warning: ", "ERROR": "error: ", "W": "warning: ", "E": "error: "}
_STEP = re.compile(r"Step (\d+)/(\d+) .*?total_loss: (\S+),.*? tgs: (\S+)")


@contextmanager
def relayed(work: Work, every: float = STEP_SECONDS) -> Iterator[Callable[[str], None]]:
    """A function for the log's lines, in turn; the first and the last step are told, and others every so many seconds."""
    began, first, told = time.monotonic(), 0, float("-inf")
    held: str | None = None

    def on_line(line: str) -> None:
        nonlocal began, first, told, held
        message, now = message_of(line), time.monotonic()
        if message is None:
            return
        if step := _STEP.match(message):
            done, total = int(step[1]), int(step[2])
            if not first:
                began, first = now, done
            left = (now - began) / max(1, done - first) * (total - done)
            where = f"step {done} of {total}, loss {step[3]}, {float(step[4]):.0f} tokens/s"
            work.progress(done / total, where + (f", {timedelta(seconds=round(left))} left" if done > first else ""))
            if now - told < every and done < total:
                held = message
                return
            told, held = now, None
        elif held and message.startswith(tuple(filter(None, _LEVELS.values()))):
            work.log(held)  # where it stood when that happened
            held = None
        work.log(message)

    try:
        yield on_line
    finally:
        if held:
            work.log(held)


def message_of(line: str) -> str | None:
    """What a line of the log says, its level in front if it is one; None of a line that is only for the file."""
    if ours := _OURS.match(line):
        return _LEVELS[ours[1]] + ours[2]
    if torchrun := _TORCHRUN.match(line):
        return _LEVELS[torchrun[1]] + torchrun[2]
    return line if line.startswith(("error: ", "stopped ")) else None
