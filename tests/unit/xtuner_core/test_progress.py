"""Progress in bytes and in steps: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import re
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


TRAIN = """
import time
from types import SimpleNamespace
from xtuner_core.progress import training_bar

with training_bar(2, 4) as show:
    for step in (3, 4):
        print(f"[XTuner] Step {step}/4 [not markup] " + "x" * 60, flush=True)
        show(SimpleNamespace(step=step, total_loss=1.5, lr=6e-5, tgs=812.4, mfu=0.432 if step == 4 else None, eta=3725.0))
        time.sleep(0.2)
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


def test_a_terminal_shows_a_training_s_numbers_below_its_log() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", TRAIN], stdout=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode(errors="replace")
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "3/4" in plain and "4/4" in plain
    assert "loss 1.500 · lr 6.0e-05 · 812 tok/s · 1:02:05 left" in plain
    assert "812 tok/s · MFU 43.2% · 1:02:05 left" in plain
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in plain.split("\n")]
    assert [f"[XTuner] Step {step}/4 [not markup] " + "x" * 60 in lines for step in (3, 4)] == [True, True]


def test_a_pipe_gets_the_lines_alone() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=environment, check=True, timeout=60)
    assert done.stdout.splitlines() == [f"[XTuner] Step {step}/4 [not markup] " + "x" * 60 for step in (3, 4)]


CONVERT = """
import time
from xtuner_core.progress import shown

with shown(4_000_000, "merging") as wrote:
    for _ in range(4):
        wrote(1_000_000)
        time.sleep(0.15)
"""


def test_a_conversion_s_bar_is_for_terminals_alone() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", CONVERT]
    for where in (theirs, subprocess.PIPE):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=where, env=environment, check=True, timeout=60)
        assert done.stdout == b"" and not done.stderr
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode(errors="replace")
    os.close(ours)
    assert "merging" in shown and "MB/s" in shown and "4.0 MB" in shown
