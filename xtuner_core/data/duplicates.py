"""Which documents are there twice, to the token or nearly: over memory-mapped ids, in bounded memory, with every finding verified.

Near duplicates are found by MinHash over shingles of five tokens: one permutation (Li, Owen & Zhang, "One Permutation Hashing", 2012),
empty bins filled from others (Shrivastava, "Optimal Densification for Fast and Accurate Minwise Hashing", arXiv:1703.04664), and bands
of rows (Indyk & Motwani 1998). A pair counts only if the Jaccard similarity of its shingles, computed in full, is at least SIMILAR.
Memory: some 80 bytes a document, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtuner_core.data.ngrams import Block, Shard, all_window_hashes, blocks, cuts, gather, mixed, prefix_sums, window_hashes

SHINGLE = 5
SIMILAR = 0.8
LEAST_SHINGLES = 16
"""Documents with fewer are compared as a whole only."""
COMMON = 0.05
"""Shingles in more documents than this share are the template, the system prompt, a set phrase: they say nothing of a copy."""

_BANDS, _ROWS = 16, 6
"""A pair at Jaccard 0.8 is seen with probability 1 - (1 - 0.8⁶)¹⁶ = 99.2 %, one at 0.9 with 1 - 10⁻⁵, one at 0.3 with 1.2 %."""
_BINS = _BANDS * _ROWS
_EMPTY = np.uint32(0xFFFFFFFF)
_SHINGLE_BITS = np.uint64(52)
"""So that a number below 4096 and a shingle fit one uint64."""
_TOGETHER = 4096
_SAMPLE = 2048
_VERIFIED_TOKENS = 2**21
VERIFIED_AT_MOST = 2**26
"""Tokens compared in full before the search for near duplicates ends: data full of half-copies must not take hours."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Pairs (earlier, later) of document numbers over all shards, int64 `[pairs, 2]`; every later document appears once in them."""

    exact: np.ndarray
    """The later one has the same ids as the earlier, which is the first of its kind."""
    near: np.ndarray
    """Neither is an exact copy of an earlier one."""
    similarity: np.ndarray
    """Jaccard similarity of each near pair, float64 `[pairs]`."""
    complete: bool = True
    """False if VERIFIED_AT_MOST ended the search: there may be more near pairs."""


def find_duplicates(shards: Sequence[Shard]) -> Duplicates:
    """Exact and near duplicates among the documents of all shards; the same shards always give the same answer."""
    exact = _exact(shards)
    distinct = np.ones(sum(len(shard.offsets) - 1 for shard in shards), bool)
    distinct[exact[:, 1]] = False
    return Duplicates(exact, *_near(shards, distinct))


def _exact(shards: Sequence[Shard]) -> np.ndarray:
    found = [window_hashes(prefix_sums(block.ids), block.offsets[:-1], block.offsets[1:]) for block in blocks(shards)]
    hashes = np.concatenate(found or [np.empty(0, np.uint64)])
    order = np.argsort(hashes, kind="stable")
    pairs = np.stack(_with_first(hashes[order]), axis=1)
    pairs = order[pairs]
    same = [_equal(shards, pairs[start:end]) for start, end in _pair_cuts(shards, pairs)]
    pairs = pairs[np.concatenate(same or [np.empty(0, bool)])]
    return pairs[np.argsort(pairs[:, 1])]


def _with_first(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (first of its run, member) of every later member of a run of equal sorted keys."""
    repeats = np.concatenate([[False], keys[1:] == keys[:-1]]) if len(keys) else np.empty(0, bool)
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(keys))))
    return first[repeats], np.flatnonzero(repeats)


def _equal(shards: Sequence[Shard], pairs: np.ndarray) -> np.ndarray:
    """Whether the two documents of each pair have the same ids."""
    left, right = gather(shards, pairs[:, 0]), gather(shards, pairs[:, 1])
    same = left.lengths == right.lengths
    if not same.all():
        left, right = gather(shards, pairs[same, 0]), gather(shards, pairs[same, 1])
    differing = np.searchsorted(left.offsets, np.flatnonzero(left.ids != right.ids), "right") - 1
    same[np.flatnonzero(same)[differing]] = False
    return same


def _pair_cuts(shards: Sequence[Shard], pairs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of pairs that are verified together."""
    costs = np.maximum(_lengths(shards)[pairs].sum(axis=1), 2 * _VERIFIED_TOKENS // _TOGETHER + 1)
    return cuts(np.concatenate([[0], np.cumsum(costs)]), 2 * _VERIFIED_TOKENS)


def _lengths(shards: Sequence[Shard]) -> np.ndarray:
    return np.concatenate([np.diff(shard.offsets) for shard in shards] or [np.empty(0, np.int64)])


def _near(shards: Sequence[Shard], distinct: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    common = common_shingles(shards, distinct)
    numbers, bands = _all_bands(shards, distinct, common)
    partner, similarity = np.full(len(distinct), -1), np.zeros(len(distinct))
    lengths = _lengths(shards)
    refused, verified, complete = np.empty(0, np.uint64), 0, True
    for band in bands.T:
        pairs = numbers[_candidates(band)]
        pairs = pairs[partner[pairs[:, 1]] < 0]
        keys = np.setdiff1d(pairs[:, 0].astype(np.uint64) << np.uint64(32) | pairs[:, 1].astype(np.uint64), refused)
        pairs = np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)
        costs = np.cumsum(lengths[pairs].sum(axis=1))
        affordable = int(np.searchsorted(costs, VERIFIED_AT_MOST - verified, "right"))
        verified += int(costs[affordable - 1]) if affordable else 0
        complete, pairs, keys = affordable == len(pairs), pairs[:affordable], keys[:affordable]
        measured = [jaccard(shards, pairs[start:end], common) for start, end in _pair_cuts(shards, pairs)]
        score = np.concatenate(measured or [np.empty(0)])
        refused = np.union1d(refused, keys[score < SIMILAR])
        pairs, score = pairs[score >= SIMILAR], score[score >= SIMILAR]
        partner[pairs[:, 1]], similarity[pairs[:, 1]] = pairs[:, 0], score
        if not complete:
            break
    later = np.flatnonzero(partner >= 0)
    return np.stack([partner[later], later], axis=1), similarity[later], complete


def _all_bands(shards: Sequence[Shard], distinct: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents that are long enough, and their band hashes, uint32 `[documents, bands]`."""
    numbers, bands = [np.empty(0, np.int64)], [np.empty((0, _BANDS), np.uint32)]
    for block in blocks(shards):
        shingles, owner = _shingles(block, common)
        enough = np.bincount(owner, minlength=len(block.lengths)) >= LEAST_SHINGLES
        enough &= distinct[block.first : block.first + len(enough)]
        numbers.append(block.first + np.flatnonzero(enough))
        bands.append(_bands(_densified(_signatures(shingles, owner, len(enough))[enough])))
    return np.concatenate(numbers), np.concatenate(bands)


def _shingles(block: Block, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash (52 bits) and document within the block of every shingle that is not common."""
    counts = np.maximum(block.lengths - SHINGLE + 1, 0)
    inside = np.ones(max(len(block.ids) - SHINGLE + 1, 0), bool)
    for back in range(1, SHINGLE):  # windows that run over a document's end
        over = np.maximum(block.offsets[1:] - back, block.offsets[:-1])
        inside[over[over < len(inside)]] = False
    hashes = all_window_hashes(prefix_sums(block.ids), SHINGLE)[inside] >> (np.uint64(64) - _SHINGLE_BITS)
    owner = np.repeat(np.arange(len(counts)), counts)
    if not len(common):
        return hashes, owner
    kept = ~_is_in(hashes, common)
    return hashes[kept], owner[kept]


def _is_in(hashes: np.ndarray, some: np.ndarray) -> np.ndarray:
    """np.isin for few `some`: a table of their last bits answers for nearly all."""
    mask = np.uint64(2**20 - 1)
    table = np.zeros(2**20, bool)
    table[some & mask] = True
    found = table[hashes & mask]
    found[found] = np.isin(hashes[found], some)
    return found


def common_shingles(shards: Sequence[Shard], distinct: np.ndarray) -> np.ndarray:
    """Shingles in more than COMMON of the distinct documents (of a sample spread over them), and in more than three."""
    numbers = np.flatnonzero(distinct)
    numbers = numbers[:: -(-len(numbers) // _SAMPLE) or 1]
    shingles = np.unique(_keys(gather(shards, numbers), np.empty(0, np.uint64))) & (np.uint64(1) << _SHINGLE_BITS) - np.uint64(1)
    values, counts = np.unique(shingles, return_counts=True)
    return values[counts > max(3, COMMON * len(numbers))]


def _keys(block: Block, common: np.ndarray) -> np.ndarray:
    """Document (below 4096) and shingle as one number each."""
    shingles, owner = _shingles(block, common)
    return owner.astype(np.uint64) << _SHINGLE_BITS | shingles


def _signatures(shingles: np.ndarray, owner: np.ndarray, documents: int) -> np.ndarray:
    """Least value in each bin, uint32 `[documents, bins]`."""
    bins = (shingles * np.uint64(_BINS) >> _SHINGLE_BITS).astype(np.int64)
    least = np.full(documents * _BINS, _EMPTY)
    np.minimum.at(least, owner * _BINS + bins, shingles.astype(np.uint32))
    return least.reshape(documents, _BINS)


def _densified(signatures: np.ndarray) -> np.ndarray:
    """Every empty bin takes the value of the first full one in a random walk that is the same for all documents."""
    least, random = signatures.ravel(), np.random.default_rng(0)
    full, empty = least.copy(), np.flatnonzero(least == _EMPTY)
    column = empty % _BINS
    while len(empty):
        step = random.integers(_BINS, size=_BINS) - np.arange(_BINS)
        found = least.take(empty + step.take(column))
        full[empty] = found
        still = np.flatnonzero(found == _EMPTY)
        empty, column = empty.take(still), column.take(still)
    return full.reshape(-1, _BINS)


def _bands(signatures: np.ndarray) -> np.ndarray:
    weights = np.random.default_rng(1).integers(2**63, size=_ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    sums = (signatures.reshape(-1, _BANDS, _ROWS) * weights).sum(axis=2, dtype=np.uint64)
    return (mixed(sums) >> np.uint64(32)).astype(np.uint32)


def _candidates(band: np.ndarray) -> np.ndarray:
    """Pairs of rows with one hash: each with the first of its kind and with the one before it."""
    keys = np.sort(band.astype(np.uint64) << np.uint64(32) | np.arange(len(band), dtype=np.uint64))
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    first, later = _with_first(keys >> np.uint64(32))
    earlier = np.concatenate([first, later - 1])
    return np.stack([order[earlier], order[np.concatenate([later, later])]], axis=1)


def jaccard(shards: Sequence[Shard], pairs: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Shared shingles over all shingles of each pair of documents, float64 `[pairs]`; at most 4096 pairs."""
    left, right = (np.unique(_keys(gather(shards, numbers), common)) for numbers in pairs.T)
    sizes = [np.bincount((keys >> _SHINGLE_BITS).astype(np.int64), minlength=len(pairs)) for keys in (left, right)]
    shared = np.intersect1d(left, right, assume_unique=True)
    both = np.bincount((shared >> _SHINGLE_BITS).astype(np.int64), minlength=len(pairs))
    return both / np.maximum(sizes[0] + sizes[1] - both, 1)
