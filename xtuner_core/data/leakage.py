"""Which held-out questions stand in the training documents: n-grams of 13 words as for GPT-3 (arXiv:2005.14165, appendix C).

What is looked for (a whole question, and every run of 13 words of a question or a long answer) is encoded plainly, so no template's
text takes part. One pass over the memory-mapped ids finds where eight of its tokens stand, another hash compares all of them, and the
text there is compared last: what is reported stands in the training data letter for letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Encoding

from xtuner_core.data.ngrams import Block, Shard, all_window_hashes, blocks, gather, prefix_sums, window_hashes
from xtuner_core.data.tokenize import ChatTokenizer

WORDS = 13
SHORTEST = 8
"""Characters; a shorter question says too little to be looked for."""
COMMON = 0.05
"""A run of 13 words in more than ten documents and in more than this share of them is a set phrase (GPT-3 drew the line at ten)."""

_ANCHORS = (8, 4, 2, 1)
"""Tokens by which needles are found; each needle uses the largest that it has."""
_KEPT = 8
"""Places of a needle that are kept for the comparison of the text."""
_TABLE_BITS = np.uint64(22)


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked, and the right answer."""

    text: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Leak:
    """A question that stands in a training document, as a whole or with a run of 13 words (of it, or of its answer)."""

    question: int
    document: int
    whole: bool
    text: str
    """What both have."""


@dataclass(slots=True)
class _Needle:
    """Something to look for; questions that have the same words share it."""

    ids: np.ndarray
    text: str
    whole: bool
    questions: list[int] = field(default_factory=list)
    documents: int = 0
    """In how many documents its ids stand."""
    places: list[int] = field(default_factory=list)
    """The first of them."""


def find_leaks(shards: Sequence[Shard], questions: Sequence[Question], tokenizer: ChatTokenizer) -> list[Leak]:
    """At most one leak a question, the whole question before a part of it, in the order of the questions.

    Questions of less than SHORTEST characters are not looked for.
    """
    needles = _needles(questions, tokenizer)
    _search(shards, needles)
    most = max(10, COMMON * sum(len(shard.offsets) - 1 for shard in shards))
    leaks: dict[int, Leak] = {}
    for needle in sorted(needles, key=lambda needle: not needle.whole):
        asked = [question for question in needle.questions if question not in leaks]
        if asked and (needle.whole or needle.documents <= most):
            document = _verified(shards, needle, tokenizer)
            leaks |= {question: Leak(question, document, needle.whole, needle.text) for question in asked if document is not None}
    return [leaks[question] for question in sorted(leaks)]


def _needles(questions: Sequence[Question], tokenizer: ChatTokenizer) -> list[_Needle]:
    asked = [question.text.strip() for question in questions]
    answers = [question.answer.strip() for question in questions]
    encoded = tokenizer.plain.encode_batch(asked + answers, add_special_tokens=False)
    found: dict[tuple[bool, str], _Needle] = {}
    for index, question in enumerate(asked):
        runs = [*_runs(encoded[index], question), *_runs(encoded[len(asked) + index], answers[index])]
        whole = [(np.array(encoded[index].ids, np.uint32), question)] if len(question) >= SHORTEST else []
        for is_whole, (ids, text) in [*((True, one) for one in whole), *((False, run) for run in runs)]:
            found.setdefault((is_whole, text), _Needle(_inner(ids), text, is_whole)).questions.append(index)
    return [needle for needle in found.values() if len(needle.ids)]


def _runs(encoding: Encoding, text: str) -> Iterator[tuple[np.ndarray, str]]:
    """Every run of 13 words, and the tokens that lie within it."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if len(words) < WORDS:
        return
    ids, spans = np.array(encoding.ids, np.uint32), np.array(encoding.offsets)
    for (start, _), (_, end) in zip(words, words[WORDS - 1 :], strict=False):
        yield ids[np.searchsorted(spans[:, 0], start) : np.searchsorted(spans[:, 1], end, "right")], text[start:end]


def _inner(ids: np.ndarray) -> np.ndarray:
    """Without the first token, which depends on what stands before it; a text of few tokens keeps it."""
    return ids[1:] if len(ids) > 4 else ids


def _search(shards: Sequence[Shard], needles: Sequence[_Needle]) -> None:
    """Count the documents of each needle, and keep the first places: one pass over the shards."""
    if not needles:
        return
    anchors, counts, kept = _anchors(needles), np.zeros(len(needles), np.int64), np.zeros(len(needles), np.int64)
    for block in blocks(shards):
        sums = prefix_sums(block.ids)
        for anchor in anchors:
            found, documents = _hits(block, sums, anchor)
            counts += np.bincount(found, minlength=len(needles))
            new = kept[found] + np.arange(len(found)) - np.searchsorted(found, found) < _KEPT
            kept += np.bincount(found[new], minlength=len(needles))
            for needle, document in zip(found[new], documents[new], strict=True):
                needles[needle].places.append(block.first + int(document))
    for needle, count in zip(needles, counts, strict=True):
        needle.documents = int(count)


@dataclass(frozen=True, slots=True)
class _Anchors:
    """Needles that are found by a window of `length` tokens, sorted by its hash; all arrays are `[needles]`."""

    length: int
    hashes: np.ndarray
    needles: np.ndarray
    before: np.ndarray
    """Tokens of the needle before its window."""
    sizes: np.ndarray
    whole_hashes: np.ndarray
    table: np.ndarray
    """Whether some hash has these last bits, bool `[2²²]`."""


def _anchors(needles: Sequence[_Needle]) -> list[_Anchors]:
    sizes = np.array([len(needle.ids) for needle in needles])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    sums = prefix_sums(np.concatenate([needle.ids for needle in needles]))
    whole = window_hashes(sums, starts[:-1], starts[1:])
    made, done = [], np.zeros(len(needles), bool)
    for length in _ANCHORS:
        chosen = np.flatnonzero((sizes >= length) & ~done)
        done[chosen] = True
        if len(chosen):
            made.append(_anchors_of(length, chosen, starts[chosen], sizes[chosen], all_window_hashes(sums, length), whole[chosen]))
    return made


def _anchors_of(length: int, chosen: np.ndarray, starts: np.ndarray, sizes: np.ndarray, windows: np.ndarray, whole: np.ndarray) -> _Anchors:
    """The rarest window of each needle, so that the words many questions share are nobody's anchor."""
    _, inverse, counts = np.unique(windows, return_inverse=True, return_counts=True)
    often = counts[inverse]
    before = np.array([int(often[start : start + size - length + 1].argmin()) for start, size in zip(starts, sizes, strict=True)])
    hashes = windows[starts + before]
    order = np.argsort(hashes, kind="stable")
    table = np.zeros(1 << int(_TABLE_BITS), bool)
    table[hashes >> (np.uint64(64) - _TABLE_BITS)] = True
    return _Anchors(length, hashes[order], chosen[order], before[order], sizes[order], whole[order], table)


def _hits(block: Block, sums: np.ndarray, anchors: _Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Needle and document within the block of every needle whose hash stands in it, each pair once."""
    windows = all_window_hashes(sums, anchors.length)
    at = np.flatnonzero(anchors.table[windows >> (np.uint64(64) - _TABLE_BITS)])
    left, right = (np.searchsorted(anchors.hashes, windows[at], side) for side in ("left", "right"))
    count = right - left
    entry = np.arange(count.sum()) + np.repeat(left - np.cumsum(count) + count, count)
    start = np.repeat(at, count) - anchors.before[entry]
    end = start + anchors.sizes[entry]
    document = np.searchsorted(block.offsets, start, "right") - 1
    inside = (start >= 0) & (end <= block.offsets[np.clip(document + 1, 0, len(block.offsets) - 1)])
    entry, start, end, document = entry[inside], start[inside], end[inside], document[inside]
    same = window_hashes(sums, start, end) == anchors.whole_hashes[entry]
    pairs = np.unique(np.stack([anchors.needles[entry[same]], document[same]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _verified(shards: Sequence[Shard], needle: _Needle, tokenizer: ChatTokenizer) -> int | None:
    """The first document whose text holds the needle's text, as whole words."""
    pattern = re.compile(r"(?<!\w)" + re.escape(needle.text) + r"(?!\w)")
    control = np.array(sorted(tokenizer.control.values()), np.uint32)
    for document in needle.places:
        ids = gather(shards, np.array([document])).ids
        texts = np.split(ids, np.flatnonzero(np.isin(ids, control)))  # each but the first begins with a control token
        if any(pattern.search(tokenizer.plain.decode(text[~np.isin(text, control)].tolist())) for text in texts):
            return document
    return None
