"""Packing: every document once, never over capacity, as full as best-fit-decreasing can make it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.data.pack import best_fit, efficiency

CAPACITY = 64


def best_fit_by_search(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each pack after best-fit-decreasing, straight from its definition."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - length)
    return sorted(rooms)


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


@given(st.lists(st.integers(1, CAPACITY), max_size=80))
@settings(max_examples=300, deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    packs = best_fit(lengths, CAPACITY)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    rooms = [CAPACITY - sum(lengths[index] for index in pack) for pack in packs]
    assert sorted(rooms) == best_fit_by_search(lengths, CAPACITY)
    assert min(rooms, default=0) >= 0
    assert packs == best_fit(list(lengths), CAPACITY)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_packs_than_first_fit_on_random_lengths(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 257, size=400).tolist()
    assert len(best_fit(lengths, 256)) <= first_fit(lengths, 256)


def test_realistic_lengths_fill_99_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, size=20_000), 1, 4096).astype(int).tolist()
    assert efficiency(lengths, best_fit(lengths, 4096), 4096) >= 0.99


def test_a_document_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack holds 8"):
        best_fit([8, 9], 8)
    assert best_fit([8, 8], 8) == [[0], [1]]
    assert best_fit([], 8) == [] and efficiency([], [], 8) == 0.0
