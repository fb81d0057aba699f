"""XTuner's `expand_soft`: in random order, and the hole that is left is filled from the documents that come next."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

import numpy as np

from xtuner_core.data.pack import Packs, require_fitting, whole_documents

AHEAD = 1000
"""Documents that are looked at for a hole."""


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Documents in shuffled order until the next does not fit; then, of the next `AHEAD`, the longest that does, again and again.

    After `pack_level="soft"` of InternLM/xtuner (v1/datasets/packing.py). No document is cut.

    Raises:
        ValueError: a document is longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    require_fitting(lengths, capacity)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(lengths))
    packs = list(_packs(lengths[order].tolist(), capacity))
    places = np.array([place for members in packs for place in members], np.int64)
    return whole_documents(order[places], lengths, np.array([len(members) for members in packs], np.int64))


def _packs(lengths: list[int], capacity: int) -> Iterator[list[int]]:
    """Places in the shuffled order, pack after pack."""
    window: list[tuple[int, int]] = []  # (length, place) of documents that may fill a hole, sorted
    packed = bytearray(len(lengths) + 1)
    first = seen = 0  # the first document that is in no pack, and the first that never was in the window
    while first < len(lengths):
        members, room = [], capacity
        while first < len(lengths) and lengths[first] <= room:
            if first < seen:
                del window[bisect_left(window, (lengths[first], first))]
            members.append(first)
            room -= lengths[first]
            first = packed.index(0, first + 1)
        for place in range(max(seen, first), min(first + AHEAD, len(lengths))):
            insort(window, (lengths[place], place))
            seen = place + 1
        while window and window[0][0] <= room:
            length, place = window.pop(bisect_right(window, (room, len(lengths))) - 1)
            members.append(place)
            packed[place] = True
            room -= length
        first = packed.index(0, first)
        yield members
