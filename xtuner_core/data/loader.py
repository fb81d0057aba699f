"""From packs on disk to the tensors of a step, read ahead while the step before it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from xtuner_core.data.dataset import PackedDataset, Piece
from xtuner_core.data.order import packs_of_step

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack. Labels are shifted already: `labels[0, t]` is the token after position t, or IGNORE.

    What all documents of the pack begin with (a system prompt, a turn's header) stands once at the head of the row, `shared` tokens;
    the rest of each document follows, as far as it predicts anything learned. Under causal attention the hidden states of a common
    beginning are the same in every document, and later tokens change nothing before them: loss and gradient are those of the whole
    documents, for less work.

    input_ids, labels, position_ids: `[1, tokens]`; positions are those within the document.
    boundaries: where each document's own part starts, and the end, `[documents + 1]` int32; stays on the host.
    text_tokens: tokens of the whole documents; lengths: of each of them.
    places: where a label is, `[learned]`; found on the host by `pin` or `to`, so that nothing waits for the device to count.
    weights: what each label counts, `[1, tokens]` fp32; all alike if there are none.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    documents: tuple[int, ...]
    shared: int
    text_tokens: int
    lengths: tuple[int, ...] = ()
    places: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device; from pinned memory they are copied while the host goes on."""
        return self._placed()._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies by itself."""
        return self._placed()._each(torch.Tensor.pin_memory)

    def _placed(self) -> Batch:
        return self if self.places is not None else replace(self, places=(self.labels[0] != IGNORE).nonzero()[:, 0])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: getattr(self, name) for name in ("input_ids", "labels", "position_ids", "places", "weights")}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})

    @property
    def learned(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def weight(self) -> float:
        """What all labels count together."""
        return self.learned if self.weights is None else float(self.weights.double().sum())


def make_batch(dataset: PackedDataset, pack: int) -> Batch:
    """Read a pack, and lay its documents end to end behind their common beginning."""
    return lay(dataset.pieces(pack))


def lay(pieces: Sequence[Piece]) -> Batch:
    """One row of documents."""
    lengths = [needed(piece) for piece in pieces]
    shared = shared_beginning(pieces)
    bounds = list(accumulate((length - shared for length in lengths), initial=shared))
    labels = np.full(bounds[-1], IGNORE, np.int64)
    for piece, bound in zip(pieces, bounds, strict=False):
        target = bound - shared - 1  # what position t should say is token t + 1
        for first, end in piece.spans:
            first = first or 1  # nothing comes before token 0
            labels[target + first : target + end] = piece.ids[first:end]
    places = np.arange(max(lengths))
    return Batch(
        input_ids=_behind(shared, [piece.ids[:length] for piece, length in zip(pieces, lengths, strict=True)]),
        labels=torch.from_numpy(labels).unsqueeze(0),
        position_ids=_behind(shared, [places[:length] for length in lengths]),
        boundaries=torch.from_numpy(np.array(bounds, np.int32)),
        longest=max(lengths),
        documents=tuple(piece.number for piece in pieces),
        shared=shared,
        text_tokens=sum(len(piece.ids) for piece in pieces),
        lengths=tuple(len(piece.ids) for piece in pieces),
    )


def needed(piece: Piece) -> int:
    """How many of its tokens the loss depends on: all before the last learned one."""
    return max(1, piece.spans[-1][1] - 1) if piece.spans else len(piece.ids)


def shared_beginning(pieces: Sequence[Piece]) -> int:
    """How many tokens all documents begin with, before anything is learned; each document keeps a token of its own."""
    if len(pieces) < 2:
        return 0
    unlearned = min(piece.spans[0][0] if piece.spans else len(piece.ids) for piece in pieces)
    # The last shared position predicts each document's first own token, so that token must not be learned either.
    length = max(0, unlearned - 1)
    beginnings = [piece.ids[:length].tobytes() for piece in pieces]
    # What the smallest and the largest of some strings have in common at the beginning, all have.
    least, greatest = (np.frombuffer(beginning, np.uint32) for beginning in (min(beginnings), max(beginnings)))
    different = np.flatnonzero(least != greatest)
    return int(different[0]) if len(different) else length


def _behind(shared: int, values: Sequence[np.ndarray]) -> torch.Tensor:
    row = np.concatenate([values[0][:shared], *(value[shared:] for value in values)], dtype=np.int64)
    return torch.from_numpy(row).unsqueeze(0)


def load_step(dataset: PackedDataset, step: int, global_batch_size: int, seed: int, rank: int, world: int) -> list[Batch]:
    """This rank's batches of a step, `global_batch_size / world` of them."""
    packs = packs_of_step(dataset, step, global_batch_size, seed)
    return [make_batch(dataset, pack) for pack in packs[rank::world]]


Load = Callable[[int], list[Batch]]
"""Step (from 0) → its batches."""


@contextmanager
def read_ahead(load: Load, steps: range, ahead: int, device: torch.device) -> Iterator[Iterator[list[Batch]]]:
    """The batches of `steps` in order, up to `ahead` steps read in a thread of its own before they are asked for; 0 means no thread.

    What a step gets is `load(step)` in any case, pinned where there is a GPU. An error of the thread comes up at the step that it
    concerns; the thread ends with the context, and what it has not begun by then is dropped.
    """
    if ahead == 0:
        yield map(load, steps)
        return
    with ThreadPoolExecutor(1, "read ahead") as thread:
        try:
            yield _in_order(thread, _pinned(load, device) if device.type == "cuda" else load, steps, ahead)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def _in_order(thread: ThreadPoolExecutor, load: Load, steps: range, ahead: int) -> Iterator[list[Batch]]:
    pending = deque(thread.submit(load, step) for step in steps[:ahead])
    for following in range(ahead, ahead + len(steps)):
        batches = pending.popleft().result()
        pending.extend(thread.submit(load, step) for step in steps[following : following + 1])
        yield batches


def _pinned(load: Load, device: torch.device) -> Load:
    def pinned(step: int) -> list[Batch]:
        with torch.cuda.device(device):  # each thread has a current device of its own
            return [batch.pin() for batch in load(step)]

    return pinned
