"""A byte-level BPE tokenizer as the fields of a GGUF file.

llama.cpp has its own code for how text is cut before merging, and knows it by a name. The name of a wrong one would give other tokens
without a word, so only cuts that are in the table here are written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from xtuner_core.data.own_template import own_tokenizer
from xtuner_core.errors import RecipeError

Json = dict[str, Any]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = ("ByteLevel", True)
_BYTES_ALONE = ("ByteLevel", False)
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (_GPT2,): "gpt-2",
    (("Digits", True), _GPT2): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}"), _BYTES_ALONE): "llama-bpe",
    (("Split", _WORDS % r"\p{N}"), _BYTES_ALONE): "qwen2",
}
"""How tokenizer.json cuts text → llama.cpp's name (its src/llama-vocab.cpp has the same expressions)."""
_IGNORE_MERGES = {"llama-bpe"}
"""Where a word that is itself a token is not merged from its parts; llama.cpp does so by the name, tokenizer.json says it."""


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Add tokens, merges, special ids and chat template of the folder's tokenizer; `size` is the number of embeddings.

    Raises:
        RecipeError: it is no byte-level BPE tokenizer, or one that llama.cpp has no name for that is known here.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    name = pre_tokenizer_name(tokenizer, folder)
    tokens, types = _tokens(tokenizer, size)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token |= _added(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(tokenizer: Json, folder: Path) -> str:
    """llama.cpp's name of what cuts text in tokenizer.json (RecipeError: there is none)."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise RecipeError(f"{folder}: cannot be written as GGUF: its tokenizer is no byte-level BPE with merges.")
    cuts = tuple(map(_cut, _steps(tokenizer.get("pre_tokenizer"))))
    name = PRE_TOKENIZERS.get(cuts)
    if name is None or bool(model.get("ignore_merges")) != (name in _IGNORE_MERGES) or (normalizer or {"type": "NFC"})["type"] != "NFC":
        known = ", ".join(PRE_TOKENIZERS.values())
        raise RecipeError(
            f"{folder}: cannot be written as GGUF: llama.cpp's name for how its tokenizer cuts text is not known here ({cuts}, normalizer "
            f"{normalizer}); known: {known}."
        )
    return name


def _steps(pre_tokenizer: Json | None) -> list[Json]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _cut(step: Json) -> tuple[Any, ...]:
    """What decides where a step cuts."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cuts)}:
            return "ByteLevel", cuts
        case {"type": "Digits", "individual_digits": bool(single)}:
            return "Digits", single
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return "Split", pattern
        case _:
            return tuple(sorted((key, str(value)) for key, value in step.items()))


def _tokens(tokenizer: Json, size: int) -> tuple[list[str], list[TokenType]]:
    """Every id's text and type; ids that no token has are filled up."""
    texts = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts |= {number: token["content"] for number, token in added.items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [_type(number in texts, added.get(number)) for number in range(size)]


def _type(known: bool, added: Json | None) -> TokenType:
    if added:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL if known else TokenType.UNUSED


def _added(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts its beginning and end of text around what it reads."""
    tokenizer = own_tokenizer(folder)
    ids: list[int] = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
