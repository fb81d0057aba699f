"""The environment switches: how they are read, where they are told, and that deterministic runs give the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import train as stage
from pipelines.recipe import load_recipe
from xtuner_core.checkpoint import store
from xtuner_core.determinism import DETERMINISTIC, USE_FA3, Switches, apply, read, switches
from xtuner_core.errors import RecipeError

RECIPE = load_recipe("qwen3_tiny_full_openai")


@pytest.fixture(autouse=True)
def read_again() -> Iterator[None]:
    switches.cache_clear()
    yield
    switches.cache_clear()


@pytest.mark.parametrize("word", ["1", "true", "Yes", "ON", " true "])
def test_words_for_on(word: str) -> None:
    assert read({DETERMINISTIC: word}) == Switches(deterministic=True)
    assert read({USE_FA3: word}) == Switches(use_fa3=True)


@pytest.mark.parametrize("word", ["", "0", "False", "no", "OFF"])
def test_words_for_off(word: str) -> None:
    assert read({DETERMINISTIC: word, USE_FA3: word}) == read({}) == Switches()


@pytest.mark.parametrize("name", [DETERMINISTIC, USE_FA3])
def test_another_word_is_an_error_that_names_the_variable(name: str) -> None:
    with pytest.raises(RecipeError, match=f"environment variable {name}: 'ture' is neither on"):
        read({name: "ture"})


def test_only_what_is_on_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So by default checkpoints and the stage's key are as they were before there were switches."""
    assert Switches().facts() == {}
    before = stage.STAGE.settings(RECIPE)
    monkeypatch.setenv(DETERMINISTIC, "yes")
    switches.cache_clear()
    assert stage.STAGE.settings(RECIPE) == {**before, DETERMINISTIC: True}


def test_deterministic_mode_refuses_what_has_no_deterministic_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        apply(Switches())
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        apply(Switches(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def run(config: Path, word: str, threads: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, DETERMINISTIC: word, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "xtuner_core.sft", "--config", str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def settings(tmp_path: Path, name: str, model: Path, data: Path) -> Path:
    train = {"total_step": 2, "dtype": "fp32", "method": "lora", "lora": {"dropout": 0.1}, "loss_chunk": 200}
    values: dict[str, Any] = {"model_dir": str(model), "data_dir": str(data), "work_dir": str(tmp_path / name), "train": train}
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.slow
def test_two_deterministic_runs_on_two_threads_give_the_same_bytes(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    weights = []
    for name in ("one", "other"):
        done = run(settings(tmp_path, name, tiny_model_folder, tiny_data), "true", threads=2)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"environment: {DETERMINISTIC} on, {USE_FA3} off; attention: documents in groups" in done.stdout
        assert store.facts(tmp_path / name / "final")[DETERMINISTIC] is True
        weights.append(store.load_whole(tmp_path / name / "final"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_mistake_ends_the_run_at_once(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    done = run(settings(tmp_path, "work", tiny_model_folder, tiny_data), "maybe", threads=1)
    assert done.returncode == RecipeError.exit_code and "Traceback" not in done.stderr
    assert f"environment variable {DETERMINISTIC}: 'maybe'" in done.stderr
