"""Tokenizers that must not be exported: they lose text, or nothing says where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner_core.data.byte_tokenizer import write_byte_tokenizer
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.tokenizer import require_faithful


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 264}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260], "pad_token_id": 258}))
    return tmp_path


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_faithful_one_passes(folder: Path) -> None:
    require_faithful(folder, ["<|im_end|> is text here", "ünïcode\r\n"])


def test_one_that_normalises_what_it_reads_passes(folder: Path) -> None:
    changed(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    require_faithful(folder, ["A Text"])


def test_lost_text_is_found(folder: Path) -> None:
    changed(folder / "tokenizer.json", decoder={"type": "Replace", "pattern": {"String": "x"}, "content": "y"})
    with pytest.raises(DataError, match="does not get the text '"):
        require_faithful(folder, [])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"eos_token_id": None}, "names no token that ends an answer"),
        ({"eos_token_id": [257, 264]}, "the token 264 is not one of the model's 264"),
        ({"pad_token_id": -1}, "the token -1 is not one of the model's 264"),
    ],
)
def test_ends_that_are_no_tokens_are_found(fields: dict[str, Any], told: str, folder: Path) -> None:
    changed(folder / "generation_config.json", **fields)
    with pytest.raises(DataError, match=told):
        require_faithful(folder, [])


def test_more_tokens_than_embeddings_are_found(folder: Path) -> None:
    changed(folder / "config.json", vocab_size=260)
    with pytest.raises(RecipeError, match="the tokenizer has 261 ids"):
        require_faithful(folder, [])
