"""Figures about prepared documents for people: lengths, learned tokens, which split a document is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xtuner_core.data.dataset import Documents, PackedDataset

SPLITS = ("not used", "training", "validation")


def learned_tokens(shard: Documents) -> np.ndarray:
    """Tokens with loss of each document, int64 `[documents]`."""
    spans = np.asarray(shard.spans, np.int64).reshape(-1, 2)
    before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    return np.diff(before[shard.span_offsets])


def split_of(folder: Path, documents: int) -> np.ndarray:
    """Index into SPLITS of every document, int8 `[documents]`; a document is not used when a sample_ratio below 1 left it out."""
    found = np.zeros(documents, np.int8)
    for mark, split in ((1, "packs"), (2, "validation")):
        if (folder / split).is_dir():
            found[PackedDataset(folder, split).packs.slices[:, 0]] = mark
    return found


def length_bins(longest: int) -> list[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, … until the last is greater than `longest`: four half-open bins an octave."""
    edges = [1, 2, 3, 4]
    while edges[-1] <= longest:
        edges.append(edges[-1] + (1 << edges[-1].bit_length() - 3))
    return edges


def histogram(lengths: np.ndarray, edges: Sequence[int]) -> list[int]:
    """How many of the lengths are in each bin [edge, next edge)."""
    places = np.searchsorted(np.asarray(edges), lengths, "right") - 1
    return np.bincount(places[places >= 0], minlength=len(edges) - 1).tolist()
