"""Memory that runs out does so before the first step, on the largest packs, and is told with what takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core.config import SftConfig
from xtuner_core.data import pack
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import Batch, make_batch
from xtuner_core.errors import RecipeError
from xtuner_core.estimate import STATE, advice, load_of
from xtuner_core.estimate import memory as estimate
from xtuner_core.metrics import clock, memory, say
from xtuner_core.models.sizes import model_of_folder
from xtuner_core.parallel.mesh import World

CANDIDATES = 16
"""Packs with most tokens of which the longest row is looked for: a row is shorter where documents share a beginning."""
RAN_OUT = ("out of memory", "can't allocate memory", "std::bad_alloc")
"""What allocators say: CUDA's, the CPU's, C++'s."""


def rehearse(model: PreTrainedModel, optimizer: Optimizer, dataset: PackedDataset, config: SftConfig, world: World) -> None:
    """Forward and backward pass of the largest packs without an update; weights, gradients and random streams are then as before.

    Memory for the optimizer's states, which come into being with the first update, is held meanwhile. Every rank takes the same packs.
    With `train.dry_run: auto` only on a GPU: on a CPU a pass takes as long as a step, and the kernel may end the process without an error.
    """
    wanted = config.train.dry_run
    if wanted == "off" or (wanted == "auto" and world.device.type == "cpu"):
        return
    started = clock()
    held = [] if optimizer.state else [_state_of(parameter, config) for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[] if world.device.type == "cpu" else [world.device]):
        for batch in largest(dataset):
            if config.train.global_batch_size == world.size:
                optimizer.zero_grad(set_to_none=True)  # a step has one pack, so no gradient is there before it
            loss = model.packed_loss(batch.to(world.device), config.train.loss_chunk)  # pyright: ignore[reportCallIssue]
            (loss / max(1, batch.learned)).backward()
    del held
    optimizer.zero_grad(set_to_none=True)
    used, _ = memory(world.device)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of odd sizes; the steps make their own
        torch.cuda.reset_peak_memory_stats(world.device)  # the log tells of steps
    say(world.rank, f"dry run of the largest packs: {used:.2f} GB at most, {clock() - started:.1f} s")


def _state_of(parameter: torch.Tensor, config: SftConfig) -> torch.Tensor:
    """Memory as large as the optimizer's state of a parameter's local part, where that part is."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.empty(int(local.numel() * STATE.get(config.train.optimizer, 8.0)), dtype=torch.uint8, device=local.device)


def largest(dataset: PackedDataset) -> list[Batch]:
    """The pack with the longest row and the one with most learned tokens; one if they are the same."""
    by_tokens = np.lexsort((dataset.costs, pack.tokens(dataset.packs)))[-CANDIDATES:].tolist()
    batches = {index: make_batch(dataset, index) for index in by_tokens}
    longest = max(batches, key=lambda index: (batches[index].input_ids.shape[1], int(dataset.costs[index])))
    most = int(np.argmax(_learned(dataset)))
    return [batches[longest], *([make_batch(dataset, most)] if most != longest else [])]


def _learned(dataset: PackedDataset) -> np.ndarray:
    """Learned tokens of each pack; a document that is cut counts whole."""
    by_document = np.concatenate([_sums(shard.spans[:, 1] - shard.spans[:, 0], shard.span_offsets) for shard in dataset.shards])
    return _sums(by_document[dataset.packs.slices[:, 0]], dataset.packs.offsets)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(values)])[offsets])


@contextmanager
def out_of_memory_told(config: SftConfig, world: World) -> Iterator[None]:
    """Turn an allocator's error, whenever it comes, into what the run needs and how to need less.

    Raises:
        RecipeError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no memory is left"
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in RAN_OUT):
            raise
        device = "cpu" if world.device.type == "cpu" else "cuda"
        raise RecipeError(
            f"out of memory on rank {world.rank}: {reason}. {_needed(config, device)}Try {'; '.join(advice(config.train, device))}."
        ) from None


def _needed(config: SftConfig, device: str) -> str:
    """What the estimate says, if it knows such a model."""
    model, packs = model_of_folder(config.model_dir), PackedDataset(config.data_dir).description
    if model is None:
        return ""
    needed = estimate(model, config.train, load_of(config.train, packs["pack_length"], packs["pack_length"], packs), device)
    return f"By estimate this run takes {needed.told()}. "
