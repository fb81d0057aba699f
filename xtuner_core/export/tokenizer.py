"""The exported tokenizer, as every server loads it: what it encodes it decodes, and its control tokens are the ids of training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xtuner_core.checkpoint.hf import eos_ids, read_generation_config
from xtuner_core.data.own_template import own_tokenizer
from xtuner_core.data.tokenize import load_tokenizer
from xtuner_core.errors import DataError
from xtuner_core.models.check import read_config, require_room

TEXTS = ("Hello, world!", "12 + 345 = 357", "  two  blanks\n\n\ttab", "é 你好 😀", "def f(x):\n    return x[0]\n")


def require_faithful(folder: Path, texts: Iterable[str]) -> None:
    """Refuse a folder whose tokenizer loses text, has other control tokens than tokenizer.json says, or whose ids have no embedding.

    Texts are compared as ids, for some tokenizers normalise what they read; one that holds unknown words is passed over.

    Raises:
        RecipeError: the tokenizer has more ids than the model has embeddings, or is none.
        DataError: it is another one than that of training; names the token or the text.
    """
    require_room(read_config(folder / "config.json"), folder)
    tokenizer: Any = own_tokenizer(folder)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for token, number in load_tokenizer(folder).control.items():
        if ids(token) != [number]:
            raise DataError(
                f"{folder}: the tokenizer turns the control token {token!r} into {ids(token)}, not into {number} as tokenizer.json says."
            )
    for text in (*TEXTS, *texts):
        once = ids(text)
        if tokenizer.unk_token_id not in once and ids(tokenizer.decode(once, clean_up_tokenization_spaces=False)) != once:
            raise DataError(f"{folder}: the tokenizer does not get the text {text[:60]!r} back from its tokens.")
    _require_ends(folder)


def _require_ends(folder: Path) -> None:
    """Every server must know where an answer ends."""
    generation, config = read_generation_config(folder), read_config(folder / "config.json")
    room = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    ends = eos_ids(generation)
    if not ends:
        raise DataError(f"{folder}: generation_config.json names no token that ends an answer (eos_token_id); set it in the base model.")
    pad = generation.get("pad_token_id")
    if room and (beyond := [number for number in (*ends, *([] if pad is None else [pad])) if not 0 <= number < room]):
        raise DataError(f"{folder / 'generation_config.json'}: the token {beyond[0]} is not one of the model's {room}.")
