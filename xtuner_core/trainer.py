"""The training loop, on one screen; everything it uses is a named part of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.build import build
from xtuner_core.checkpoint import state, store
from xtuner_core.checkpoint.resume import Position, load_best, resume
from xtuner_core.checkpoint.saver import Saver
from xtuner_core.checkpoint.start import fingerprint
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import Batch, load_step, read_ahead
from xtuner_core.data.order import steps_of
from xtuner_core.dry_run import rehearse
from xtuner_core.errors import DataError, Interrupted, RecipeError
from xtuner_core.garbage import collect_at_steps
from xtuner_core.guards import History, judge
from xtuner_core.loss import weigh
from xtuner_core.metrics import clock
from xtuner_core.optim.clipping import clip
from xtuner_core.optim.optimizer import set_learning_rate
from xtuner_core.optim.schedule import learning_rate
from xtuner_core.parallel.mesh import World, any_of_each, sum_over_ranks
from xtuner_core.profiling import profiled
from xtuner_core.records import open_records
from xtuner_core.samples import answer, read_prompts
from xtuner_core.signals import StopRequest
from xtuner_core.validation import due, out_of_patience, require_split, validate

FINAL = "final"


def train(config: SftConfig, world: World, stop: StopRequest) -> None:
    """Train to the last step, resuming from the newest whole checkpoint; leaves `work_dir/final` (trained tensors only).

    Raises:
        Interrupted: a signal came; a checkpoint of the last finished step was saved.
        DataError: there is nothing to train on, or a loss or gradient is not finite, or too many steps in a row were left out.
        RecipeError: the packs of a step cannot be dealt out evenly to the processes, or the checkpoint is past the last step.
    """
    dataset, total = packs_to_train(config, world)
    prompts = read_prompts(config)
    with stop.at_once("the model was loaded"):
        model, optimizer = build(config, world)
        at = resume(config, model, optimizer, total, world)
        rehearse(model, optimizer, dataset, config, world)

    def load(step: int) -> list[Batch]:
        batches = load_step(dataset, step, config.train.global_batch_size, config.seed, world.rank, world.size)
        return [weigh(batch, config.train.loss_reduction) for batch in batches]

    with (
        Saver(config, model, optimizer, at, world) as saver,
        read_ahead(load, range(at.step, total), config.train.prefetch, world.device) as batches_of_step,
        open_records(config, at.step, total, dataset, world) as records,
        collect_at_steps() as collect_garbage,
    ):
        while True:
            measured = at.measured
            if due(at.step, total, len(dataset), config.train):
                measured = validate(model, at.measured, at.step, config, world, stop, records.validation)
            at = replace(at, measured=measured or at.measured)
            last = at.step == total or out_of_patience(at.measured, config.train)
            asked, late, failed = any_of_each((stop.asked, saver.late(), saver.failed()), world)
            if failed:
                saver.finish()
            if measured is None or (asked and not last):
                saver.save(at)
                raise Interrupted(f"stopped after step {at.step} of {total}; the same command continues from there.")
            if saver.due(at, last, late):
                saver.save(at)
            answer(model, prompts, at.step, last, config, world)
            if last:
                break
            started = clock()
            batches = next(batches_of_step)
            loaded = clock()
            set_learning_rate(optimizer, rate := learning_rate(at.step, total, config.train))
            with profiled(at.step + 1, config, world):
                loss, grad_norm, history = train_step(model, optimizer, batches, config, world, at.history, at.step)
            at = replace(at, step=at.step + 1, history=history)
            records.step(at.step, batches, rate, loss, grad_norm, started, loaded)
            collect_garbage(at.step)
    finish(config, model, at, world)


def packs_to_train(config: SftConfig, world: World) -> tuple[PackedDataset, int]:
    """The packs, and the number of steps to train on them."""
    train = config.train
    if train.global_batch_size % world.size:
        raise RecipeError(f"train.global_batch_size ({train.global_batch_size}) must be a multiple of the {world.size} processes.")
    dataset = PackedDataset(config.data_dir)
    if len(dataset) == 0:
        raise DataError(f"{config.data_dir}: no packs to train on; preference pairs and prompts are only kept for later use.")
    if train.checkpoint_best or train.early_stop:
        require_split(config)
    return dataset, train.total_step or steps_of(len(dataset), train.epochs or 1, train.global_batch_size)


def finish(config: SftConfig, model: PreTrainedModel, at: Position, world: World) -> None:
    """Publish `final`: what was trained, or with `train.checkpoint_best` what it was at the lowest validation loss; and what decided it.

    Raises:
        DataError: every step was left out, or the best checkpoint is damaged.
    """
    if at.history.skipped == at.step:
        raise DataError(f"all {at.step} steps were left out (train.skip_grad_norm_factor); nothing was learned. Lower train.lr.")
    facts = {"step": at.step, "seed": config.seed, "train": config.train.deciding(), "base": fingerprint(config.model_dir)}
    facts |= {"skipped_steps": at.history.skipped} if config.train.skip_grad_norm_factor else {}
    if config.train.checkpoint_best:
        facts |= {"best_step": at.measured.best_step, "best_loss": at.measured.best_loss}
        load_best(config, model, at, world)
    store.save(config.work_dir / FINAL, state.trained_tensors(model), facts, world)


def train_step(
    model: PreTrainedModel, optimizer: Optimizer, batches: list[Batch], config: SftConfig, world: World, history: History, step: int
) -> tuple[float, float, History]:
    """One optimizer update, if its numbers are good; returns the mean loss over all ranks as the batches weigh it, the
    gradient norm before clipping, and the history with this step.

    The loss is divided by the weight of all learned tokens of the step, so it and its gradient do not depend on how packs are dealt to
    ranks and micro-batches. FSDP averages gradients over ranks, hence the factor `world.size`.
    """
    weight = sum_over_ranks(sum(batch.weight for batch in batches), world)
    total = torch.zeros((), device=world.device)
    for batch in batches:
        loss = model.packed_loss(batch.to(world.device), config.train.loss_chunk)  # pyright: ignore[reportCallIssue]
        (loss * (world.size / max(1.0, weight))).backward()
        total += loss.detach()
    norm = clip(model, config.train.max_grad_norm)
    summed_loss, grad_norm = torch.stack([total, norm.to(world.device)]).tolist()  # the one place where the host waits for a GPU
    mean_loss = sum_over_ranks(summed_loss, world) / max(1.0, weight)
    documents = [number for batch in batches for number in batch.documents]
    history = judge(history, step + 1, mean_loss, grad_norm, documents, config.train, world)
    if history.in_a_row == 0:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm, history
