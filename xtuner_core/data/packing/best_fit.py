"""Best-fit-decreasing: no document is cut, packs are as full as can be."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from xtuner_core.data.pack import Packs, require_fitting, whole_documents


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Longest document first, each into the pack with the least room that still takes it; `seed` is not used.

    Best-fit-decreasing (Johnson 1974; for language models: Ding et al., "Fewer Truncations", arXiv:2404.10830). Ties go to the lower
    document and to the pack that came to its room last.

    Raises:
        ValueError: a document is longer than the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    require_fitting(lengths, capacity)
    counts = np.bincount(lengths, minlength=capacity + 1)
    moves = np.array(_moves(counts, capacity), np.int64).reshape(-1, 4)
    longest_first = _stable_order(capacity - lengths)[: len(lengths) - counts[0]]
    chosen = _packs_of(moves)
    documents = longest_first[_stable_order(chosen)]
    return whole_documents(documents, lengths, np.bincount(chosen))


_Run = tuple[int, int, int]
"""Packs of equal room (top, step, count): they are numbered `top`, `top + step`, …, and filled in this order."""


def _moves(counts: np.ndarray, capacity: int) -> list[tuple[int, int, int, int]]:
    """Moves (top, step, packs, documents a pack), in which the documents, longest first, go to the packs of a run in turn.

    `counts[length]` is the number of documents of a length. Such documents are all alike, and so are packs of one room: after a pack
    took one, no room is closer to the best than what is left of its own, so it takes as many as fit, and a run of packs moves at once.
    `rooms` has bit r set when some pack has exactly r tokens of room, so the search for the best is one shift.
    """
    moves: list[tuple[int, int, int, int]] = []
    stacks: defaultdict[int, list[_Run]] = defaultdict(list)
    rooms = opened = 0
    for length in np.flatnonzero(counts[1:])[::-1] + 1:
        length, waiting = int(length), int(counts[length])
        while waiting:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                top, step, count = stacks[room].pop()
            else:
                room = capacity
                top, step, count = opened, 1, max(1, waiting // (room // length))
                opened += count
            each = min(room // length, waiting)
            packs = min(waiting // each, count)
            if packs < count:
                stacks[room].append((top + step * packs, step, count - packs))
            elif not stacks[room]:
                rooms &= ~(1 << room)
            left = room - each * length
            stacks[left].append((top + step * (packs - 1), -step, packs))  # the last that came is on top
            rooms |= 1 << left
            moves.append((top, step, packs, each))
            waiting -= packs * each
    return moves


def _packs_of(moves: np.ndarray) -> np.ndarray:
    """The pack of each document, longest first: int64 `[documents]`."""
    top, step, packs, each = moves.T
    nth = np.arange(packs.sum()) - np.repeat(np.cumsum(packs) - packs, packs)
    return np.repeat(np.repeat(top, packs) + np.repeat(step, packs) * nth, np.repeat(each, packs))


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """`argsort(keys, kind="stable")` of numbers ≥ 0, as radix sort: numpy has one for 16 bits, used from the lowest digit up."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max(initial=0)).bit_length(), 16):
        digit = (keys >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order
