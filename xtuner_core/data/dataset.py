"""Tokenized documents and packs on disk: flat arrays, memory-mapped, no pickle.

DIR/documents/00000/ids.bin           uint32 token ids, documents end to end (one folder for each input file)
                    offsets.npy       int64 [documents + 1], in tokens
                    loss.npy          int64 [spans, 2], token ranges that carry loss; none reaches over a document's end
                    loss_offsets.npy  int64 [documents + 1], into loss.npy
DIR/packs/slices.npy                  int64 [slices, 3]: document number over all folders, first token, end token
          offsets.npy                 int64 [packs + 1], into slices.npy
DIR/validation/                       like packs/, of the documents that are kept back; absent if none are
DIR/data.json                         template, vocabulary, counts
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from xtuner_core.data import pack
from xtuner_core.data.npy import NpyWriter
from xtuner_core.data.pack import Packs
from xtuner_core.data.tokenize import Document, Tokenized
from xtuner_core.durable import write_json

TRAINING, VALIDATION = "packs", "validation"
COPY_BYTES = 1 << 20


class DocumentsWriter:
    """Appends documents to a new folder, holding no more than what is handed in; within `with`, which completes the files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with ExitStack() as files:
            self._ids = files.enter_context(open(folder / "ids.bin", "xb"))
            self._offsets = files.enter_context(NpyWriter(folder / "offsets.npy"))
            self._spans = files.enter_context(NpyWriter(folder / "loss.npy", row=(2,)))
            self._span_offsets = files.enter_context(NpyWriter(folder / "loss_offsets.npy"))
            self._files = files.pop_all()
        self._token = self._span = 0  # how many there are
        for index in (self._offsets, self._span_offsets):
            index.write(np.zeros(1, np.int64))

    def write(self, batch: Tokenized) -> None:
        """Append a batch of documents."""
        spans, counts = loss_spans(batch.loss, batch.lengths)
        batch.ids.astype(np.uint32, copy=False).tofile(self._ids)
        self._index(pack.offsets(batch.lengths), spans, pack.offsets(counts))

    def copy(self, folder: Path) -> None:
        """Append all documents of another folder."""
        part = Documents(folder)
        with open(folder / "ids.bin", "rb") as source:
            shutil.copyfileobj(source, self._ids, COPY_BYTES)
        self._index(part.offsets, part.spans, part.span_offsets)

    def _index(self, offsets: np.ndarray, spans: np.ndarray, span_offsets: np.ndarray) -> None:
        self._offsets.write(offsets[1:] + self._token)
        self._spans.write(spans + self._token)
        self._span_offsets.write(span_offsets[1:] + self._span)
        self._token += int(offsets[-1])
        self._span += len(spans)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)


def loss_spans(loss: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of tokens with loss `[spans, 2]`, cut where a document ends, and how many each document has `[documents]`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    changes = np.flatnonzero(loss[1:] != loss[:-1]) + 1
    first, last = starts[lengths > 0], ends[lengths > 0]  # of the documents that are not empty
    first = np.unique(np.concatenate([changes[loss[changes]], first[loss[first]]]))
    end = np.unique(np.concatenate([changes[~loss[changes]], last[loss[last - 1]]]))
    counts = np.searchsorted(first, ends) - np.searchsorted(first, starts)
    return np.stack([first, end], axis=1), counts


def write_documents(folder: Path, batches: Iterable[Tokenized]) -> None:
    """Write the documents of one input file, batch after batch."""
    with DocumentsWriter(folder) as writer:
        for batch in batches:
            writer.write(batch)


def join_documents(parts: Sequence[Path], folder: Path) -> None:
    """One folder with the documents of several, in their order."""
    with DocumentsWriter(folder) as writer:
        for part in parts:
            writer.copy(part)


def write_packs(folder: Path, packs: Packs) -> None:
    """Write the index of packs over documents."""
    folder.mkdir(parents=True)
    np.save(folder / "slices.npy", packs.slices)
    np.save(folder / "offsets.npy", packs.offsets)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write `data.json`."""
    write_json(folder / "data.json", description)


class Piece(NamedTuple):
    """A document, or what a pack has of it: `ids` uint32 `[tokens]`, a view of the file; `spans`: which of them carry loss."""

    number: int
    ids: np.ndarray
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Documents:
    """The documents of one input file, memory-mapped."""

    folder: Path

    @cached_property
    def ids(self) -> np.ndarray:
        path = self.folder / "ids.bin"
        return np.asarray(np.memmap(path, np.uint32, mode="r")) if path.stat().st_size else np.empty(0, np.uint32)

    @cached_property
    def offsets(self) -> np.ndarray:
        return _mapped(self.folder / "offsets.npy")

    @cached_property
    def spans(self) -> np.ndarray:
        return _mapped(self.folder / "loss.npy")

    @cached_property
    def span_offsets(self) -> np.ndarray:
        return _mapped(self.folder / "loss_offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def piece(self, index: int, number: int, first: int, end: int) -> Piece:
        """Tokens `first` to `end` of document `index` of this file, which is document `number` of all."""
        start = self.offsets.item(index) + first
        stop = start + end - first
        spans = self.spans[self.span_offsets.item(index) : self.span_offsets.item(index + 1)].tolist()
        if spans and (spans[0][0] < start or spans[-1][1] > stop):  # the document is cut
            spans = [(max(a, start), min(b, stop)) for a, b in spans if b > start and a < stop]
        return Piece(number, self.ids[start:stop], [(a - start, b - start) for a, b in spans])


def _mapped(path: Path) -> np.ndarray:
    """A plain array: slicing one is several times faster than slicing a memmap."""
    return np.asarray(np.load(path, mmap_mode="r"))


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """Packs of one split; the documents in a pack have at most `pack_length` tokens together."""

    folder: Path
    split: str = TRAINING

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.folder / "data.json").read_text(encoding="utf-8"))

    @cached_property
    def shards(self) -> list[Documents]:
        return [Documents(path) for path in sorted((self.folder / "documents").iterdir())]

    @cached_property
    def packs(self) -> Packs:
        return Packs(_mapped(self.folder / self.split / "slices.npy"), _mapped(self.folder / self.split / "offsets.npy"))

    @cached_property
    def costs(self) -> np.ndarray:
        return pack.costs(self.packs)

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first document of each shard."""
        return list(accumulate((len(shard) for shard in self.shards[:-1]), initial=0))

    def __len__(self) -> int:
        return len(self.packs)

    def _place(self, number: int) -> tuple[Documents, int]:
        """The input file a document is in, and its number there."""
        shard = bisect_right(self._starts, number) - 1
        return self.shards[shard], number - self._starts[shard]

    def document(self, number: int) -> Document:
        """Document by its number over all input files."""
        shard, index = self._place(number)
        piece = shard.piece(index, number, 0, shard.offsets.item(index + 1) - shard.offsets.item(index))
        loss = np.zeros(len(piece.ids), dtype=bool)
        for first, end in piece.spans:
            loss[first:end] = True
        return Document(piece.ids, loss)

    def pieces(self, index: int) -> list[Piece]:
        """What a pack holds."""
        pieces = []
        for number, first, end in self._slices(index).tolist():
            shard, local = self._place(number)
            pieces.append(shard.piece(local, number, first, end))
        return pieces

    def members(self, index: int) -> list[int]:
        """Document numbers of a pack."""
        return self._slices(index)[:, 0].tolist()

    def _slices(self, index: int) -> np.ndarray:
        return self.packs.slices[self.packs.offsets.item(index) : self.packs.offsets.item(index + 1)]
