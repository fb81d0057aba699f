"""Text meets tokens, in this one place.

The text between two control tokens is encoded as one piece by a tokenizer that knows no control tokens; control tokens enter as ids.
So the ids equal the model's own chat template, and no content can forge a turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from xtuner_core.data.pieces import Control, Piece
from xtuner_core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A model's tokenizer, split into plain text encoding and the ids of its control tokens."""

    plain: Tokenizer
    control: dict[str, int]
    special: frozenset[int]
    """Ids that plain text must never become."""
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids `[tokens]` uint32, and `loss` `[tokens]` bool: which of them the model learns to write."""

    ids: np.ndarray
    loss: np.ndarray


def load_tokenizer(model_dir: Path) -> ChatTokenizer:
    """Read `tokenizer.json` of a Hugging Face folder.

    Raises:
        RecipeError: the file is missing or not a tokenizer.
    """
    path = model_dir / "tokenizer.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        whole = Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise RecipeError(f"{path}: not a tokenizer ({error}). The base model's folder needs a fast tokenizer (tokenizer.json).") from None
    control = {entry["content"]: entry["id"] for entry in tree["added_tokens"]}
    special = frozenset(entry["id"] for entry in tree["added_tokens"] if entry["special"])
    # Without added tokens no text can become a control token; without a post-processor nothing is added, and offsets stay exact.
    plain = Tokenizer.from_str(json.dumps({**tree, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}))
    return ChatTokenizer(plain, control, special, whole.get_vocab_size(with_added_tokens=True))


def encode(tokenizer: ChatTokenizer, rendered: Sequence[Sequence[Piece]]) -> list[Document]:
    """Token ids and loss masks of rendered conversations, encoded as one batch.

    Raises:
        RecipeError: the template names a control token that the tokenizer does not have.
    """
    runs = [list(_runs(pieces)) for pieces in rendered]
    texts = [run.text for document in runs for run in document if isinstance(run, _Run)]
    encodings = iter(tokenizer.plain.encode_batch(texts, add_special_tokens=False))
    return [_assemble(tokenizer, document, encodings) for document in runs]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring texts as one string; `spans` are the characters with loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


def _runs(pieces: Sequence[Piece]) -> Iterable[_Run | Control]:
    text, spans = "", []
    for piece in pieces:
        if isinstance(piece, Control):
            if text:
                yield _Run(text, tuple(spans))
            yield piece
            text, spans = "", []
        else:
            if piece.loss and piece.text:
                spans.append((len(text), len(text) + len(piece.text)))
            text += piece.text
    if text:
        yield _Run(text, tuple(spans))


def _assemble(tokenizer: ChatTokenizer, runs: list[_Run | Control], encodings: Iterable[Encoding]) -> Document:
    ids: list[int] = []
    loss: list[bool] = []
    encodings = iter(encodings)
    for run in runs:
        if isinstance(run, Control):
            ids.append(_control_id(tokenizer, run.token))
            loss.append(run.loss)
            continue
        encoding = next(encodings)
        if not tokenizer.special.isdisjoint(encoding.ids):  # a model whose own vocabulary has them as words, as Unigram may
            raise RecipeError(
                "this tokenizer turns plain text into control tokens, so content could forge a turn; choose another model.base."
            )
        ids.extend(encoding.ids)
        # A token carries loss if any of its characters does.
        loss.extend(any(end > first and start < last for first, last in run.spans) for start, end in encoding.offsets)
    return Document(np.array(ids, dtype=np.uint32), np.array(loss, dtype=bool))


def _control_id(tokenizer: ChatTokenizer, token: str) -> int:
    if token not in tokenizer.control:
        raise RecipeError(f"the chat template needs the token {token!r}, which this tokenizer lacks; set model.template to another one.")
    return tokenizer.control[token]
