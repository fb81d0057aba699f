"""Packing: every token once, never over capacity, as full as the algorithm can make it; what the report says of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core import registry
from xtuner_core.data import packing
from xtuner_core.data.pack import Packs, costs, efficiency, imbalance, report, tokens
from xtuner_core.data.packing import best_fit, hard, none, soft

CAPACITY = 64
some_lengths = st.lists(st.integers(1, CAPACITY), max_size=80)
# Few different lengths: long runs of equal packs, which move together.
many_alike = st.lists(st.sampled_from([1, 2, 3, 7, 20, 21, 30, 33, 64]), max_size=200)


def members(packs: Packs) -> list[list[int]]:
    """Document numbers of each pack."""
    return [part[:, 0].tolist() for part in np.split(packs.slices, packs.offsets[1:-1])] if len(packs) else []


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing straight from its definition; of packs with equal room, the one that came to it last."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, pack), in the order in which packs came to their room
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [entry for entry in rooms if entry[0] >= lengths[index]]
        if fitting:
            best = min(room for room, _ in fitting)
            room, pack = next(entry for entry in reversed(rooms) if entry[0] == best)
            rooms.remove((room, pack))
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        rooms.append((room - lengths[index], pack))
    return packs


def first_fit(lengths: list[int], capacity: int) -> int:
    """Packs that first-fit in the given order needs."""
    rooms: list[int] = []
    for length in lengths:
        place = next((index for index, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(capacity - length)
        else:
            rooms[place] -= length
    return len(rooms)


def lognormal(documents: int, capacity: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(5.9, 0.9, documents), 1, capacity).astype(np.int64)  # mean about 545


@given(some_lengths | many_alike)
@settings(max_examples=500)
def test_best_fit_makes_the_packs_of_the_sequential_algorithm(lengths: list[int]) -> None:
    assert members(best_fit.pack(np.array(lengths, int), CAPACITY, 0)) == one_by_one(lengths, CAPACITY)


def test_best_fit_with_more_packs_and_longer_documents_than_16_bits() -> None:
    lengths = np.random.default_rng(1).integers(1, 100_000, 20_000)
    found = best_fit.pack(lengths, 100_000, 0)
    assert np.array_equal(np.sort(found.slices[:, 0]), np.arange(20_000)) and tokens(found).max() <= 100_000
    one_each = best_fit.pack(np.full(70_000, 5), 5, 0)
    assert members(one_each) == [[number] for number in range(70_000)]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_never_needs_more_packs_than_first_fit(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 257, size=400)
    assert len(best_fit.pack(lengths, 256, 0)) <= first_fit(lengths.tolist(), 256)


@pytest.mark.parametrize(("documents", "capacity"), [(200_000, 4096), (1_000_000, 8192)])
def test_best_fit_fills_999_of_1000_slots(documents: int, capacity: int) -> None:
    lengths = lognormal(documents, capacity)
    packs = best_fit.pack(lengths, capacity, 0)
    assert efficiency(packs, capacity) >= 0.999
    assert np.array_equal(np.sort(packs.slices[:, 0]), np.arange(documents))
    assert np.array_equal(packs.slices[:, 2], lengths[packs.slices[:, 0]]) and not packs.slices[:, 1].any()
    assert tokens(packs).max() <= capacity


@pytest.mark.parametrize("name", registry.names(packing))
@given(lengths=st.lists(st.integers(0, CAPACITY), max_size=80), capacity=st.integers(CAPACITY, 100), seed=st.integers(0, 9))
@settings(max_examples=100)
def test_every_way_packs_every_token_once(name: str, lengths: list[int], capacity: int, seed: int) -> None:
    pack = registry.find(packing, name).pack
    packs = pack(np.array(lengths, int), capacity, seed)
    assert sorted((doc, token) for doc, first, end in packs.slices.tolist() for token in range(first, end)) == [
        (doc, token) for doc, length in enumerate(lengths) for token in range(length)
    ]
    assert (packs.slices.dtype, packs.offsets.dtype, packs.offsets[0], packs.offsets[-1]) == (np.int64, np.int64, 0, len(packs.slices))
    assert (
        tokens(packs).max(initial=0) <= capacity and (np.diff(packs.offsets) > 0).all() and (packs.slices[:, 2] > packs.slices[:, 1]).all()
    )
    again = pack(np.array(lengths, int), capacity, seed)
    assert np.array_equal(packs.slices, again.slices) and np.array_equal(packs.offsets, again.offsets)


def test_soft_fills_the_hole_with_the_longest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(soft._packs([6, 5, 3, 1, 4], 10)) == [[0, 4], [1, 2, 3]]
    monkeypatch.setattr(soft, "AHEAD", 2)
    assert list(soft._packs([6, 5, 3, 1, 4], 10)) == [[0, 2], [1, 3, 4]]


def test_soft_is_fuller_than_taking_the_next() -> None:
    lengths = lognormal(20_000, 4096)
    assert 0.97 <= efficiency(soft.pack(lengths, 4096, 0), 4096) < efficiency(best_fit.pack(lengths, 4096, 0), 4096)


def test_hard_cuts_documents_where_a_pack_is_full() -> None:
    packs = hard.pack(np.array([25]), 10, 0)
    assert packs.slices.tolist() == [[0, 0, 10], [0, 10, 20], [0, 20, 25]] and packs.offsets.tolist() == [0, 1, 2, 3]
    many = hard.pack(np.array([3, 0, 9, 8]), 10, 3)
    assert tokens(many).tolist() == [10, 10]
    assert members(hard.pack(np.array([3, 9, 8] * 50), 10, 1)) != members(hard.pack(np.array([3, 9, 8] * 50), 10, 2))


def test_none_packs_each_document_alone() -> None:
    assert none.pack(np.array([3, 0, 8]), 8, 0).slices.tolist() == [[0, 0, 3], [2, 0, 8]]


@pytest.mark.parametrize("name", sorted(set(registry.names(packing)) - {"hard"}))
def test_a_document_longer_than_a_pack_is_refused(name: str) -> None:
    pack = registry.find(packing, name).pack
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack holds 8"):
        pack(np.array([8, 9]), 8, 0)
    assert sorted(members(pack(np.array([8, 8]), 8, 0))) == [[0], [1]]


def test_report() -> None:
    packs = best_fit.pack(np.array([8, 4, 2, 2, 5]), 8, 0)
    assert members(packs) == [[0], [4, 2], [1, 3]]
    assert tokens(packs).tolist() == [8, 7, 6] and costs(packs).tolist() == [64, 29, 20]
    assert report(packs, 8) == {"packs": 3, "packed_tokens": 21, "pack_efficiency": 0.875, "pack_cost_mean": 37.7, "pack_cost_max": 64}
    empty = best_fit.pack(np.array([], int), 8, 0)
    assert (len(empty), efficiency(empty, 8), costs(empty).tolist()) == (0, 0.0, [])
    assert report(empty, 8)["pack_cost_max"] == 0


def test_imbalance_is_what_the_slowest_costs_beyond_the_mean() -> None:
    assert imbalance(np.array([4, 4, 7, 7, 99]), 2) == 0.0  # the last is no whole group
    assert imbalance(np.array([3, 1, 2, 2]), 2) == pytest.approx(0.25)
    assert imbalance(np.array([1]), 2) == 0.0
