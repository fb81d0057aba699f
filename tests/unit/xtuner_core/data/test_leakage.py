"""Held-out questions in the training documents: found wherever they stand, and only where they stand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.leakage import WORDS, Leak, Question, find_leaks
from xtuner_core.data.ngrams import Block
from xtuner_core.data.render import find_template
from xtuner_core.data.tokenize import ChatTokenizer, encode, load_tokenizer

VOCABULARY = [f"{first}{second}" for first in ("ka", "lo", "mi", "tu") for second in ("ra", "sen", "vik", "po", "été", "你好")]


@pytest.fixture(scope="module", params=["smollm2_folder", "tiny_model_folder"])
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    """One that cuts words into tokens, one of bytes."""
    folder: Path = request.getfixturevalue(request.param)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_model_folder: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_model_folder)


def trained_on(tokenizer: ChatTokenizer, *texts: str, answer: str = "Yes.") -> Block:
    """Conversations with these questions, as the template renders them."""
    render = find_template("chatml").render
    asked = [(Message("system", "Be brief."), Message("user", text)) for text in texts]
    said = [Conversation((*messages, Message("assistant", answer, loss=True))) for messages in asked]
    ids = [document.ids for document in encode(tokenizer, [list(render(one)) for one in said])]
    return Block(np.concatenate([np.empty(0, np.uint32), *ids]), np.cumsum([0, *map(len, ids)]))


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


def test_a_whole_question_is_found_in_whatever_it_stands(tokenizer: ChatTokenizer) -> None:
    question = "Which of the two keys opens the shed?"
    training = trained_on(tokenizer, "Hello?", question, f"Tell me: {question} And why?", "Which of the two")
    assert find_leaks([training], [Question(question)], tokenizer) == [Leak(0, 1, True, question)]


@pytest.mark.parametrize(
    "near", ["which of the two keys opens the shed?", "Which of the two keys opens the sheds", "Which of the keys opens the shed"]
)
def test_what_stands_there_otherwise_is_not_found(tokenizer: ChatTokenizer, near: str) -> None:
    assert find_leaks([trained_on(tokenizer, near)], [Question("Which of the two keys opens the shed")], tokenizer) == []


def test_the_end_of_a_word_belongs_to_it(tokenizer: ChatTokenizer) -> None:
    question = "What is 12 + 3"
    assert find_leaks([trained_on(tokenizer, "What is 12 + 34")], [Question(question)], tokenizer) == []
    assert len(find_leaks([trained_on(tokenizer, "What is 12 + 3")], [Question(question)], tokenizer)) == 1


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none(tokenizer: ChatTokenizer) -> None:
    shared = words(WORDS, seed=1).split()
    question = f"{words(9, seed=2)} {' '.join(shared)} {words(9, seed=3)}"
    for count, expected in ((WORDS, 1), (WORDS - 1, 0)):
        training = trained_on(tokenizer, words(20, seed=4), f"{words(5, seed=5)} {' '.join(shared[:count])} {words(5, seed=6)}")
        found = find_leaks([training], [Question("Where is it now?"), Question(question)], tokenizer)
        assert [(leak.question, leak.document, leak.whole, leak.text) for leak in found] == [(1, 1, False, " ".join(shared))][:expected]


def test_a_long_answer_counts_and_a_short_one_does_not(tokenizer: ChatTokenizer) -> None:
    for length, expected in ((WORDS, 1), (WORDS - 1, 0)):
        answer = words(length, seed=7)
        training = trained_on(tokenizer, "Something else entirely?", answer=answer)
        assert len(find_leaks([training], [Question("Is it so, then?", answer)], tokenizer)) == expected


def test_a_phrase_of_many_documents_is_no_leak_but_a_whole_question_is(byte_tokenizer: ChatTokenizer) -> None:
    phrase = words(WORDS, seed=8)
    texts = [f"{phrase} {words(4, seed=index)}" for index in range(60)]
    training = trained_on(byte_tokenizer, *texts)
    assert find_leaks([training], [Question(f"{phrase} and nothing more of it")], byte_tokenizer) == []
    assert find_leaks([training], [Question(texts[7])], byte_tokenizer) == [Leak(0, 7, True, texts[7])]
    assert len(find_leaks([trained_on(byte_tokenizer, *texts[:10])], [Question(f"{phrase} and nothing")], byte_tokenizer)) == 1


def test_questions_with_one_text_are_all_told(byte_tokenizer: ChatTokenizer) -> None:
    questions = [Question("Is this one here?"), Question("Is that one here?"), Question("Is this one here?")]
    found = find_leaks([trained_on(byte_tokenizer, "Is this one here?")], questions, byte_tokenizer)
    assert [leak.question for leak in found] == [0, 2]


def test_very_short_questions_and_no_questions_are_not_looked_for(byte_tokenizer: ChatTokenizer) -> None:
    training = trained_on(byte_tokenizer, "Hello!", "")
    assert find_leaks([training], [Question("Hello!"), Question("")], byte_tokenizer) == []
    assert find_leaks([training], [], byte_tokenizer) == []
    assert find_leaks([], [Question("Is this one here?")], byte_tokenizer) == []


@settings(max_examples=40)
@given(data=st.data())
def test_leaks_are_what_a_search_in_the_text_finds(data: st.DataObject, byte_tokenizer: ChatTokenizer) -> None:
    some = st.lists(st.sampled_from(VOCABULARY[:4]), min_size=1, max_size=9).map(" ".join)
    texts, asked = data.draw(st.lists(some, min_size=1, max_size=6)), data.draw(st.lists(some, min_size=1, max_size=4))
    leaks = find_leaks([trained_on(byte_tokenizer, *texts)], list(map(Question, asked)), byte_tokenizer)
    expected = {}
    for index, question in enumerate(asked):
        places = [number for number, text in enumerate(texts) if f" {question} " in f" {text} "]
        if places and len(question) >= 8:
            expected[index] = places[0]
    assert {leak.question: leak.document for leak in leaks} == expected
