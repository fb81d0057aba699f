"""A `tokenizer.model`, written field by field as SentencePiece's sentencepiece_model.proto numbers them."""

from __future__ import annotations

import struct

UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1
PIECES = [
    ("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
]  # fmt: skip
"""What every vocabulary with bytes begins with; a token behind it has the id 259 and so on."""


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int) -> bytes:
    return field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind)


def sentencepiece_model(
    pieces: list[tuple[str, float, int]], kind: int = 2, with_bytes: int = 1, prefix: int = 0, blanks: int = 0
) -> bytes:
    """`kind` 2 is BPE; `prefix`: a blank before the text; `blanks`: several become one."""
    trainer = field(3, kind) + field(35, with_bytes)
    normalizer = field(1, b"identity") + field(3, prefix) + field(4, blanks)
    return b"".join(field(1, piece(*one)) for one in pieces) + field(2, trainer) + field(3, normalizer)
