"""Text meets tokens, in this one place.

The text between two control tokens is encoded as one piece by a tokenizer that knows no control tokens; control tokens enter as ids.
So the ids equal the model's own chat template, and no content can forge a turn.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from xtuner_core.data.fast_tokenizer import Encoder, fast_encoder, reference_encoder
from xtuner_core.data.pieces import Piece, Text
from xtuner_core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A model's tokenizer, split into plain text encoding and the ids of its control tokens."""

    plain: Tokenizer
    encoder: Encoder
    """The same as `plain`, for many texts at once: a faster library where it passes the self-check."""
    control: dict[str, int]
    is_special: np.ndarray
    """`[vocabulary]` bool: the ids that plain text must never become."""
    eos: str | None
    """The token that ends a text."""
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids `[tokens]` uint32, and `loss` `[tokens]` bool: which of them the model learns to write."""

    ids: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Several documents end to end: `ids` uint32 and `loss` bool `[tokens]`, `lengths` int64 `[documents]`."""

    ids: np.ndarray
    loss: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Tokenized:
        """The documents end to end."""
        return cls(
            np.concatenate([np.empty(0, np.uint32), *(document.ids for document in documents)]),
            np.concatenate([np.empty(0, bool), *(document.loss for document in documents)]),
            np.array([len(document.ids) for document in documents], dtype=np.int64),
        )

    def documents(self) -> Iterator[Document]:
        """One after the other, as views."""
        for end, length in zip(np.cumsum(self.lengths).tolist(), self.lengths.tolist(), strict=True):
            yield Document(self.ids[end - length : end], self.loss[end - length : end])


def load_tokenizer(model_dir: Path, fast: bool = False) -> ChatTokenizer:
    """Read `tokenizer.json` of a Hugging Face folder; `fast`: some seconds to start, then many times faster, where that is safe.

    Raises:
        RecipeError: the file is missing or not a tokenizer.
    """
    path = model_dir / "tokenizer.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = _vocabulary(tree["model"])
        words = _words(tree["added_tokens"], vocabulary)
        control = {entry["content"]: entry["id"] for entry in tree["added_tokens"] if entry["content"] not in words}
        # Without control tokens no text can become one; without a post-processor nothing is added, and offsets stay exact.
        kept = {"model": _without_merges_to(control, tree["model"]), "added_tokens": list(words.values())}
        text = json.dumps({**tree, **kept, "post_processor": None, "truncation": None, "padding": None})
        plain = Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise RecipeError(f"{path}: not a tokenizer ({error}). The base model's folder needs a fast tokenizer (tokenizer.json).") from None
    vocab_size = plain.get_vocab_size(with_added_tokens=True) + len(control.keys() - vocabulary)
    special = np.zeros(max([vocab_size, *(number + 1 for number in control.values())]), dtype=bool)
    special[[entry["id"] for entry in tree["added_tokens"] if entry["special"]]] = True
    encoder = (fast_encoder(text, plain) if fast else None) or reference_encoder(plain)
    return ChatTokenizer(plain, encoder, control, special, _eos(model_dir, control), vocab_size)


def _vocabulary(model: dict[str, Any]) -> Collection[str]:
    """The words of the model, without added tokens."""
    return model["vocab"] if isinstance(model["vocab"], dict) else {word for word, _ in model["vocab"]}


def _words(added: list[dict[str, Any]], vocabulary: Collection[str]) -> dict[str, dict[str, Any]]:
    """The added tokens that are ordinary words of the vocabulary too: Gemma's line breaks, runs of blanks and HTML tags.

    SentencePiece calls them user-defined symbols. Text may become them; what is special or stands outside the vocabulary it may not.
    """
    return {entry["content"]: entry for entry in added if not entry["special"] and entry["content"] in vocabulary}


def _without_merges_to(control: dict[str, int], model: dict[str, Any]) -> dict[str, Any]:
    """The model without the merges that spell a control token: InternLM2's vocabulary can build `<s>` out of `<s` and `>`."""
    if "merges" not in model:
        return model
    merges = [pair for pair in model["merges"] if (pair.replace(" ", "") if isinstance(pair, str) else "".join(pair)) not in control]
    return {**model, "merges": merges}


def _eos(model_dir: Path, control: dict[str, int]) -> str | None:
    try:
        token = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if token in control else None


def encode(tokenizer: ChatTokenizer, rendered: Sequence[Sequence[Piece]]) -> list[Document]:
    """`encode_batch`, one document at a time."""
    return list(encode_batch(tokenizer, rendered).documents())


def encode_batch(tokenizer: ChatTokenizer, rendered: Sequence[Sequence[Piece]]) -> Tokenized:
    """Token ids and loss masks of rendered conversations. A token carries loss if any of its characters does.

    Raises:
        RecipeError: the template names a control token that the tokenizer does not have, or plain text became a control token.
    """
    segments = _segments(tokenizer.control, rendered)
    run_ids, run_lengths = tokenizer.encoder(segments.texts)
    if tokenizer.is_special[run_ids].any():  # a model whose own vocabulary has them as words, as Unigram may
        raise RecipeError("this tokenizer turns plain text into control tokens, so content could forge a turn; choose another model.base.")
    controls = np.array(segments.controls, dtype=np.int64)
    is_run = controls < 0
    lengths = np.ones(len(controls), dtype=np.int64)
    lengths[is_run] = run_lengths
    in_run = np.repeat(is_run, lengths)
    ids = np.empty(len(in_run), dtype=np.uint32)
    ids[in_run] = run_ids
    ids[~in_run] = controls[~is_run]
    loss = np.repeat(np.array(segments.loss, dtype=bool), lengths)
    starts = np.cumsum(lengths) - lengths
    headed = {number for numbers in segments.headed.values() for number in numbers}
    unclear = [number for number in segments.partly if number not in headed]
    for header, numbers in segments.headed.items():
        unclear.extend(_unlearn(tokenizer, header, np.array(numbers), starts, ids, loss))
    for number in unclear:
        loss[starts[number] : starts[number] + lengths[number]] = _by_offsets(tokenizer, segments.partly[number])
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *segments.counts])]
    return Tokenized(ids, loss, np.diff(ends))


@dataclass(frozen=True, slots=True)
class _Segments:
    """A batch as a sequence of control tokens and runs of plain text (neighbouring texts as one string).

    `controls` has the id of each control token and -1 for a run, `loss` whether a segment is learned, `counts` the number of segments
    of each document. `partly` are the runs of which some texts may not be learned, by segment; `headed` those of them that are a header
    and something learned, by the header's text.
    """

    texts: list[str] = field(default_factory=list)
    controls: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    partly: dict[int, list[Piece]] = field(default_factory=dict)
    headed: dict[str, list[int]] = field(default_factory=dict)


def _segments(control: dict[str, int], rendered: Sequence[Sequence[Piece]]) -> _Segments:
    segments = _Segments()
    controls, loss = segments.controls, segments.loss
    for pieces in rendered:
        before = len(controls)
        run: list[Piece] = []
        for piece in pieces:
            if piece.__class__ is Text:
                if piece[0]:
                    run.append(piece)
                continue
            if run:
                _close(segments, run)
                run = []
            try:
                controls.append(control[piece[0]])
            except KeyError:
                raise _lacks(piece[0]) from None
            loss.append(piece[1])
        if run:
            _close(segments, run)
        segments.counts.append(len(controls) - before)
    return segments


def _close(segments: _Segments, run: list[Piece]) -> None:
    if len(run) == 1:
        text, learned = run[0]
    elif len(run) == 2:  # a header and a content, the usual case
        (header, first), (content, second) = run
        text, learned = header + content, first or second
        if second and not first:
            segments.headed.setdefault(header, []).append(len(segments.controls))
    else:
        text, learned = "".join([piece[0] for piece in run]), any(piece[1] for piece in run)
    if learned and len(run) > 1:
        segments.partly[len(segments.controls)] = run
    segments.texts.append(text)
    segments.controls.append(-1)
    segments.loss.append(learned)


def _unlearn(
    tokenizer: ChatTokenizer, header: str, segments: np.ndarray, starts: np.ndarray, ids: np.ndarray, loss: np.ndarray
) -> np.ndarray:
    """Take the loss from the header's tokens, where they are the first of the segment; returns the segments where they are not.

    If the ids begin with those of the header alone, a token ends where the header ends. Otherwise (an answer that begins with a line
    break may melt into the header's) only offsets tell.
    """
    own = np.array(tokenizer.plain.encode(header, add_special_tokens=False).ids, dtype=np.uint32)
    places = np.minimum(starts[segments][:, None] + np.arange(len(own)), len(ids) - 1)
    apart = (ids[places] == own).all(axis=1)
    loss[places[apart]] = False
    return segments[~apart]


def _by_offsets(tokenizer: ChatTokenizer, run: list[Piece]) -> np.ndarray:
    """Loss of each token `[tokens]` of a run."""
    ends = np.cumsum([len(piece[0]) for piece in run])
    spans = [(end - len(piece[0]), end) for piece, end in zip(run, ends, strict=True) if piece[1]]
    encoding = tokenizer.plain.encode("".join(piece[0] for piece in run), add_special_tokens=False)
    return np.array([any(end > left and start < right for left, right in spans) for start, end in encoding.offsets], dtype=bool)


def _lacks(token: str) -> RecipeError:
    return RecipeError(f"the chat template needs the token {token!r}, which this tokenizer lacks; set model.template to another one.")
