"""What packing makes: packs of document slices, how full they are and how evenly they cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Packs:
    """Which tokens of which documents each pack holds.

    slices: int64 `[slices, 3]`: document number, first token, end token; pack after pack.
    offsets: int64 `[packs + 1]`: pack p is `slices[offsets[p] : offsets[p + 1]]`.
    """

    slices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def whole_documents(documents: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> Packs:
    """Packs of uncut documents: their numbers pack after pack, the lengths of all documents, and the documents of each pack."""
    slices = np.zeros((len(documents), 3), np.int64)
    slices[:, 0] = documents
    slices[:, 2] = lengths[documents]
    return Packs(slices, offsets(sizes))


def offsets(sizes: np.ndarray) -> np.ndarray:
    """Where each of some neighbouring runs starts, and the end: int64 `[runs + 1]`."""
    result = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=result[1:])
    return result


def require_fitting(lengths: np.ndarray, capacity: int) -> None:
    """ValueError names the first document that is longer than a pack."""
    if len(lengths) and lengths.max() > capacity:
        index = int(np.argmax(lengths > capacity))
        raise ValueError(f"document {index} has {lengths[index]} tokens, a pack holds {capacity}")


def tokens(packs: Packs) -> np.ndarray:
    """Tokens of each pack, int64 `[packs]`."""
    return _sums(packs.slices[:, 2] - packs.slices[:, 1], packs.offsets)


def costs(packs: Packs) -> np.ndarray:
    """Σ length² over the documents of each pack, int64 `[packs]`: what attention inside documents costs."""
    return _sums((packs.slices[:, 2] - packs.slices[:, 1]) ** 2, packs.offsets)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(values)])[offsets])


def efficiency(packs: Packs, capacity: int) -> float:
    """Share of the pack slots that hold tokens."""
    return float(tokens(packs).sum()) / (len(packs) * capacity) if len(packs) else 0.0


def imbalance(costs: np.ndarray, together: int) -> float:
    """How much longer the slowest of `together` packs takes than their mean, averaged over the groups; 0 is perfect balance.

    `costs` in training order; of packs that are trained on at the same time, one a process, all wait for the costliest.
    """
    groups = costs[: len(costs) // together * together].reshape(-1, together)
    return float(np.mean(groups.max(axis=1) / groups.mean(axis=1)) - 1) if groups.size else 0.0


def report(packs: Packs, capacity: int) -> dict[str, float | int]:
    """Facts about packs for people: counts, how full, and Σ length² a pack (mean and largest)."""
    squares = costs(packs)
    return {
        "packs": len(packs),
        "packed_tokens": int(tokens(packs).sum()),
        "pack_efficiency": round(efficiency(packs, capacity), 6),
        "pack_cost_mean": round(float(squares.mean()), 1) if len(squares) else 0.0,
        "pack_cost_max": int(squares.max(initial=0)),
    }
