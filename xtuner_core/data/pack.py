"""Best-fit-decreasing packing: no document is cut, packs are as full as can be."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Document indices of each pack, so that the lengths in a pack sum to at most `capacity` tokens.

    Best-fit-decreasing (Johnson 1974; for language models: Ding et al., "Fewer Truncations", arXiv:2404.10830): longest first, each
    into the pack with the least room that still takes it. `rooms` has bit r set when some pack has exactly r tokens of room, so the
    search is one shift. Deterministic: ties go to the lower index.

    Raises:
        ValueError: a document is longer than the capacity.
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"document {index} has {length} tokens, a pack holds {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            packs[pack].append(index)
        else:
            room, pack = capacity, len(packs)
            packs.append([index])
        by_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


def efficiency(lengths: Sequence[int], packs: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the pack slots that hold tokens."""
    return sum(lengths) / (len(packs) * capacity) if packs else 0.0
