"""tokenizer.model becomes a tokenizer.json that cuts text as SentencePiece does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece_model import NORMAL, PIECES, sentencepiece_model
from tokenizers import Tokenizer

from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.sentencepiece import tokenizer_json

WORDS = ["bc", "ab", "▁a", "a", "b", "c", "▁"]
VOCABULARY = [*PIECES, *((word, -float(rank), NORMAL) for rank, word in enumerate(WORDS))]


def read(content: bytes, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(content)
    return Tokenizer.from_str(json.dumps(tokenizer_json(folder / "tokenizer.model")))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("abc", ["a", "bc"]),  # bc has a better score than ab
        ("ab", ["ab"]),
        (" a", ["▁a"]),
        ("  ab", ["▁", "▁", "ab"]),
        ("aé", ["a", "<0xC3>", "<0xA9>"]),
        ("</s>a", ["</s>", "a"]),
    ],
)
def test_the_best_score_is_merged_first(text: str, tokens: list[str], tmp_path: Path) -> None:
    assert read(sentencepiece_model(VOCABULARY), tmp_path).encode(text).tokens == tokens


def test_ids_are_places_and_text_comes_back(tmp_path: Path) -> None:
    tokenizer = read(sentencepiece_model(VOCABULARY), tmp_path)
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "<0x00>", "bc", "▁")] == [0, 1, 3, 259, 265]
    for text in ("abc  cab é😀\n", " a b "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_blank_before_the_text(tmp_path: Path) -> None:
    tokenizer = read(sentencepiece_model(VOCABULARY, prefix=1), tmp_path)
    assert tokenizer.encode("a").tokens == ["▁a"] and tokenizer.decode(tokenizer.encode("a b").ids) == "a b"


@pytest.mark.parametrize("other", [{"kind": 1}, {"with_bytes": 0}, {"blanks": 1}])
def test_other_models_are_refused(other: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.model: only BPE with bytes and without normalization"):
        read(sentencepiece_model(VOCABULARY, **other), tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>", sentencepiece_model(VOCABULARY)[:-30], sentencepiece_model(VOCABULARY)[:500]])
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.model: not a whole SentencePiece model"):
        read(content, tmp_path)
