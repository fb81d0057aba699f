"""Progress in bytes: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from pipelines.recipe import PROJECT
from xtuner_core import progress as module

SHOW = """
import time
from xtuner_core.progress import progress

with progress("tokenizing", 4_000_000, print) as advance:
    for _ in range(4):
        advance(1_000_000)
        time.sleep(0.15)
"""


def test_lines_tell_how_much_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
    told: list[str] = []
    with module.progress("tokenizing", 4_000_000, told.append) as advance:
        advance(1_000_000)
    assert len(told) == 1 and told[0].startswith("tokenizing: 1.0 of 4.0 MB, ") and told[0].endswith("s left")


def test_a_short_job_tells_nothing() -> None:
    told: list[str] = []
    with module.progress("tokenizing", 10, told.append) as advance:
        advance(10)
    assert told == []


def test_a_terminal_shows_a_bar_on_stderr_and_stdout_stays_clean() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode(errors="replace")
    os.close(ours)
    assert done.stdout == b""
    assert "tokenizing" in shown and "MB/s" in shown and "4.0 MB" in shown
