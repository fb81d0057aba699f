"""From one input file to one shard: its token ids with loss masks, and what became of every line.

A part of a file (`tokenize_part`) is done by one process; `join_parts` puts the parts of a file together. A shard folder holds

ids.bin offsets.npy loss.npy ...   the documents (`xtuner_core/data/dataset.py`)
lines.npy         int64 [documents], the line (element, row) of the file each document comes from, counted from 1
rejected.jsonl    {"line", "byte_offset", "reason"} of every line that cannot be used
samples.jsonl     the first conversations with their ids, for the check of the exported chat template
kept.jsonl        preference pairs and prompts, kept for later use
tally.json        the counts: accepted + rejected + blank + dropped = lines
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from xtuner_core import registry
from xtuner_core.data import formats
from xtuner_core.data.conversation import Conversation, Passage, Preference, Prompt
from xtuner_core.data.dataset import join_documents, write_documents
from xtuner_core.data.inputs import Part, Row, rows
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.render import find_template, renderer
from xtuner_core.data.tokenize import ChatTokenizer, Document, Tokenized, encode, encode_batch, load_tokenizer
from xtuner_core.data.truncate import Dropped, chunks, fit
from xtuner_core.durable import write_json

VERSION = 1
"""Raise it when the same file and `Encoding` would give another shard."""
KEPT_SAMPLES = 64
BATCH_ROWS = 1024
BATCH_CHARACTERS = 4 * 2**20
FAST_BYTES = 8 * 2**20
"""Size of an input file from which on starting the faster tokenizer pays."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """All that decides a shard's bytes beside its file and the model's tokenizer; the fields are those of the recipe."""

    format: str
    template: str
    loss: str
    thinking: str
    too_long: str
    max_length: int


@dataclass(slots=True)
class Tally:
    """Counts of a shard. `kept` ones (for later use) are among the accepted; documents, tokens and learned tokens are not lines."""

    lines: int = 0
    blank: int = 0
    accepted: int = 0
    rejected: int = 0
    dropped: int = 0
    kept: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Tally)))


@dataclass(slots=True)
class _Shard:
    """What is gathered beside the documents while a part is read."""

    tally: Tally = field(default_factory=Tally)
    lines: list[int] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, row: Row, reason: str) -> None:
        self.tally.rejected += 1
        self.rejected.append({"line": row.number, "byte_offset": row.offset, "reason": reason})

    def keep(self, row: Row, sample: Preference | Prompt) -> None:
        self.tally.accepted += 1
        self.tally.kept += 1
        self.kept.append({"line": row.number, "kind": type(sample).__name__.lower(), **sample.as_dict()})


def tokenize_part(part: Part, model_dir: Path, encoding: Encoding, folder: Path) -> Tally:
    """Write the new shard folder `folder` from a part of a file; memory is bounded by the batch, not by the part.

    Raises:
        DataError: the file as a whole is unreadable.
        RecipeError: the tokenizer does not fit the template.
    """
    tokenizer = _tokenizer(model_dir, (model_dir / "tokenizer.json").stat().st_mtime_ns, part.file.stat().st_size >= FAST_BYTES)
    shard = _Shard()
    with _no_garbage_collection():
        write_documents(folder, _documents(rows(part), tokenizer, model_dir, encoding, shard))
    np.save(folder / "lines.npy", np.array(shard.lines, dtype=np.int64))
    shard.rejected.sort(key=lambda entry: entry["line"])
    for name in ("rejected", "samples", "kept"):
        _write_lines(folder / f"{name}.jsonl", getattr(shard, name))
    write_json(folder / "tally.json", asdict(shard.tally))
    return shard.tally


@lru_cache(maxsize=1)
def _tokenizer(model_dir: Path, changed: int, fast: bool) -> ChatTokenizer:
    """Loaded once for all parts that a process tokenizes: starting the fast one costs as much as a part."""
    return load_tokenizer(model_dir, fast)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing here refers to itself, and the collector would walk over every waiting message again and again (a tenth of the time)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_tally(folder: Path) -> Tally:
    """The counts of a shard folder."""
    return Tally(**json.loads((folder / "tally.json").read_text(encoding="utf-8")))


def join_parts(folders: Sequence[Path], folder: Path) -> Tally:
    """Put the parts of one file together, in order, as the new shard folder `folder`."""
    join_documents(folders, folder)
    tallies = [read_tally(part) for part in folders]
    before = np.cumsum([0, *(tally.lines for tally in tallies)])[:-1]
    np.save(
        folder / "lines.npy", np.concatenate([np.load(part / "lines.npy") + start for part, start in zip(folders, before, strict=True)])
    )
    for name in ("rejected.jsonl", "kept.jsonl"):
        _write_lines(folder / name, _shifted(folders, name, before))
    with open(folder / "samples.jsonl", "wb") as joined:
        joined.writelines(islice(_lines_of(folders, "samples.jsonl"), KEPT_SAMPLES))
    whole = sum(tallies, Tally())
    write_json(folder / "tally.json", asdict(whole))
    return whole


def _lines_of(folders: Sequence[Path], name: str) -> Iterator[bytes]:
    for folder in folders:
        with open(folder / name, "rb") as stream:
            yield from stream


def _shifted(folders: Sequence[Path], name: str, before: Iterable[int]) -> Iterator[dict[str, Any]]:
    for part, start in zip(folders, before, strict=True):
        for line in _lines_of([part], name):
            entry = json.loads(line)
            yield {**entry, "line": entry["line"] + int(start)}


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


Learned = Conversation | Passage
LATER = (Preference, Prompt)
FIRST = itemgetter(0)
Pending = tuple[Row, Learned, list[Piece]]


def _documents(every: Iterable[Row], tokenizer: ChatTokenizer, model_dir: Path, encoding: Encoding, shard: _Shard) -> Iterator[Tokenized]:
    parse = registry.find(formats, encoding.format).parse
    render = _renderer(tokenizer, model_dir, encoding)
    waiting: list[Pending] = []
    characters = 0
    for row in every:
        shard.tally.lines += 1
        if row.blank:
            shard.tally.blank += 1
        elif row.reason is not None:
            shard.reject(row, row.reason)
        else:
            try:
                sample = parse(row.value)
                if isinstance(sample, LATER):
                    shard.keep(row, sample)
                    continue
                pieces = render(sample)
            except Rejected as reason:
                shard.reject(row, str(reason))
                continue
            waiting.append((row, sample, pieces))
            characters += sum(map(len, map(FIRST, pieces)))
            if len(waiting) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield _encode(waiting, tokenizer, render, encoding, shard)
                waiting, characters = [], 0
    yield _encode(waiting, tokenizer, render, encoding, shard)


Render = Callable[[Learned], list[Piece]]


def _renderer(tokenizer: ChatTokenizer, model_dir: Path, encoding: Encoding) -> Render:
    """Sample → pieces with loss."""
    chat = renderer(encoding.template, model_dir, tokenizer)
    end = Control(tokenizer.eos, loss=True) if tokenizer.eos else Control(find_template(encoding.template).STOP, loss=True)
    plain = encoding.loss == "all" and encoding.thinking == "keep"

    def render(sample: Learned) -> list[Piece]:
        if isinstance(sample, Passage):
            return [Text(sample.text, loss=True), end]
        return list(chat(sample if plain else _as_asked(sample, encoding)))

    return render


def _as_asked(conversation: Conversation, encoding: Encoding) -> Conversation:
    messages = conversation.messages
    if encoding.thinking == "drop":
        messages = tuple(message._replace(thinking=None) for message in messages)
    if encoding.loss == "last":
        last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
        messages = tuple(message._replace(loss=message.loss and index == last) for index, message in enumerate(messages))
    return Conversation(messages, conversation.tools)


def _encode(waiting: list[Pending], tokenizer: ChatTokenizer, render: Render, encoding: Encoding, shard: _Shard) -> Tokenized:
    """A batch's documents, those that are too long after the recipe's policy."""
    batch = encode_batch(tokenizer, [pieces for _, _, pieces in waiting])
    _keep_samples(shard, waiting, batch, tokenizer, encoding)
    if _all_fit(waiting, batch, encoding.max_length):
        shard.tally.accepted += len(waiting)
        shard.lines += [row.number for row, _, _ in waiting]
    else:
        batch = _fit_each(waiting, batch, tokenizer, render, encoding, shard)
    shard.tally.documents += len(batch.lengths)
    shard.tally.tokens += len(batch.ids)
    shard.tally.learned += int(batch.loss.sum())
    return batch


def _all_fit(waiting: list[Pending], batch: Tokenized, limit: int) -> bool:
    """Whether all are conversations of at most `limit` tokens with something to learn behind the first."""
    ends = np.cumsum(batch.lengths)
    learned = np.concatenate([[0], np.cumsum(batch.loss)])
    some = learned[ends] > learned[np.minimum(ends - batch.lengths + 1, ends)]
    return bool((batch.lengths <= limit).all() and some.all()) and all(isinstance(sample, Conversation) for _, sample, _ in waiting)


def _fit_each(
    waiting: list[Pending], batch: Tokenized, tokenizer: ChatTokenizer, render: Render, encoding: Encoding, shard: _Shard
) -> Tokenized:
    fitted: list[Document] = []
    for (row, sample, _), document in zip(waiting, batch.documents(), strict=True):
        try:
            made = _fitted(sample, document, tokenizer, render, encoding)
        except Rejected as reason:
            shard.reject(row, str(reason))
        except Dropped:
            shard.tally.dropped += 1
        else:
            shard.tally.accepted += 1
            shard.lines += [row.number] * len(made)
            fitted += made
    return Tokenized.of(fitted)


def _fitted(sample: Learned, document: Document, tokenizer: ChatTokenizer, render: Render, encoding: Encoding) -> list[Document]:
    if not isinstance(sample, Conversation):
        if made := list(chunks(document, encoding.max_length)):
            return made
        raise Rejected("nothing to learn: fewer than two tokens")
    return [fit(sample, document, encoding.too_long, encoding.max_length, lambda shorter: encode(tokenizer, [render(shorter)])[0])]


def _keep_samples(shard: _Shard, waiting: list[Pending], batch: Tokenized, tokenizer: ChatTokenizer, encoding: Encoding) -> None:
    """Keep whole conversations without the name of a control token in them: only there do other programs' ids equal ours."""
    names = [token for token in tokenizer.control if token.strip()]
    for (_, sample, _), document in zip(waiting, batch.documents(), strict=True):
        if len(shard.samples) >= KEPT_SAMPLES:
            return
        if isinstance(sample, Conversation) and len(document.ids) <= encoding.max_length and document.loss[1:].any():
            asked = _as_asked(sample, encoding)
            entry = {"messages": asked.as_dicts(), "tools": list(asked.tools)}
            text = json.dumps(entry, ensure_ascii=False)
            if not any(token in text for token in names):
                shard.samples.append({**entry, "ids": document.ids.tolist()})
