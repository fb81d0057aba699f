"""Validation loss: right, at the right steps, once a step, and without a trace in the training."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipelines import train as train_stage
from pipelines.launch import Job
from pipelines.launchers import local
from xtuner_core import trainer, validation
from xtuner_core.checkpoint import store
from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.durable import write_json
from xtuner_core.errors import DataError, Interrupted
from xtuner_core.parallel.mesh import World
from xtuner_core.signals import StopRequest
from xtuner_core.validation import due


@pytest.fixture
def configured(sft_config: Callable[..., SftConfig], validated_data: Path) -> Callable[..., SftConfig]:
    return lambda **train: sft_config(**train).model_copy(update={"data_dir": validated_data})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / "validation.jsonl").read_text().splitlines()]


def reference_loss(model_dir: Path, weights: Path, data: Path) -> float:
    """Cross-entropy per learned token, document by document through transformers' own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(store.load_whole(weights), strict=False)
    total, learned = 0.0, 0
    for document in map(PackedDataset(data).document, range(10)):
        ids, loss = torch.tensor(document.ids.astype(int)), torch.tensor(document.loss)
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits[loss[1:]], ids[1:][loss[1:]], reduction="sum"))
        learned += int(loss[1:].sum())
    return total / learned


@pytest.mark.parametrize("train", [{"method": "full"}, {"method": "lora", "lora": {"dropout": 0.2}, "dtype": "bf16"}])
def test_training_is_bit_for_bit_the_same_with_and_without(
    train: dict, world: World, stop: StopRequest, sft_config: Callable[..., SftConfig], configured: Callable[..., SftConfig], tmp_path: Path
) -> None:
    outcomes = []
    for config in (sft_config(**train), configured(**train, validation_interval=1)):
        trainer.train(config, world, stop)
        losses = [json.loads(row)["total_loss"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        outcomes.append((store.load_whole(tmp_path / "final"), losses))
        shutil.rmtree(tmp_path / "final")
        (tmp_path / "metrics.jsonl").unlink()
    (plain, plain_losses), (watched, watched_losses) = outcomes
    assert plain_losses == watched_losses and len(plain_losses) == 3
    assert plain.keys() == watched.keys() and all(torch.equal(plain[name], watched[name]) for name in plain)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_the_loss_is_that_of_the_documents_one_by_one(
    world: World, stop: StopRequest, configured: Callable[..., SftConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(total_step=2)
    trainer.train(config, world, stop)
    [row] = rows(config.work_dir)
    assert row["validation_loss"] == pytest.approx(reference_loss(config.model_dir, config.work_dir / "final", config.data_dir), rel=1e-5)
    assert row["step"] == 2 and row["perplexity"] == pytest.approx(math.exp(row["validation_loss"]))
    assert f"[INFO] Validation step 2 loss: {row['validation_loss']:.3f} perplexity: {row['perplexity']:.3f}\n" in capsys.readouterr().out


def test_a_signal_during_the_validation_is_obeyed_and_the_step_is_validated_after_resuming(
    world: World, stop: StopRequest, configured: Callable[..., SftConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = configured(validation_interval=1)
    trainer.train(undisturbed, world, stop)
    expected = [(row["step"], row["validation_loss"]) for row in rows(undisturbed.work_dir)]
    shutil.rmtree(undisturbed.work_dir)
    undisturbed.work_dir.mkdir()
    make_batch, read = validation.make_batch, []

    def stopped_at(count: int) -> Callable[..., Any]:
        def reading(*arguments: Any) -> Any:
            read.append(arguments)
            if len(read) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return make_batch(*arguments)

        return reading

    for count, step in ((7, 2), (8, 2), (14, 3)):  # 5 packs a time: in the second, in its repetition, in the last one
        monkeypatch.setattr(validation, "make_batch", stopped_at(count))
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 3"):
            trainer.train(undisturbed, world, stop)
        stop.asked = False
    trainer.train(undisturbed, world, stop)
    assert [(row["step"], row["validation_loss"]) for row in rows(undisturbed.work_dir)] == expected
    assert (undisturbed.work_dir / "final").exists()


def test_steps_repeated_after_a_resume_leave_one_row(world: World, stop: StopRequest, configured: Callable[..., SftConfig]) -> None:
    config = configured(validation_interval=1, checkpoint_interval=1)
    trainer.train(config, world, stop)
    shutil.rmtree(config.work_dir / "final")
    shutil.rmtree(config.work_dir / "checkpoints" / "step-2")  # killed after step 3, whose checkpoint was not written
    trainer.train(config, world, stop)
    assert [row["step"] for row in rows(config.work_dir)] == [1, 2, 3]


def test_other_weights_are_measured_again(world: World, stop: StopRequest, configured: Callable[..., SftConfig]) -> None:
    losses = []
    for rate in (1e-4, 3e-2):
        config = configured(validation_interval=1, checkpoint_interval=1, lr=rate)
        trainer.train(config, world, stop)
        assert [row["step"] for row in rows(config.work_dir)] == [1, 2, 3]
        losses.append([row["validation_loss"] for row in rows(config.work_dir)])
        shutil.rmtree(config.work_dir / "final")
        shutil.rmtree(config.work_dir / "checkpoints" / "step-2")
        shutil.rmtree(config.work_dir / "checkpoints" / "step-1", ignore_errors=True)
    assert all(left != right for left, right in zip(*losses, strict=True))


def test_weights_that_diverged_are_an_error(
    world: World, stop: StopRequest, configured: Callable[..., SftConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(total_step=1)
    model, _ = trainer.build(config, world)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="the validation loss is not finite"):
        validation.validate(model, validation.Measured(), 1, config, world, stop, print)
    assert not (config.work_dir / "validation.jsonl").exists()


@pytest.mark.parametrize(
    ("interval", "batch", "expected"),
    [(None, 1, [10, 20, 25]), (None, 4, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]), (None, 20, [*range(1, 26)]), (7, 1, [7, 14, 21, 25])],
)
def test_when(interval: int | None, batch: int, expected: list[int]) -> None:
    config = TrainConfig(validation_interval=interval, global_batch_size=batch)
    assert [step for step in range(26) if due(step, 25, 10, config)] == expected


def launch(config: SftConfig) -> None:
    file = config.work_dir / "config.json"
    write_json(file, config.model_dump(mode="json"))
    job = Job(file, config.work_dir / "log", config.train.processes)
    environment = local.environment(job) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(local.command(job), env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_share_packs_that_do_not_come_out_even(
    tiny_model_folder: Path, validated_data: Path, tmp_path: Path, world: World, stop: StopRequest
) -> None:
    train = {"total_step": 2, "validation_interval": 1, "lr": 5e-3, "dtype": "fp32", "global_batch_size": 2}
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        places = {"model_dir": tiny_model_folder, "data_dir": validated_data, "work_dir": folder}
        config = SftConfig.model_validate({**places, "train": {**train, "processes": processes}})
        if processes == 1:
            trainer.train(config, world, stop)
        else:
            launch(config)
        found[processes] = [(row["step"], row["learned_tokens"], row["validation_loss"]) for row in rows(folder)]
        assert train_stage._validation(folder) == {"validation_loss": rows(folder)[-1]["validation_loss"]}
    assert len(found[1]) == 2
    assert [one[:2] for one in found[1]] == [two[:2] for two in found[2]]
    assert [one[2] for one in found[1]] == pytest.approx([two[2] for two in found[2]], rel=1e-5)
