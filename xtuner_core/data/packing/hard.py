"""Concatenate and cut: every pack but the last is exactly full, and documents are cut at its ends."""

from __future__ import annotations

import numpy as np

from xtuner_core.data.pack import Packs, offsets


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Documents in shuffled order as one stream, cut every `capacity` tokens.

    A piece is trained on as a document of its own: nothing before a cut is seen behind it, and its first token is not learned.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths))
    begins = offsets(lengths[order])  # of each document in the stream, and its end
    cuts = np.arange(0, begins[-1] + capacity, capacity)[: -(-begins[-1] // capacity) + 1].clip(max=begins[-1])
    edges = np.sort(np.concatenate([begins, cuts]), kind="stable")  # two sorted runs: a merge
    edges = edges[np.append(True, edges[1:] != edges[:-1])]
    place = np.searchsorted(begins, edges[:-1], side="right") - 1  # which document in the stream a slice is of
    slices = np.stack([order[place], edges[:-1] - begins[place], edges[1:] - begins[place]], axis=1)
    return Packs(slices, np.searchsorted(edges, cuts).astype(np.int64))
