"""Which checkpoints are saved and kept, in the foreground and in the background, and what the last measurement decides."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner_core import trainer
from xtuner_core.checkpoint import store
from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.errors import DataError, Interrupted, RecipeError, StorageError
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest
from xtuner_core.validation import Measured, out_of_patience

Configure = Callable[..., SftConfig]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    return {f"{part}/{name}": raw for part in ("checkpoints", "final") for name, raw in every_byte(folder / part).items()}


def start_over(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"checkpoint_interval": 1}, ["step-2", "step-3"]),
        ({"checkpoint_interval": 1, "checkpoint_keep": 1}, ["step-3"]),
        ({"checkpoint_interval": 3, "checkpoint_last": True}, ["step-3", "step-4"]),
        ({"checkpoint_minutes": 1e-9, "checkpoint_keep": 9}, ["step-1", "step-2", "step-3"]),
        ({"checkpoint_minutes": 60, "checkpoint_interval": 2}, ["step-2"]),
    ],
)
def test_when_and_how_many(settings: dict, names: list[str], world: World, stop: StopRequest, sft_config: Configure) -> None:
    config = sft_config(total_step=4, **settings)
    trainer.train(config, world, stop)
    assert (saved(config.work_dir) if names else (config.work_dir / "checkpoints").exists()) == (names or False)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_in_the_background_the_same_bytes_are_written(method: str, world: World, stop: StopRequest, sft_config: Configure) -> None:
    settings = {"method": method, "lora": {"dropout": 0.1}, "checkpoint_interval": 1, "checkpoint_keep": 9, "checkpoint_last": True}
    written = []
    for background in (False, True):
        config = sft_config(total_step=3, async_checkpoint=background, **settings)
        trainer.train(config, world, stop)
        written.append(results(config.work_dir))
        start_over(config.work_dir)
    assert len(written[0]) == 8 and written[0] == written[1]


def test_the_training_goes_on_while_a_checkpoint_is_written(
    world: World, stop: StopRequest, sft_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(total_step=5, checkpoint_interval=2, async_checkpoint=True)
    trained, publish, train_step = threading.Event(), store.publish, trainer.train_step
    order: list[str] = []

    def publish_later(source: Path, target: Path) -> None:
        assert trained.wait(60)
        publish(source, target)
        order.append(target.name)

    def step(*arguments: Any) -> Any:
        if arguments[-1] == 3:  # the fourth, begun with the checkpoint of the second still under way
            assert not (config.work_dir / "checkpoints" / "step-2").exists()
            trained.set()
        return train_step(*arguments)

    monkeypatch.setattr(store, "publish", publish_later)
    monkeypatch.setattr(trainer, "train_step", step)
    trainer.train(config, world, stop)
    assert order == ["step-2", "step-4", "final"]


def test_a_signal_waits_for_the_checkpoint_in_the_background(
    world: World, stop: StopRequest, sft_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(total_step=3, checkpoint_interval=1, async_checkpoint=True)
    train_step = trainer.train_step

    def signalled(*arguments: Any) -> Any:
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", signalled)
    with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
        trainer.train(config, world, stop)
    assert saved(config.work_dir) == ["step-1", "step-2"]
    assert all(store.is_whole(folder) for folder in store.published(config.work_dir))


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(background: bool, world: World, stop: StopRequest, sft_config: Configure) -> None:
    config = sft_config(total_step=500, checkpoint_interval=1, async_checkpoint=background)
    (config.work_dir / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="checkpoints") as failure:
        trainer.train(config, world, stop)
    assert failure.value.exit_code == 74 and not (config.work_dir / "final").exists()
    assert len((config.work_dir / "metrics.jsonl").read_text().splitlines()) < 100


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_an_error_of_storage(world: World, tmp_path: Path) -> None:
    with files_no_longer_than(100_000), pytest.raises(StorageError, match="step-1: the checkpoint cannot be written"):
        store.save(tmp_path / "checkpoints" / "step-1", {"model.a": torch.ones(100_000)}, {"step": 1}, world)
    assert not (tmp_path / "checkpoints" / "step-1").exists()


# What the validation loss decides --------------------------------------------------------------------------------------------------

RISING = {"total_step": 6, "validation_interval": 1, "lr": 0.05, "scheduler": "constant", "warmup_ratio": 0, "checkpoint_keep": 1}
"""So fast that the loss is not lowest at the end."""


@pytest.fixture
def configured(sft_config: Configure, validated_data: Path) -> Configure:
    return lambda **train: sft_config(**{**RISING, **train}).model_copy(update={"data_dir": validated_data})


def losses(folder: Path) -> list[float]:
    return [json.loads(row)["validation_loss"] for row in (folder / "validation.jsonl").read_text().splitlines()]


def lowest(found: list[float]) -> int:
    """The step, from 1."""
    return found.index(min(found)) + 1


@pytest.mark.parametrize("background", [False, True])
def test_the_result_is_that_of_the_lowest_loss(background: bool, world: World, stop: StopRequest, configured: Configure) -> None:
    plain = configured(checkpoint_interval=1, checkpoint_keep=9)
    trainer.train(plain, world, stop)
    best = lowest(losses(plain.work_dir))
    assert 1 <= best < 6
    expected = store.load_whole(plain.work_dir / "checkpoints" / f"step-{best}")
    start_over(plain.work_dir)
    config = configured(checkpoint_best=True, async_checkpoint=background)
    trainer.train(config, world, stop)
    final = store.load_whole(config.work_dir / "final")
    assert final and all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in final.items())
    facts = store.facts(config.work_dir / "final")
    assert (facts["step"], facts["best_step"], facts["best_loss"]) == (6, best, min(losses(config.work_dir)))
    assert saved(config.work_dir) == [f"step-{best}"]


def test_a_run_that_was_stopped_knows_the_lowest_loss_and_its_patience(
    world: World, stop: StopRequest, configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(checkpoint_best=True, early_stop=2, total_step=30)
    trainer.train(config, world, stop)
    expected, seen = results(config.work_dir), losses(config.work_dir)
    assert len(seen) == lowest(seen) + 2 < 30  # it ended early, after two losses that were no minimum
    assert store.facts(config.work_dir / "final")["step"] == len(seen)
    start_over(config.work_dir)
    train_step = trainer.train_step

    def signalled(*arguments: Any) -> Any:
        if arguments[-1] == len(seen) - 2:  # between the two
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", signalled)
    with pytest.raises(Interrupted):
        trainer.train(config, world, stop)
    stop.asked = False
    assert len(saved(config.work_dir)) == 2
    trainer.train(config, world, stop)
    assert losses(config.work_dir) == seen
    assert every_byte(config.work_dir / "final") == {name.removeprefix("final/"): raw for name, raw in expected.items() if "final/" in name}


@pytest.mark.parametrize("total", [6, 7])
def test_a_best_checkpoint_that_is_gone_is_told_and_the_next_measurement_counts(
    total: int, world: World, stop: StopRequest, configured: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(checkpoint_best=True, checkpoint_interval=5, checkpoint_last=True)
    trainer.train(config, world, stop)
    best = store.facts(config.work_dir / "final")["best_step"]
    assert saved(config.work_dir) == [f"step-{best}", "step-6"] and best < 5
    shutil.rmtree(config.work_dir / "checkpoints" / f"step-{best}")
    trainer.train(configured(checkpoint_best=True, total_step=total), world, stop)
    assert f"the best checkpoint, step-{best}, is not there or damaged" in capsys.readouterr().out
    found = losses(config.work_dir)[5:total]  # that of the last checkpoint is measured again, even if it is the end
    facts = store.facts(config.work_dir / "final")
    assert (facts["step"], facts["best_step"], facts["best_loss"]) == (total, 5 + lowest(found), min(found))


@pytest.mark.parametrize("setting", [{"checkpoint_best": True}, {"early_stop": 2}])
def test_without_a_validation_split_they_are_refused(setting: dict, world: World, stop: StopRequest, sft_config: Configure) -> None:
    with pytest.raises(RecipeError, match=r"go by the validation loss: set data\.validation"):
        trainer.train(sft_config(**setting), world, stop)


def test_patience() -> None:
    measured, ended = Measured(), []
    for step, loss in enumerate((5.0, 4.0, 4.5, 4.0, 3.9, 4.1, 4.2, 4.3), 1):
        measured = measured.then(step, loss)
        ended.append(out_of_patience(measured, TrainConfig(early_stop=3)))
    assert ended == [False] * 7 + [True]
    assert measured == Measured(step=8, best_step=5, best_loss=3.9, since=3)
    assert not out_of_patience(measured, TrainConfig())


# What is taken up ------------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    world: World, stop: StopRequest, sft_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft_config(total_step=3, checkpoint_interval=1)
    trainer.train(config, world, stop)
    expected = every_byte(config.work_dir / "final")
    shutil.rmtree(config.work_dir / "final")
    [file] = (config.work_dir / "checkpoints" / "step-2" / "tensors").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    trainer.train(config, world, stop)
    told = capsys.readouterr().out
    assert f"passed over step-2: tensors/{file.name} is not what was saved" in told and "resumed from step-1" in told
    assert every_byte(config.work_dir / "final") == expected


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"method": "lora"}, r"lora_A.* is not in it"),
        ({"optimizer": "muon"}, r"optim\..*momentum_buffer is not in it"),
        ({"freeze": "*.mlp.*"}, r"mlp.* is too many"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    setting: dict, told: str, world: World, stop: StopRequest, sft_config: Configure
) -> None:
    config = sft_config(total_step=2, checkpoint_interval=1)
    trainer.train(config, world, stop)
    before = results(config.work_dir)
    with pytest.raises(RecipeError, match=f"step-1: a checkpoint of another model, method or optimizer: .*{told}"):
        trainer.train(sft_config(total_step=2, checkpoint_interval=1, **setting), world, stop)
    assert results(config.work_dir) == before


def test_a_tensor_of_another_shape_or_type_is_refused(world: World, tmp_path: Path) -> None:
    store.save(tmp_path / "step-1", {"a": torch.zeros(3, 4), "rng.1.cpu": torch.zeros(2)}, {"step": 1}, world)
    for other, told in ((torch.zeros(3, 5), r"float32 \[3, 4\] there and float32 \[3, 5\] here"), (torch.zeros(3, 4).double(), "float64")):
        with pytest.raises(RecipeError, match=told):
            store.load(tmp_path / "step-1", {"a": other})
    store.load(tmp_path / "step-1", {"a": torch.ones(3, 4)})


def test_the_best_checkpoint_damaged_during_the_run_is_an_error(
    world: World, stop: StopRequest, configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(checkpoint_best=True)
    train_step = trainer.train_step

    def damage(*arguments: Any) -> Any:
        if arguments[-1] == 5:
            shutil.rmtree(store.published(config.work_dir)[0] / "tensors")
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", damage)
    with pytest.raises(DataError, match="the best checkpoint was damaged since it was saved"):
        trainer.train(config, world, stop)
    assert not (config.work_dir / "final").exists()


def test_a_signal_while_a_checkpoint_is_read_is_no_failure_of_the_disk(
    world: World, stop: StopRequest, sft_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(total_step=2, checkpoint_interval=1)
    trainer.train(config, world, stop)
    read = store.HuggingFaceStorageReader.read_data

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    monkeypatch.setattr(store.HuggingFaceStorageReader, "read_data", signalled)
    with pytest.raises(Interrupted, match="stopped while the model was loaded"):
        trainer.train(config, world, stop)
