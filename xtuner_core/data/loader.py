"""Which packs a step trains on: a pure function of (seed, step, rank), so a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.tokenize import Document

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack. Labels are shifted already: `labels[0, t]` is the token after position t, or IGNORE.

    What all documents of the pack begin with (a system prompt, a turn's header) stands once at the head of the row, `shared` tokens;
    the rest of each document follows, as far as it predicts anything learned. Under causal attention the hidden states of a common
    beginning are the same in every document, and later tokens change nothing before them: loss and gradient are those of the whole
    documents, for less work.

    input_ids, labels, position_ids: `[1, tokens]`; positions are those within the document.
    boundaries: where each document's own part starts, and the end, `[documents + 1]` int32.
    text_tokens: tokens of the whole documents.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    documents: tuple[int, ...]
    shared: int
    text_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "labels", "position_ids", "boundaries")}
        return replace(self, **moved)

    @property
    def learned(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())


def make_batch(dataset: PackedDataset, pack: int) -> Batch:
    """Read a pack, and lay its documents end to end behind their common beginning."""
    numbers = dataset.members(pack)
    documents = [dataset.document(number) for number in numbers]
    lengths = [needed(document) for document in documents]
    shared = shared_beginning(documents)
    return Batch(
        input_ids=_behind(shared, [document.ids[:length] for document, length in zip(documents, lengths, strict=True)]),
        labels=_behind(shared, [_shifted_labels(document)[:length] for document, length in zip(documents, lengths, strict=True)]),
        position_ids=_behind(shared, [np.arange(length) for length in lengths]),
        boundaries=torch.from_numpy(np.cumsum([shared, *(length - shared for length in lengths)], dtype=np.int32)),
        longest=max(lengths),
        documents=tuple(numbers),
        shared=shared,
        text_tokens=sum(len(document.ids) for document in documents),
    )


def needed(document: Document) -> int:
    """How many of its tokens the loss depends on: all before the last learned one."""
    learned = np.flatnonzero(document.loss)
    return max(1, int(learned[-1])) if len(learned) else len(document.ids)


def shared_beginning(documents: Sequence[Document]) -> int:
    """How many tokens all documents begin with, before anything is learned; each document keeps a token of its own."""
    if len(documents) < 2:
        return 0
    unlearned = [int(document.loss.argmax()) if document.loss.any() else len(document.ids) for document in documents]
    # The last shared position predicts each document's first own token, so that token must not be learned either.
    length = max(0, min(unlearned) - 1)
    first = documents[0].ids
    for document in documents[1:]:
        different = np.flatnonzero(document.ids[:length] != first[:length])
        length = int(different[0]) if len(different) else length
    return length


def _behind(shared: int, values: Sequence[np.ndarray]) -> torch.Tensor:
    return _row(np.concatenate([values[0][:shared], *(value[shared:] for value in values)]))


def _shifted_labels(document: Document) -> np.ndarray:
    labels = np.full(len(document.ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(document.loss[1:], document.ids[1:].astype(np.int64), IGNORE)
    return labels


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).unsqueeze(0)


def steps_of(packs: int, epochs: int, global_batch_size: int) -> int:
    """Optimizer steps of so many epochs; the last one is filled from the beginning of one epoch more."""
    return -(-packs * epochs // global_batch_size)


def packs_of_step(packs: int, step: int, global_batch_size: int, seed: int) -> list[int]:
    """Packs that step `step` (from 0) trains on, over all ranks: the stream of epochs, each in its own shuffled order."""
    positions = range(step * global_batch_size, (step + 1) * global_batch_size)
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for position in positions:
        epoch, place = divmod(position, packs)
        order = orders.setdefault(epoch, np.random.default_rng([seed, epoch]).permutation(packs))
        chosen.append(int(order[place]))
    return chosen


def load_step(dataset: PackedDataset, step: int, global_batch_size: int, seed: int, rank: int, world: int) -> list[Batch]:
    """This rank's batches of a step, `global_batch_size / world` of them."""
    packs = packs_of_step(len(dataset), step, global_batch_size, seed)
    return [make_batch(dataset, pack) for pack in packs[rank::world]]
