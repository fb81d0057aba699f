"""Where the documents of a packed row lie, and the index tensors that attention needs of it: made once a batch, not once a layer.

Legend: T packed tokens, N documents, L longest of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

KEPT = 4
"""Batches whose index tensors are kept: a layer, its recomputation and every other layer ask for the same ones."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Host-side and hashable, so no layer waits for the device to learn lengths, and torch.compile sees no numbers to specialise on.

    bounds: where each document's own part starts in the row, and the end; what lies before `bounds[0]` begins every document.
    """

    bounds: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Tokens that all documents begin with; they stand once, at the head of the row."""
        return self.bounds[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each whole document."""
        return [end - start + self.shared for start, end in pairwise(self.bounds)]


@dataclass(frozen=True, slots=True)
class Group:
    """Documents within a factor of two in length, padded to the longest.

    places: the row place of each document's tokens `[N, L]`, its last one again for padding.
    own: which of the `N * L` a document writes (its own, not padding, and the shared beginning for the row's first document only).
    rows: the row place of each of `own`.
    """

    places: torch.Tensor
    own: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Varlen:
    """The row as sequences of varying length, for kernels that take their bounds.

    The queries of the shared beginning belong to the first document. Every other document has fewer queries than keys; its queries are
    its last positions (causal mask aligned at the bottom right).

    keys: row places of all documents' keys, end to end; None if that is the row itself.
    query_bounds, key_bounds: `[N + 1]` int32. longest_query, longest_key: tokens.
    """

    keys: torch.Tensor | None
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_key: int


@lru_cache(KEPT)
def groups(documents: Documents, device: torch.device) -> tuple[Group, ...]:
    """The documents by length, each group within a factor of two."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(documents.bounds):
        by_size.setdefault((end - start + documents.shared - 1).bit_length(), []).append((start, end))
    return tuple(_group(members, documents.shared, device) for members in by_size.values())


def _group(members: list[tuple[int, int]], shared: int, device: torch.device) -> Group:
    starts = torch.tensor([start for start, _ in members])[:, None]
    lengths = torch.tensor([end - start + shared for start, end in members])[:, None]
    step = torch.arange(int(lengths.max()))[None, :]
    places = torch.where(step < shared, step, starts - shared + torch.minimum(step, lengths - 1))
    own = ((step < lengths) & ((step >= shared) | (starts == shared))).flatten().nonzero()[:, 0]
    return Group(*(tensor.to(device, non_blocking=True) for tensor in (places, own, places.flatten()[own])))


@lru_cache(KEPT)
def varlen(documents: Documents, device: torch.device) -> Varlen:
    """The documents as sequences of varying length."""
    shared, lengths = documents.shared, documents.lengths
    query_bounds = (0, *documents.bounds[1:])
    keys = None
    if shared:
        parts = [part for start, end in pairwise(documents.bounds) for part in (torch.arange(shared), torch.arange(start, end))]
        keys = torch.cat(parts).to(device, non_blocking=True)
    key_bounds = tuple(accumulate(lengths, initial=0))
    return Varlen(
        keys,
        _int32(query_bounds, device),
        _int32(key_bounds, device),
        max(end - start for start, end in pairwise(query_bounds)),
        max(lengths),
    )


def _int32(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
