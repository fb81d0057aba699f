"""Which packs a step trains on: a pure function of (data, seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from xtuner_core.data.dataset import PackedDataset

MEGABATCH = 50
"""Steps whose packs are sorted by cost together: more would be more even, and leave less to chance."""


def steps_of(packs: int, epochs: int, global_batch_size: int) -> int:
    """Optimizer steps of so many epochs; the last one is filled from the beginning of one epoch more."""
    return -(-packs * epochs // global_batch_size)


def packs_of_step(dataset: PackedDataset, step: int, global_batch_size: int, seed: int) -> list[int]:
    """Packs that step `step` (from 0) trains on, over all ranks: the stream of epochs, each in its own random order.

    With `order: length_grouped` in the data's description, packs of similar cost meet in a step.
    """
    positions = range(step * global_batch_size, (step + 1) * global_batch_size)
    places = (divmod(position, len(dataset)) for position in positions)
    return [int(_epoch_order(dataset, epoch, global_batch_size, seed)[place]) for epoch, place in places]


def steps_of_packs(dataset: PackedDataset, packs: Sequence[int], steps: int, global_batch_size: int, seed: int) -> list[int]:
    """`packs_of_step` read the other way: which of the first `steps` steps (from 0) train on one of these packs."""
    found: set[int] = set()
    for epoch in range(-(-steps * global_batch_size // len(dataset))):
        places = np.flatnonzero(np.isin(_epoch_order(dataset, epoch, global_batch_size, seed), packs))
        found.update(((epoch * len(dataset) + places) // global_batch_size).tolist())
    return sorted(step for step in found if step < steps)


@lru_cache(maxsize=2)
def _epoch_order(dataset: PackedDataset, epoch: int, global_batch_size: int, seed: int) -> np.ndarray:
    """All packs in the order of an epoch; kept for the next step, as a large permutation takes milliseconds."""
    order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
    if dataset.description.get("order") != "length_grouped":
        return order
    return grouped(
        order, dataset.costs, -epoch * len(order) % global_batch_size, global_batch_size, np.random.default_rng([seed, epoch, 1])
    )


def grouped(order: np.ndarray, costs: np.ndarray, head: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """The packs of `order`, rearranged so that those of one step cost about the same; the steps stand in random order.

    The first `head` packs complete the step that the epoch before began; steps of `size` packs follow, and the last may be begun only.
    As in XTuner and transformers, a window of steps is sorted at a time.
    """
    whole = max(0, len(order) - head) // size * size
    body = order[head : head + whole].copy()
    for start in range(0, whole, MEGABATCH * size):
        window = body[start : start + MEGABATCH * size]
        window[:] = window[np.argsort(costs[window], kind="stable")]
    steps = generator.permutation(body.reshape(-1, size), axis=0)
    return np.concatenate([order[:head], steps.ravel(), order[head + whole :]])
