"""Several processes with one store: exactly one makes an artifact, and a dead one holds up nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.artifacts import Store
from pipelines.recipe import PROJECT


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


RUNNER = """
import sys, time
from pathlib import Path
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from pipelines.stage import Stage

root, runs, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def run(recipe, work):
    assert not (work.payload / "half").exists()
    (work.payload / "half").write_text("x")
    with open(runs, "a") as sink:
        sink.write("ran\\n")
    time.sleep(seconds)
    (work.payload / "half").rename(work.payload / "whole")
    return {}

result = Store(root).produce(Stage("slow", 1, run, lambda recipe: {}), load_recipe("qwen3_tiny_full_openai"), {}, lambda line: print(line, flush=True))
print("cached" if result.cached else "made")
"""  # noqa: E501


def _start(store: Store, runs: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUNNER, str(store.root), str(runs), str(seconds)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def _ran(runs: Path) -> int:
    return len(runs.read_text().splitlines()) if runs.exists() else 0


def test_of_processes_with_one_key_exactly_one_runs(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    processes = [_start(store, runs, 1.5) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(output[-1] for output in outputs) == ["cached", "cached", "made"]
    assert _ran(runs) == 1
    assert any("another run is making this artifact; waiting for it" in line for output in outputs for line in output)


def test_a_killed_holder_of_the_lock_holds_up_nobody(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    holder = _start(store, runs, 600)
    deadline = time.monotonic() + 60
    while not _ran(runs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    waiting = _start(store, runs, 0)
    assert waiting.stdout
    assert "waiting for it" in waiting.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    assert waiting.communicate(timeout=60)[0].splitlines() == ["made"]
    assert holder.wait() == -signal.SIGKILL
    holder.communicate()
    assert _ran(runs) == 2
