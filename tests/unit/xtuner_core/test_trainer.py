"""The training loop in this process: numbers that must not reach the weights, stopping, resuming, what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xtuner_core import trainer
from xtuner_core.checkpoint import store
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.config import SftConfig
from xtuner_core.data.loader import IGNORE, Batch
from xtuner_core.errors import DataError, Interrupted, RecipeError
from xtuner_core.guards import History
from xtuner_core.loss import packed_loss
from xtuner_core.parallel import shard
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest

Configure = Callable[..., SftConfig]


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss


POISONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan loss": lambda loss: loss * torch.nan,
    "infinite loss": lambda loss: loss + torch.inf,
    "finite loss, infinite gradient": infinite_gradient,
}


@pytest.mark.parametrize("poison", POISONS)
def test_broken_numbers_never_reach_the_weights(
    poison: str, world: World, stop: StopRequest, sft_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(checkpoint_interval=1)
    losses: list[float] = []
    built: list[Any] = []

    def poisoned(model: Any, batch: Batch, chunk: int) -> torch.Tensor:
        losses.append((loss := packed_loss(model, batch, chunk)).item())
        return POISONS[poison](loss) if len(losses) == 2 else loss

    build = trainer.build
    monkeypatch.setattr(shard, "packed_loss", poisoned)
    monkeypatch.setattr(trainer, "build", lambda *arguments: built.append(build(*arguments)) or built[0])
    with pytest.raises(DataError, match=r"step 2: loss .*the weights were left unchanged\. Documents of the step: \[\d+"):
        trainer.train(config, world, stop)
    [(model, _)] = built
    after_step_1 = store.load_whole(config.work_dir / "checkpoints" / "step-1")
    weights = {f"model.{name}": tensor.full_tensor() for name, tensor in trained_tensors(model).items()}  # pyright: ignore
    assert all(torch.equal(weights[name], after_step_1[name]) for name in weights)
    assert store.newest(config.work_dir) == config.work_dir / "checkpoints" / "step-1"
    assert not (config.work_dir / "final").exists()


def test_a_stop_before_the_first_step_leaves_no_checkpoint(world: World, stop: StopRequest, sft_config: Configure) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    config = sft_config()
    with pytest.raises(Interrupted, match="stopped while the model was loaded; the same command continues"):
        trainer.train(config, world, stop)
    assert not (config.work_dir / "checkpoints").exists()


VARIANTS = [
    {"method": "full"},
    {"method": "lora", "lora": {"dropout": 0.1}},
    {"optimizer": "muon"},
    {"optimizer": "adamw_8bit"},
    {"weights": "bf16"},
    {"weights": "bf16", "optimizer": "adamw_8bit"},
    {"weights": "bf16", "optimizer": "muon"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(
    variant: dict[str, Any], world: World, stop: StopRequest, sft_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(**variant, dtype="bf16")
    trainer.train(config, world, stop)
    expected = store.load_whole(tmp_path / "final")
    shutil.rmtree(tmp_path / "final")
    train_step = trainer.train_step

    def stop_after_the_second(*arguments: Any) -> tuple[float, float, History]:
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", stop_after_the_second)
    with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
        trainer.train(config, world, stop)
    stop.asked = False
    trainer.train(config, world, stop)
    found = store.load_whole(tmp_path / "final")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_step_without_learned_tokens_changes_no_weight_by_its_loss(
    world: World, stop: StopRequest, sft_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_learned(*arguments: Any) -> list[Batch]:
        batches = load_step(*arguments)
        for batch in batches:
            batch.labels.fill_(IGNORE)
        return batches

    load_step = trainer.load_step
    monkeypatch.setattr(trainer, "load_step", nothing_learned)
    config = sft_config(total_step=1, weight_decay=0.0)
    trainer.train(config, world, stop)
    before, after = load_file(config.model_dir / "model.safetensors"), store.load_whole(config.work_dir / "final")
    assert before.keys() == after.keys() and all(torch.equal(before[name].float(), after[name]) for name in after)


def test_packs_that_cannot_be_dealt_out_evenly_are_refused(world: World, stop: StopRequest, sft_config: Configure) -> None:
    three = World(0, 3, world.device, world.mesh)
    with pytest.raises(RecipeError, match=r"train\.global_batch_size \(4\) must be a multiple of the 3 processes"):
        trainer.train(sft_config(global_batch_size=4), three, stop)


def test_a_folder_that_is_no_model_is_named(world: World, stop: StopRequest, sft_config: Configure, tmp_path: Path) -> None:
    config = sft_config().model_copy(update={"model_dir": tmp_path / "gone"})
    with pytest.raises(RecipeError, match="gone: transformers cannot load this model"):
        trainer.train(config, world, stop)
