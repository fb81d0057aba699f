"""The loss on documents that are never trained on, measured without a trace in the training that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from xtuner_core.config import SftConfig, TrainConfig
from xtuner_core.data.dataset import VALIDATION, PackedDataset
from xtuner_core.data.loader import make_batch
from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.metrics import ValidationMetrics, clock
from xtuner_core.parallel.mesh import World, any_rank, sum_over_ranks
from xtuner_core.parallel.shard import give_back
from xtuner_core.signals import StopRequest

ROWS = "validation.jsonl"
Tell = Callable[[ValidationMetrics], None]


def due(step: int, total: int, packs: int, config: TrainConfig) -> bool:
    """Whether the loss is measured after `step` steps: at every interval or, without one, as an epoch ends; and at the very end."""
    seen, before = (done * config.global_batch_size for done in (step, step - 1))
    often = step % config.validation_interval == 0 if config.validation_interval else seen // packs > before // packs
    return step > 0 and (often or step == total)


@dataclass(frozen=True, slots=True)
class Measured:
    """The validation losses so far; part of a checkpoint, so that a resumed run decides alike.

    step: steps done at the last measurement. best_step, best_loss: the lowest loss and when (None: nothing was measured yet).
    since: measurements after that one.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    since: int = 0

    @classmethod
    def of_checkpoint(cls, facts: Mapping[str, Any]) -> Measured:
        """What the facts of a checkpoint tell; nothing before they were kept."""
        return cls(**facts.get("measured", {}))

    def then(self, step: int, loss: float) -> Measured:
        """With one measurement more."""
        if self.best_loss is None or loss < self.best_loss:
            return Measured(step, step, loss)
        return replace(self, step=step, since=self.since + 1)


def validate(
    model: PreTrainedModel, before: Measured, step: int, config: SftConfig, world: World, stop: StopRequest, tell: Tell
) -> Measured | None:
    """Tell the mean loss per learned token over the validation split and put it into `work_dir/validation.jsonl`, once for a step.

    Weights, random streams and the model's mode are afterwards what they were. Nothing happens if the data has no such split.
    None if a signal came meanwhile: nothing is written, and the run that resumes from this step measures it.

    Raises:
        DataError: the loss is not finite.
    """
    if before.step == step or not (config.data_dir / VALIDATION).is_dir():
        return before
    started = clock()
    found = mean_loss(model, PackedDataset(config.data_dir, VALIDATION), config.train.loss_chunk, world, stop)
    if found is None:
        return None
    loss, learned = found
    metrics = ValidationMetrics(step, loss, learned, time=clock() - started)
    tell(metrics)
    if world.rank == 0:
        _write_rows(config, [*(row for row in _rows(config) if row["step"] < step), metrics.as_row()])
    return before.then(step, loss)


def out_of_patience(measured: Measured, config: TrainConfig) -> bool:
    """Whether the loss has not fallen for `train.early_stop` measurements."""
    return config.early_stop is not None and measured.since >= config.early_stop


def require_split(config: SftConfig) -> None:
    """RecipeError if the data has no validation split."""
    if not (config.data_dir / VALIDATION).is_dir():
        raise RecipeError("train.checkpoint_best and train.early_stop go by the validation loss: set data.validation (--validation 0.05).")


def forget_after(step: int, config: SftConfig, world: World) -> None:
    """Drop what was measured after `step`, where a run goes on: its weights may become others, by another learning rate say."""
    if world.rank == 0:
        rows = _rows(config)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            _write_rows(config, kept)


def _rows(config: SftConfig) -> list[dict[str, float]]:
    file = config.work_dir / ROWS
    return [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _write_rows(config: SftConfig, rows: list[dict[str, float]]) -> None:
    write_bytes(config.work_dir / ROWS, "".join(json.dumps(row) + "\n" for row in rows).encode())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, dataset: PackedDataset, chunk: int, world: World, stop: StopRequest) -> tuple[float, int] | None:
    """Cross-entropy per learned token over all packs, and the number of learned tokens; None if a signal came.

    A forward pass is a collective operation, so a rank that has no pack left repeats one, and its loss does not count.
    """
    total = learned = 0.0
    model.eval()
    try:
        for first in range(0, len(dataset), world.size):
            if any_rank(stop.asked, world):
                return None
            index = first + world.rank
            batch = make_batch(dataset, min(index, len(dataset) - 1))
            loss = model.packed_loss(batch.to(world.device), chunk)  # pyright: ignore[reportCallIssue]
            if index < len(dataset):
                total, learned = total + float(loss), learned + batch.learned
    finally:
        model.train()
        give_back(model)
    total, learned = (sum_over_ranks(value, world) for value in (total, learned))
    if not torch.tensor(total).isfinite():
        raise DataError("the validation loss is not finite; the weights have diverged: lower train.lr or train.max_grad_norm.")
    return total / max(1.0, learned), int(learned)
