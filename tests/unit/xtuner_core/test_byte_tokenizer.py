"""The byte tokenizer, through AutoTokenizer as everyone reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xtuner_core.data.byte_tokenizer import CONTROLS, write_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_its_bytes_and_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(CONTROLS) | st.text(max_size=5)))
def test_text_with_control_tokens_comes_back(tokenizer: PreTrainedTokenizerFast, parts: list[str]) -> None:
    assert tokenizer.decode(tokenizer("".join(parts))["input_ids"]) == "".join(parts)


def test_control_tokens_follow_the_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(CONTROLS)) == [256, 257, 258, 259, 260]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258, 261)


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
    assert ids == [259, *b"user\nhi", 260, *b"\n", 259, *b"assistant\n"]


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_byte_tokenizer(folder)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
