"""A tokenizer without training: one id a byte, so any text round-trips and small models need no large vocabulary.

It is an ordinary `tokenizer.json` (byte-level BPE without merges) that AutoTokenizer and servers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xtuner_core.data.templates.chatml import JINJA
from xtuner_core.durable import write_bytes, write_json

BYTES = 256
CONTROLS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
"""Control tokens, in the order of their ids, from 256 on."""


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (Radford et al., GPT-2, 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


def write_byte_tokenizer(folder: Path, turns: Sequence[str] = CONTROLS[3:], jinja: str | None = JINJA) -> None:
    """Write tokenizer.json, tokenizer_config.json and, of a template that has one, chat_template.jinja: ChatML's if nothing is said.

    `turns` are the control tokens of the template, with ids behind those of beginning, end and padding.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*CONTROLS[:3], *turns)])
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    if jinja is not None:
        write_bytes(folder / "chat_template.jinja", jinja.encode())
    bos, eos, pad, *_ = CONTROLS
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
