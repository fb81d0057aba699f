"""A SentencePiece BPE vocabulary (`tokenizer.model`) as the tokenizer.json that every reader of Hugging Face folders knows.

What becomes of it is what InternLM's own converter makes (InternLM2Converter in tokenization_internlm2_fast.py): BPE with bytes for what is
in no token, blanks as `▁`, no normalization. The file is a protocol buffer; the few fields that matter are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_core.errors import DataError, RecipeError

Json = dict[str, Any]
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BPE = 2
_BLANK = "▁"


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, its rank (higher merges first) and what it is."""

    text: str
    score: float
    kind: int


def tokenizer_json(file: Path) -> Json:
    """Read `tokenizer.model` (sentencepiece_model.proto of SentencePiece).

    Raises:
        RecipeError: it is no BPE with bytes, or normalizes text.
        DataError: it is damaged.
    """
    try:
        model = list(_fields(file.read_bytes()))
        pieces = [_piece(value) for number, value in model if number == 1]
        trainer, normalizer = (dict(_fields(value)) for wanted in (2, 3) for number, value in model if number == wanted)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{file}: not a whole SentencePiece model ({error}). Copy it again.") from None
    if trainer.get(3) != _BPE or not trainer.get(35) or normalizer.get(2) or normalizer.get(4, 1):
        raise RecipeError(f"{file}: only BPE with bytes and without normalization becomes a tokenizer.json here; bring a tokenizer.json.")
    return _json(pieces, bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a message: an integer, or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
        else:
            size, place = _varint(data, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value, place = data[place : place + size], place + size
        if place > len(data):
            raise ValueError("it ends early")
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    return Piece(fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, _NORMAL))


def _json(pieces: list[Piece], begins_with_blank: bool) -> Json:
    prefix = [{"type": "Prepend", "prepend": _BLANK}] if begins_with_blank else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if begins_with_blank else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, piece) for number, piece in enumerate(pieces) if piece.kind in (2, _CONTROL, _USER_DEFINED)],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": pieces[0].text, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)}, "merges": _merges(pieces),
        },
    }  # fmt: skip


def _added(number: int, piece: Piece) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": piece.text, "special": piece.kind != _USER_DEFINED, **plain}


def _merges(pieces: list[Piece]) -> list[list[str]]:
    """Every way in which a token can be put together from two, the token of the highest score first."""
    known = {piece.text for piece in pieces if piece.kind == _NORMAL}
    found = [
        (-piece.score, cut, [piece.text[:cut], piece.text[cut:]])
        for piece in pieces
        if piece.kind == _NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in known and piece.text[cut:] in known
    ]
    return [pair for _, _, pair in sorted(found)]
