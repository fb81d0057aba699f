"""What the engine accepts as configuration, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from xtuner_core.config import DataConfig, SftConfig, Source, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.sft import read_config

GOOD: dict[str, Any] = {"model_dir": "m", "data_dir": "d", "work_dir": "w", "train": {}}


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"epochs": 1, "total_step": 1}, "epochs or total_step, not both"),
        ({"global_batch_size": 3, "processes": 2}, r"global_batch_size \(3\) must be a multiple of processes \(2\)"),
        ({"lr": 1e-6, "lr_min": 1e-5}, "lr_min .* is greater than lr"),
        ({"learning_rate": 1}, "learning_rate"),
        ({"lr": 0}, "greater than 0"),
        ({"lr": float("nan")}, "finite number"),
        ({"lr": float("inf")}, "finite number"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio \(1.5\) is a number of steps from 1 on, so it must be whole"),
        ({"warmup_ratio": -0.1}, "greater than or equal to 0"),
        ({"decay_ratio": 0}, "greater than 0"),
        ({"betas": [0.9, 1.0]}, r"betas \(0.9, 1.0\) must be at least 0 and below 1"),
        ({"betas": [-0.1, 0.9]}, "betas"),
        ({"weight_decay": -1}, "greater than or equal to 0"),
        ({"lr": 1, "weight_decay": 1}, "must be below 1, or decay turns the weights' signs"),
        ({"skip_grad_norm_factor": 1}, "greater than 1"),
        ({"max_skipped_steps": 0}, "greater than or equal to 1"),
        ({"total_step": 0}, "greater than or equal to 1"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"dtype": "fp16"}, "'bf16' or 'fp32'"),
        ({"loss_chunk": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_training_settings_are_refused(train: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TrainConfig.model_validate(train)


def test_a_document_must_fit_a_pack() -> None:
    with pytest.raises(ValidationError, match=r"max_length \(64\) is greater than pack_length \(32\)"):
        DataConfig(train=("a",), max_length=64, pack_length=32)


def test_paths_are_one_name_several_or_a_list(tmp_path: Path) -> None:
    comma = tmp_path / "a,b.jsonl"
    comma.touch()
    for given, meant in (("a", ("a",)), ("a, b", ("a", "b")), (["a", "b"], ("a", "b")), (str(comma), (str(comma),))):
        assert DataConfig.model_validate({"train": given}).train == tuple(Source(path=path) for path in meant)
        assert DataConfig.model_validate({"train": "a", "validation": given}).validation == meant


def test_a_source_says_more_than_its_path() -> None:
    half = {"path": "a", "sample_ratio": 0.5, "format": "alpaca"}
    for given in (half, [half], ["b", half]):
        assert DataConfig.model_validate({"train": given}).train[-1] == Source(path="a", format="alpaca", sample_ratio=0.5)
    for wrong in ([], "", [{"path": "a", "sample_ratio": 0}], [{"path": "a", "weight": 1}], 3):
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"train": wrong})


def test_a_share_for_validation() -> None:
    assert DataConfig.model_validate({"train": "a", "validation": 0.02}).validation == 0.02
    for wrong in (1.0, -0.1):
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"train": "a", "validation": wrong})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_configuration_survives_its_json(tmp_path: Path) -> None:
    config = SftConfig.model_validate({**GOOD, "train": {"method": "lora", "lora": {"targets": ["q_proj"]}}})
    (tmp_path / "c.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert read_config(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        (json.dumps({**GOOD, "train": {"lr": -1}}), r"train\.lr: Input should be greater than 0"),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError, match=rf"--config {file}: .*{told}"):
        read_config(file)


def test_the_engine_ends_with_the_code_of_the_error_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xtuner_core.sft", "--config", str(tmp_path / "gone.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == RecipeError.exit_code == 78
    assert done.stderr == f"error: --config {tmp_path}/gone.json: No such file or directory.\n"
