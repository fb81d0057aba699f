"""The fast tokenizer gives the reference's ids or is not used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from xtuner_core.data.fast_tokenizer import Encoder, checked, fast_encoder, reference_encoder
from xtuner_core.errors import DataError

FOLDERS = ["tiny_model_folder", "smollm2_folder"]


def plain(folder: Path, **changes: object) -> str:
    """A tokenizer.json without control tokens, as training data is encoded."""
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**tree, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None, **changes})


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest) -> tuple[Encoder, Encoder]:
    """The fast encoder and its reference."""
    text = plain(request.getfixturevalue(request.param))
    reference = Tokenizer.from_str(text)
    fast = fast_encoder(text, reference)
    assert fast is not None
    return fast, reference_encoder(reference)


def same(pair: tuple[Encoder, Encoder], texts: list[str]) -> bool:
    return all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(pair[0](texts), pair[1](texts), strict=True))


characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t'0aé\u0301👩\u200d")


@settings(max_examples=500)
@given(texts=st.lists(st.text(characters, max_size=60), max_size=5))
def test_equals_the_reference(pair: tuple[Encoder, Encoder], texts: list[str]) -> None:
    assert same(pair, texts)


def test_equals_the_reference_on_the_standard_library(pair: tuple[Encoder, Encoder]) -> None:
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    assert same(pair, [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n")])


def test_equals_the_reference_around_every_character(pair: tuple[Encoder, Encoder]) -> None:
    """Other Unicode tables would sort some of them under another class."""
    many_of_a_kind = (range(0x3500, 0x4D00), range(0x4F00, 0x9F00), range(0xAD00, 0xD700), range(0xD800, 0xE000), range(0x17100, 0x18700))
    letters = [chr(code) for code in range(0x20000) if not any(code in kind for kind in many_of_a_kind)]
    assert same(pair, [f"a{letter}b {letter}1{letter}{letter} .{letter}\n{letter}  {letter}'s" for letter in letters])


def test_a_text_of_bytes_without_a_token_is_left_to_the_reference(pair: tuple[Encoder, Encoder]) -> None:
    assert same(pair, ["before", *["filler"] * 100, "a\x04b", *["filler"] * 100, "after"])


def test_a_lone_surrogate_raises_as_the_reference_does(pair: tuple[Encoder, Encoder]) -> None:
    for encoder in pair:
        with pytest.raises((UnicodeEncodeError, TypeError)):
            encoder(["fine", "\ud800"])


def swapped(vocab: dict[str, int], one: str, other: str) -> dict[str, int]:
    return {**vocab, one: vocab[other], other: vocab[one]}


def test_the_plain_pattern_of_gpt2_is_the_same_in_one_piece(smollm2_folder: Path) -> None:
    byte_level = json.loads(plain(smollm2_folder))["pre_tokenizer"]["pretokenizers"][1]
    text = plain(smollm2_folder, pre_tokenizer=byte_level)
    reference = Tokenizer.from_str(text)
    fast = fast_encoder(text, reference)
    assert fast is not None
    numbers = [chr(code) for code in range(0x20000) if chr(code).isnumeric() or chr(code).isspace() or 0x11D00 < code < 0x17000]
    assert same((fast, reference_encoder(reference)), [f"a{one} {one}1{one}{one} {one}\n{one}  {one}'s 12 345  6" for one in numbers])


def digits_together(tree: dict) -> dict:
    return {**tree, "pre_tokenizer": tree["pre_tokenizer"]["pretokenizers"][1]}


def fewer_merges(tree: dict) -> dict:
    return {**tree, "model": {**tree["model"], "merges": tree["model"]["merges"][:40000]}}


def other_vocabulary(tree: dict) -> dict:
    return {**tree, "model": {**tree["model"], "vocab": swapped(tree["model"]["vocab"], "a", "Z")}}


def lower_case(tree: dict) -> dict:
    return {**tree, "normalizer": {"type": "Lowercase"}}


@pytest.mark.parametrize("change", [digits_together, fewer_merges, other_vocabulary, lower_case])
def test_the_self_check_refuses_another_tokenizer(
    change: Callable[[dict], dict], smollm2_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    text = plain(smollm2_folder)
    assert fast_encoder(json.dumps(change(json.loads(text))), Tokenizer.from_str(text)) is None
    assert "other ids for" in caplog.text


def test_a_tokenizer_that_the_library_does_not_know_is_refused(tiny_model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    text = plain(tiny_model_folder)
    assert fast_encoder(text.replace('"BPE"', '"Unheard"'), Tokenizer.from_str(text)) is None
    assert "refuses this tokenizer" in caplog.text


def test_without_the_library_there_is_none(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    caplog.set_level("INFO")
    text = plain(tiny_model_folder)
    assert fast_encoder(text, Tokenizer.from_str(text)) is None
    assert "not installed" in caplog.text


def test_a_difference_in_the_middle_of_the_work_is_found(tiny_model_folder: Path) -> None:
    reference = reference_encoder(Tokenizer.from_str(plain(tiny_model_folder)))

    def wrong_after_a_while(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = reference(texts)
        return ids + ("late" in texts), lengths

    encoder = checked(wrong_after_a_while, reference, every=10)
    for _ in range(3):
        encoder(["early"] * 7)
    with pytest.raises(DataError, match="different token ids for 'late'"):
        encoder(["late"] * 20)


def test_every_text_of_the_sample_is_compared_whatever_the_batches(tiny_model_folder: Path) -> None:
    reference = reference_encoder(Tokenizer.from_str(plain(tiny_model_folder)))
    compared: list[str] = []

    def noting(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        compared.extend(texts)
        return reference(texts)

    encoder = checked(reference, noting, every=5)
    numbers = iter(range(22))
    for size in (3, 1, 9, 0, 9):
        encoder([str(next(numbers)) for _ in range(size)])
    assert compared == ["0", "5", "10", "15", "20"]
