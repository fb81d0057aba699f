"""Documents over max_length: what each policy makes of them, and that none loses all its loss in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.templates import chatml
from xtuner_core.data.tokenize import ChatTokenizer, Document, encode, load_tokenizer
from xtuner_core.data.truncate import Dropped, chunks, fit


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_model_folder)


def talk(*answers: str) -> Conversation:
    return Conversation(tuple(message for text in answers for message in (Message("user", "?"), Message("assistant", text, loss=True))))


def fitted(tokenizer: ChatTokenizer, conversation: Conversation, policy: str, limit: int) -> Document:
    def encoded(one: Conversation) -> Document:
        return encode(tokenizer, [list(chatml.render(one))])[0]

    return fit(conversation, encoded(conversation), policy, limit, encoded)


def text_of(tokenizer: ChatTokenizer, document: Document) -> str:
    names = {number: name for name, number in tokenizer.control.items()}
    return "".join(names.get(number) or chr(number) for number in document.ids.tolist())


@pytest.mark.parametrize("policy", ["reject", "drop", "cut_turns", "cut_tokens"])
def test_what_fits_is_left_alone(tokenizer: ChatTokenizer, policy: str) -> None:
    whole = fitted(tokenizer, talk("a", "b"), policy, 1000)
    assert len(fitted(tokenizer, talk("a", "b"), policy, len(whole.ids)).ids) == len(whole.ids)


def test_reject_and_drop(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(Rejected, match=r"tokens, data\.max_length is 20; data\.too_long says"):
        fitted(tokenizer, talk("a" * 30), "reject", 20)
    with pytest.raises(Dropped):
        fitted(tokenizer, talk("a" * 30), "drop", 20)


@pytest.mark.parametrize("turns", range(1, 12))
def test_cut_turns_keeps_every_whole_turn_that_fits(tokenizer: ChatTokenizer, turns: int) -> None:
    answers = [f"answer {index}" for index in range(12)]
    kept = fitted(tokenizer, talk(*answers[:turns]), "cut_turns", 1000)
    cut = fitted(tokenizer, talk(*answers), "cut_turns", len(kept.ids))
    assert np.array_equal(cut.ids, kept.ids) and np.array_equal(cut.loss, kept.loss)
    one_less = fitted(tokenizer, talk(*answers), "cut_turns", len(kept.ids) - 1) if turns > 1 else kept
    assert text_of(tokenizer, one_less).count("answer") == max(1, turns - 1)


def test_cut_tokens_keeps_a_beginning(tokenizer: ChatTokenizer) -> None:
    whole = fitted(tokenizer, talk("a" * 300), "cut_tokens", 1000)
    cut = fitted(tokenizer, talk("a" * 300), "cut_tokens", 100)
    assert np.array_equal(cut.ids, whole.ids[:100]) and np.array_equal(cut.loss, whole.loss[:100])


@pytest.mark.parametrize("policy", ["cut_turns", "cut_tokens"])
def test_a_cut_that_leaves_nothing_to_learn_rejects(tokenizer: ChatTokenizer, policy: str) -> None:
    long_question = Conversation((Message("user", "?" * 200), Message("assistant", "a", loss=True)))
    with pytest.raises(Rejected, match=r"nothing to learn of the first 100 of its \d+ tokens"):
        fitted(tokenizer, long_question, policy, 100)


@given(st.integers(0, 200), st.integers(8, 64))
def test_every_token_of_a_text_but_the_first_is_learned_once(length: int, limit: int) -> None:
    document = Document(np.arange(length, dtype=np.uint32), np.ones(length, dtype=bool))
    pieces = list(chunks(document, limit))
    assert [number for piece in pieces for number in piece.ids[piece.loss].tolist()] == list(range(1, length))
    assert all(1 < len(piece.ids) <= limit and not piece.loss[0] for piece in pieces)
    assert document.loss.all()
