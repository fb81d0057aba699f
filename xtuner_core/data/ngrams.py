"""Hashes of token windows, all of a block at once.

The hash of a window is a polynomial over its ids modulo 2⁶⁴. With the prefix sums of a block and the inverse powers of the base (odd,
so it has an inverse) the hashes of all windows of any length cost one subtraction and one product a token (Karp & Rabin, 1987).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from xtuner_core.data.dataset import Documents

BLOCK = 2**18
"""Tokens looked at together; a longer document is a block of its own."""

_BASE = 0x9E3779B97F4A7C15
_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Block:
    """Documents end to end: `ids` uint32 `[tokens]`, `offsets` int64 `[documents + 1]` into them."""

    ids: np.ndarray
    offsets: np.ndarray
    first: int = 0
    """Number of its first document over all shards."""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


Shard = Documents | Block
"""The documents of one input file, or some in memory."""


def blocks(shards: Sequence[Shard]) -> Iterator[Block]:
    """Every document of the shards, about BLOCK tokens at a time."""
    first = 0
    for shard in shards:
        offsets = np.asarray(shard.offsets)
        for start, end in cuts(offsets, BLOCK):
            ids = _read(shard, offsets[start : start + 1], offsets[end : end + 1] - offsets[start])
            yield Block(ids, offsets[start : end + 1] - offsets[start], first + start)
        first += len(offsets) - 1


def _read(shard: Shard, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ranges of tokens end to end, read and not mapped: mapped pages would count as our memory, and nearly all are looked at once only."""
    if isinstance(shard, Block):
        return shard.ids[_ranges(starts, lengths)]
    size = np.dtype(np.uint32).itemsize
    ranges = zip((starts * size).tolist(), (lengths * size).tolist(), strict=True)
    with open(shard.folder / "ids.bin", "rb", buffering=0) as file:
        return np.frombuffer(b"".join([os.pread(file.fileno(), length, start) for start, length in ranges]), np.uint32)


def cuts(offsets: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that add up to at most `size`, at least one in each; `offsets` are the sums before them."""
    start, count = 0, len(offsets) - 1
    while start < count:
        end = max(start + 1, int(np.searchsorted(offsets, offsets[start] + size, "right")) - 1)
        yield start, end
        start = end


def gather(shards: Sequence[Shard], numbers: np.ndarray) -> Block:
    """The documents with these numbers, in this order."""
    starts = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)])
    owner = np.searchsorted(starts, numbers, "right") - 1
    left, lengths = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
    for index in np.unique(owner):
        here, offsets = owner == index, np.asarray(shards[index].offsets)
        local = numbers[here] - starts[index]
        left[here], lengths[here] = offsets[local], offsets[local + 1] - offsets[local]
    target = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.empty(target[-1], np.uint32)
    for index in np.unique(owner):
        here = owner == index
        ids[_ranges(target[:-1][here], lengths[here])] = _read(shards[index], left[here], lengths[here])
    return Block(ids, target)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, …, start + length - 1 of each, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def prefix_sums(ids: np.ndarray) -> np.ndarray:
    """Sums before each position and at the end, uint64 `[tokens + 1]`, from which `window_hashes` are read."""
    values = (ids.astype(np.uint64) + np.uint64(1)) * _ODD[0]
    values ^= values >> _HALF
    values *= _ODD[1]
    values *= _powers(len(ids))[0][: len(ids)]
    sums = np.empty(len(ids) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(values, out=sums[1:])
    return sums


def window_hashes(sums: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash of ids[start:end] for each pair, wherever the window stands."""
    return mixed((sums[ends] - sums[starts]) * _powers(len(sums))[1][starts])


def all_window_hashes(sums: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the windows of this length at every position, uint64 `[tokens - length + 1]`."""
    count = max(len(sums) - length, 0)
    return mixed((sums[length:] - sums[:count]) * _powers(len(sums))[1][:count])


def mixed(hashes: np.ndarray) -> np.ndarray:
    """The same hashes with every bit dependent on every other (the finalizer of splitmix64, Steele et al. 2014)."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= _ODD[0]
    hashes ^= hashes >> np.uint64(27)
    hashes *= _ODD[1]
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    return _powers_table(max(BLOCK + 1, 1 << (size - 1).bit_length() if size else 1))


@lru_cache(maxsize=2)
def _powers_table(size: int) -> tuple[np.ndarray, np.ndarray]:
    """1, b, b², … of the base and of its inverse modulo 2⁶⁴."""
    tables = np.ones((2, size), np.uint64)
    for table, base in zip(tables, (_BASE, pow(_BASE, -1, 2**64)), strict=True):
        table[1:] = np.uint64(base)
        np.cumprod(table, out=table)
    return tables[0], tables[1]
