"""Tokenized documents and packs on disk: flat arrays, memory-mapped, no pickle.

DIR/documents/00000/ids.bin       uint32 token ids, documents end to end (one folder for each input file)
                    offsets.npy   int64 [documents + 1], in tokens
                    loss.npy      int64 [spans, 2], token ranges that carry loss
DIR/packs/documents.npy           int64 [documents], document numbers in pack order
          offsets.npy             int64 [packs + 1], into documents.npy
DIR/data.json                     template, vocabulary, counts
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xtuner_core.data.tokenize import Document
from xtuner_core.durable import write_json


def write_documents(folder: Path, documents: Sequence[Document]) -> None:
    """Write the documents of one input file."""
    folder.mkdir(parents=True)
    lengths = [len(document.ids) for document in documents]
    np.concatenate([document.ids for document in documents] or [np.empty(0, np.uint32)]).tofile(folder / "ids.bin")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    loss = np.concatenate([document.loss for document in documents] or [np.empty(0, bool)])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(np.int8), [0]])))
    np.save(folder / "loss.npy", edges.reshape(-1, 2).astype(np.int64))


def write_packs(folder: Path, packs: Sequence[Sequence[int]]) -> None:
    """Write the index of packs over documents."""
    folder.mkdir(parents=True)
    np.save(folder / "documents.npy", np.array([index for pack in packs for index in pack], dtype=np.int64))
    np.save(folder / "offsets.npy", np.cumsum([0, *(len(pack) for pack in packs)], dtype=np.int64))


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write `data.json`."""
    write_json(folder / "data.json", description)


@dataclass(frozen=True)
class Documents:
    """The documents of one input file, memory-mapped."""

    folder: Path

    @cached_property
    def ids(self) -> np.ndarray:
        path = self.folder / "ids.bin"
        return np.memmap(path, np.uint32, mode="r") if path.stat().st_size else np.empty(0, np.uint32)

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def spans(self) -> np.ndarray:
        return np.load(self.folder / "loss.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, index: int) -> Document:
        """Document `index` of this file."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        loss = np.zeros(end - start, dtype=bool)
        first, last = np.searchsorted(self.spans[:, 1], start, "right"), np.searchsorted(self.spans[:, 0], end, "left")
        for left, right in self.spans[first:last]:
            loss[max(left - start, 0) : right - start] = True
        return Document(np.asarray(self.ids[start:end]), loss)


@dataclass(frozen=True)
class PackedDataset:
    """Packs of documents; a pack is a list of documents whose lengths sum to at most the pack length."""

    folder: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.folder / "data.json").read_text(encoding="utf-8"))

    @cached_property
    def shards(self) -> list[Documents]:
        return [Documents(path) for path in sorted((self.folder / "documents").iterdir())]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    @cached_property
    def _members(self) -> tuple[np.ndarray, np.ndarray]:
        packs = self.folder / "packs"
        return np.load(packs / "documents.npy", mmap_mode="r"), np.load(packs / "offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._members[1]) - 1

    def document(self, number: int) -> Document:
        """Document by its number over all input files."""
        shard = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.shards[shard].read(number - int(self._starts[shard]))

    def members(self, pack: int) -> list[int]:
        """Document numbers of a pack."""
        documents, offsets = self._members
        return [int(number) for number in documents[offsets[pack] : offsets[pack + 1]]]
