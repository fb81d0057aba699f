"""The deployed clean-up: a worker runs it, its parameters are checked by the server, and the table tells what went and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.service import Service
from pipelines.artifacts import Store
from pipelines.inventory import pin
from pipelines.recipe import PROJECT, load_recipe
from pipelines.runner import run_until

TINY = "qwen3_tiny_full_openai"
DATA = "data.train=data/openai_chats/heldout.jsonl"


def ask(*parameters: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefect", "deployment", "run", "cleanup/cleanup", "--watch"]
    command += [part for parameter in parameters for part in ("-p", parameter)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_what_nobody_needs_goes_and_the_page_tells_why(service: Service, tmp_path: Path) -> None:
    from prefect.artifacts import Artifact

    store = Store(tmp_path / "store")
    base = run_until("base", load_recipe(TINY), store, print).artifact.path
    prepared = run_until("prepare", load_recipe(TINY, [DATA]), store, print).artifact.path
    pin(store, f"base/{base.name}", "for later")
    refused = ask(f"store={store.root}", "budget=plenty")
    assert (refused.returncode, "budget" in refused.stderr + refused.stdout) == (1, True)
    done = ask(f"store={store.root}", "budget=1kB")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [folder.parent.name for folder in store.folders()] == ["base"]
    shown = Artifact.get(key="cleanup")
    assert shown
    assert f"prepare/{prepared.name}" in str(shown.data)
    assert "over the budget of 1 kB" in str(shown.data)
    assert "all that is left is needed" in str(shown.description)
