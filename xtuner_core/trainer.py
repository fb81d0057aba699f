"""The training loop, on one screen; everything it uses is a named part of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.build import build
from xtuner_core.checkpoint import state, store
from xtuner_core.config import SftConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import Batch, load_step
from xtuner_core.data.order import steps_of
from xtuner_core.errors import DataError, Interrupted, RecipeError
from xtuner_core.guards import History, judge
from xtuner_core.metrics import MetricsLog, StepMetrics, clock, memory, say
from xtuner_core.optim.optimizer import set_learning_rate
from xtuner_core.optim.schedule import learning_rate
from xtuner_core.parallel.mesh import World, any_rank, sum_over_ranks
from xtuner_core.signals import StopRequest
from xtuner_core.validation import due, forget_after, validate

KEEP_CHECKPOINTS = 2
FINAL = "final"


def train(config: SftConfig, world: World, stop: StopRequest) -> None:
    """Train to the last step, resuming from the newest whole checkpoint; leaves `work_dir/final` (trained tensors only).

    Raises:
        Interrupted: a signal came; a checkpoint of the last finished step was saved.
        DataError: there is nothing to train on, or a loss or gradient is not finite, or too many steps in a row were left out.
        RecipeError: the packs of a step cannot be dealt out evenly to the processes, or the checkpoint is past the last step.
    """
    if config.train.global_batch_size % world.size:
        raise RecipeError(f"train.global_batch_size ({config.train.global_batch_size}) must be a multiple of the {world.size} processes.")
    dataset = PackedDataset(config.data_dir)
    if len(dataset) == 0:
        raise DataError(f"{config.data_dir}: no packs to train on; preference pairs and prompts are only kept for later use.")
    model, optimizer = build(config, world)
    total = config.train.total_step or steps_of(len(dataset), config.train.epochs or 1, config.train.global_batch_size)
    first, history = resume(config, model, optimizer, world)
    if first > total:
        raise RecipeError(
            f"the checkpoint in {config.work_dir} is at step {first}, and {total} are asked for. Ask for more, or start over."
        )
    forget_after(first, config, world)
    log = MetricsLog(config.work_dir / "metrics.jsonl", world.rank)
    run_started, run_tokens = clock(), 0
    for step in range(first, total + 1):
        measured = not due(step, total, len(dataset), config.train) or validate(model, step, config, world, stop)
        if not measured or (step < total and any_rank(stop.asked, world)):
            if step > first:  # otherwise there is nothing new to save
                save_checkpoint(config, model, optimizer, world, step, history)
            raise Interrupted(f"stopped after step {step} of {total}; the same command continues from there.")
        if step == total:
            break
        started = clock()
        batches = load_step(dataset, step, config.train.global_batch_size, config.seed, world.rank, world.size)
        loaded = clock()
        set_learning_rate(optimizer, rate := learning_rate(step, total, config.train))
        loss, grad_norm, history = train_step(model, optimizer, batches, config, world, history, step)
        spent, tokens = clock() - loaded, sum(batch.text_tokens for batch in batches)
        run_tokens += tokens
        pace = (clock() - run_started) / (step + 1 - first)
        used, reserved = memory(world.device)
        slots = len(batches) * dataset.description["pack_length"]
        log.write(StepMetrics(
            step=step + 1, total_step=total, data_time=loaded - started, lr=rate, time=spent, text_tokens=tokens,
            total_loss=loss, reduced_llm_loss=loss, max_memory=used, reserved_memory=reserved, grad_norm=grad_norm, tgs=tokens / spent,
            e2e_tgs=run_tokens / (clock() - run_started), eta=pace * (total - step - 1), pack_efficiency=tokens / slots,
        ))  # fmt: skip
        if config.train.checkpoint_interval and (step + 1) % config.train.checkpoint_interval == 0 and step + 1 < total:
            save_checkpoint(config, model, optimizer, world, step + 1, history)
    if history.skipped == total:
        raise DataError(f"all {total} steps were left out (train.skip_grad_norm_factor); nothing was learned. Lower train.lr.")
    facts = {"step": total, "seed": config.seed, "train": config.train.model_dump(mode="json")}
    facts |= {"skipped_steps": history.skipped} if config.train.skip_grad_norm_factor else {}
    store.save(config.work_dir / FINAL, state.trained_tensors(model), facts, world)


def train_step(
    model: PreTrainedModel, optimizer: Optimizer, batches: list[Batch], config: SftConfig, world: World, history: History, step: int
) -> tuple[float, float, History]:
    """One optimizer update, if its numbers are good; returns the loss per learned token over all ranks, the gradient norm before
    clipping, and the history with this step.

    The loss is divided by the learned tokens of the whole step, so it and its gradient do not depend on how packs are dealt to
    ranks and micro-batches. FSDP averages gradients over ranks, hence the factor `world.size`.
    """
    learned = sum_over_ranks(sum(batch.learned for batch in batches), world)
    total = 0.0
    for batch in batches:
        loss = model.packed_loss(batch.to(world.device), config.train.loss_chunk)  # pyright: ignore[reportCallIssue]
        (loss * (world.size / max(1.0, learned))).backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.train.max_grad_norm, foreach=True)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    mean_loss = sum_over_ranks(float(total), world) / max(1.0, learned)
    documents = [number for batch in batches for number in batch.documents]
    history = judge(history, step + 1, mean_loss, grad_norm, documents, config.train, world)
    if history.in_a_row == 0:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, grad_norm, history


def resume(config: SftConfig, model: PreTrainedModel, optimizer: Optimizer, world: World) -> tuple[int, History]:
    """Load the newest whole checkpoint if there is one; returns the number of steps that are done, and their history."""
    folder = store.newest(config.work_dir)
    if folder is None:
        return 0, History()
    facts = store.facts(folder)
    tensors = state.collect(model, optimizer, world)
    if world.rank >= facts["world_size"]:  # a rank that did not exist then starts its own random stream
        tensors = state.without_random_streams(tensors)
    store.load(folder, tensors)
    state.restore(model, optimizer, world, tensors)
    say(world.rank, f"resumed from {folder.name}")
    return facts["step"], History.of_checkpoint(facts)


def save_checkpoint(config: SftConfig, model: PreTrainedModel, optimizer: Optimizer, world: World, step: int, history: History) -> None:
    """Publish `checkpoints/step-N` and drop all but the newest few."""
    folder: Path = config.work_dir / "checkpoints" / f"step-{step}"
    store.save(folder, state.collect(model, optimizer, world), {"step": step, "history": asdict(history)}, world)
    if world.rank == 0:
        store.keep_newest(config.work_dir, KEEP_CHECKPOINTS)
        say(world.rank, f"saved checkpoint {folder.name}")
