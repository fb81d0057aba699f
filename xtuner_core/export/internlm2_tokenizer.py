"""InternLM2's tokenizer files, so that they mean the same without the code that InternLM publishes beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner_core.durable import write_bytes, write_json
from xtuner_core.export.sentencepiece import tokenizer_json

Json = dict[str, Any]


def make_plain(folder: Path) -> None:
    """Name the general class that reads tokenizer.json, place its control tokens there, and make the file if there is tokenizer.model.

    In InternLM2's vocabulary they are `[UNUSED_TOKEN_145]` and the like; that this one is `<|im_start|>` only tokenizer_config.json says,
    and readers that go by tokenizer.json would give it a new id behind the embedding.
    """
    file, sources = folder / "tokenizer_config.json", (folder / "tokenizer.json", folder / "tokenizer.model")
    if not (file.is_file() and any(source.is_file() for source in sources)):
        return
    config = {name: value for name, value in json.loads(file.read_text(encoding="utf-8")).items() if name != "auto_map"}
    tokenizer = json.loads(sources[0].read_text(encoding="utf-8")) if sources[0].is_file() else _made(sources[1], config)
    placed = with_control_tokens(tokenizer, config.get("added_tokens_decoder", {}))
    write_bytes(sources[0], json.dumps(placed, ensure_ascii=False, indent=2).encode())
    write_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _made(model: Path, config: Json) -> Json:
    """With the beginning of text before what is read, unless the config says otherwise."""
    tokenizer, text = tokenizer_json(model), {"Sequence": {"id": "A", "type_id": 0}}
    bos = config.get("bos_token", "<s>")
    if not config.get("add_bos_token", True) or bos not in tokenizer["model"]["vocab"]:
        return tokenizer
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    known = {bos: {"id": bos, "ids": [tokenizer["model"]["vocab"][bos]], "tokens": [bos]}}
    pair = [first, text, first, {"Sequence": {"id": "B", "type_id": 0}}]
    return tokenizer | {"post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}}


def with_control_tokens(tokenizer: Json, added: Json) -> Json:
    """tokenizer.json with the tokens of `added` (id → description) at their ids, in place of what was there."""
    placed = {int(number): {"id": int(number), **token} for number, token in added.items()}
    replaced = {token for token, number in tokenizer["model"]["vocab"].items() if number in placed and token != placed[number]["content"]}
    vocab = {token: number for token, number in tokenizer["model"]["vocab"].items() if token not in replaced}
    vocab |= {token["content"]: number for number, token in placed.items() if number < len(tokenizer["model"]["vocab"])}
    merges = [pair for pair in tokenizer["model"]["merges"] if _merged(pair) not in replaced]
    before = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    tokens = [token for _, token in sorted({**before, **placed}.items())]
    return {**tokenizer, "added_tokens": tokens, "model": {**tokenizer["model"], "vocab": vocab, "merges": merges}}


def _merged(pair: str | list[str]) -> str:
    return "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)
