"""Training that begins with an earlier run's result: the same weights to the bit, another run in all else, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner_core import trainer
from xtuner_core.build import build
from xtuner_core.checkpoint import start, store
from xtuner_core.checkpoint.resume import Position, resume
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.checkpoint.store import load_whole
from xtuner_core.config import SftConfig
from xtuner_core.errors import DataError, Interrupted, RecipeError, UserError
from xtuner_core.models.preset import create_from_preset
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "bf16": {"weights": "bf16", "dtype": "bf16"},
    "freeze": {"freeze": ["model.embed_tokens.*", "model.layers.0.*"]},
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "dora": {"method": "lora", "lora": {"rslora": True, "dora": True, "targets": ["q_proj", "layers.1.mlp.up_proj"]}},
    "qlora": {"method": "qlora", "dtype": "bf16"},
}
Follow = Callable[..., SftConfig]


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    """A run, and the fields of `train` that differ → one in a directory of its own that begins with the first one's result."""

    def config(first: SftConfig, **train: object) -> SftConfig:
        fields = {**first.train.model_dump(), "start": str(first.work_dir / "final"), **train}
        work_dir = tmp_path / f"next {len(list(tmp_path.glob('next*')))}"
        work_dir.mkdir()
        return SftConfig.model_validate({**first.model_dump(), "work_dir": work_dir, "train": fields})

    return config


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in trained_tensors(model).items()}  # pyright: ignore


def raw(parameter: torch.Tensor) -> torch.Tensor:
    """Its bytes: packed 4-bit weights look like numbers that are none."""
    return parameter.detach().view(torch.uint8)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_run_begins_with_the_first_ones_weights_and_nothing_else_of_it(
    method: str, world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], follow: Follow
) -> None:
    first = sft_config(**METHODS[method])
    trainer.train(first, world, stop)
    second = follow(first)
    model, optimizer = build(second, world)
    untouched = {name: raw(parameter).clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not equal(weights(model), load_whole(first.work_dir / "final"))
    assert resume(second, model, optimizer, 3, world) == Position() and not optimizer.state
    assert equal(weights(model), load_whole(first.work_dir / "final"))
    assert all(torch.equal(raw(parameter), untouched[name]) for name, parameter in model.named_parameters() if name in untouched)


def test_an_interrupted_run_goes_on_from_its_own_checkpoint_even_if_what_it_began_with_is_gone(
    world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sft_config()
    trainer.train(first, world, stop)
    whole, cut = follow(first), follow(first)
    trainer.train(whole, world, stop)
    assert not equal(load_whole(whole.work_dir / "final"), load_whole(first.work_dir / "final"))
    train_step = trainer.train_step

    def stop_after_the_second(*arguments: Any) -> Any:
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", stop_after_the_second)
    with pytest.raises(Interrupted, match="after step 2 of 3"):
        trainer.train(cut, world, stop)
    stop.asked = False
    shutil.rmtree(first.work_dir / "final")
    trainer.train(cut, world, stop)
    assert equal(load_whole(cut.work_dir / "final"), load_whole(whole.work_dir / "final"))


@pytest.fixture(scope="module")
def finals(world: World, tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method → the result of a run of one step."""
    places = {}
    for method in ("full", "lora"):
        work_dir = tmp_path_factory.mktemp(method)
        train = {"total_step": 1, "dtype": "fp32", "checkpoint_last": True, **METHODS[method]}
        config = {"model_dir": tiny_model_folder, "data_dir": tiny_data, "work_dir": work_dir, "train": train}
        trainer.train(SftConfig.model_validate(config), world, StopRequest())
        places[method] = work_dir / "final"
    return places


LORA = METHODS["lora"]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "method": ("full", LORA, r"trained otherwise: train\.method is full there and lora here"),
    "rank": ("lora", {"method": "lora", "lora": {"rank": 8}}, r"train\.lora\.rank is 4 there and 8 here"),
    "alpha": ("lora", {"method": "lora", "lora": {"rank": 4, "alpha": 16}}, r"train\.lora\.alpha is 32 there and 16 here"),
    "targets": ("lora", {"method": "lora", "lora": {"rank": 4, "targets": ["q_proj"]}}, r"targets is \['all-linear'\] there and \['q_"),
    "quantized": ("lora", {**LORA, "method": "qlora", "dtype": "bf16"}, r"train\.method is lora there and qlora here"),
    "frozen": ("full", METHODS["freeze"], r"train\.freeze is \[\] there"),
    "precision": ("full", METHODS["bf16"], r"train\.weights is fp32 there and bf16 here"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_trained_otherwise_is_refused(
    case: str, world: World, stop: StopRequest, finals: dict[str, Path], sft_config: Callable[..., SftConfig]
) -> None:
    method, train, reason = REFUSED[case]
    with pytest.raises(RecipeError, match=rf"train\.start .*/final: .*{reason}.*\. Go on with the model"):
        trainer.train(sft_config(**train, start=str(finals[method])), world, stop)


def test_dropout_and_the_schedule_are_the_runs_own(
    world: World, stop: StopRequest, finals: dict[str, Path], sft_config: Callable[..., SftConfig]
) -> None:
    trainer.train(sft_config(method="lora", lora={"rank": 4, "dropout": 0.1}, scheduler="constant", start=str(finals["lora"])), world, stop)


def test_another_model_is_refused_though_its_tensors_would_fit(
    world: World, stop: StopRequest, finals: dict[str, Path], sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    create_from_preset("qwen3-tiny", tmp_path / "other", seed=7)
    config = sft_config(**LORA, start=str(finals["lora"])).model_copy(update={"model_dir": tmp_path / "other"})
    with pytest.raises(RecipeError, match=r"it was trained on another model than .*/other"):
        trainer.train(config, world, stop)
    shutil.copytree(sft_config().model_dir, tmp_path / "the same, elsewhere")
    assert start.fingerprint(tmp_path / "the same, elsewhere") == start.fingerprint(sft_config().model_dir)


def lacking(folder: Path) -> None:
    shutil.rmtree(folder / "tensors")


def flipped(folder: Path) -> None:
    [file] = (folder / "tensors").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def no_facts(folder: Path) -> None:
    (folder / store.FACTS).unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    lacking: "the checkpoint is damaged",
    flipped: "is not what was saved",
    no_facts: r"no checkpoint\.json is there",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], None],
    world: World,
    stop: StopRequest,
    finals: dict[str, Path],
    sft_config: Callable[..., SftConfig],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(finals["lora"], tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError, match=DAMAGES[damage]):
        trainer.train(sft_config(**LORA, start=str(folder)), world, stop)


def test_missing_tensors_and_checkpoints_to_resume_from_are_refused(
    world: World, stop: StopRequest, finals: dict[str, Path], sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    tensors = load_whole(finals["lora"])
    name = sorted(tensors)[0]
    facts = {name: value for name, value in store.facts(finals["lora"]).items() if name not in ("files", "sha256", "world_size")}
    store.save(tmp_path / "less", {other: tensor for other, tensor in tensors.items() if other != name}, facts, world)
    with pytest.raises(RecipeError, match=rf"it does not have just the tensors that are trained here: {name} is not in it"):
        trainer.train(sft_config(**LORA, start=str(tmp_path / "less")), world, stop)
    with pytest.raises(UserError, match=r"a checkpoint to resume from is no result\. Name the run's folder `final`"):
        trainer.train(sft_config(**LORA, start=str(finals["lora"].parent / "checkpoints" / "step-1")), world, stop)


def test_the_result_tells_no_path_of_what_it_began_with(
    world: World, stop: StopRequest, finals: dict[str, Path], sft_config: Callable[..., SftConfig], tmp_path: Path
) -> None:
    moved = shutil.copytree(finals["lora"], tmp_path / "moved")
    told = []
    for folder in (finals["lora"], moved):
        config = sft_config(**LORA, start=str(folder)).model_copy(update={"work_dir": tmp_path / f"from {folder.name}"})
        config.work_dir.mkdir()
        trainer.train(config, world, stop)
        told.append({file.name: file.read_bytes() for file in sorted((config.work_dir / "final").rglob("*")) if file.is_file()})
    assert told[0] == told[1] and str(moved) not in json.dumps(store.facts(tmp_path / "from moved" / "final"))
