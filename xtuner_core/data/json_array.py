"""A .json file as rows: the elements of one array, found by their brackets, each then parsed strictly on its own.

So memory is that of one element, an element that is wrong costs only itself, and each has a byte offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from xtuner_core.data.jsonl import MARK, MAX_LINE_BYTES
from xtuner_core.data.row import Row, json_row
from xtuner_core.errors import DataError

_CHUNK = 2**18
_HOPELESS = 10_000
"""Levels after which the end of an element is no longer looked for; one of more than MAX_DEPTH is rejected anyway."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""A whole string, the quote of a string that goes on in the next chunk, or one of the characters that make the structure."""
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*$')
_CONVERSATION_KEYS = {b"messages", b"dialogs", b"conversations", b"conversation", b"prompt", b"chosen", b"rejected", b"history", b"tools"}

_WRITE = "Write [record, record, ...], or a line for each record in a .jsonl file."


@dataclass(slots=True)
class _Element:
    """One element while it is gathered: `size` counts all its bytes, `pieces` hold no more than MAX_LINE_BYTES of them."""

    offset: int
    size: int = 0
    pieces: list[bytes] = field(default_factory=list)

    def add(self, piece: bytes) -> None:
        self.pieces.append(piece[: max(0, MAX_LINE_BYTES - self.size)])
        self.size += len(piece)

    def text(self) -> bytes:
        return b"".join(self.pieces)

    def row(self, number: int) -> Row:
        content = self.text()
        return json_row(number, self.offset + len(content) - len(content.lstrip()), self.size, content)


def array_rows(stream: IO[bytes], file: Path) -> Iterator[Row]:
    """The elements of the array that the file is, or of the only array in the object that it is, such as `{"data": [...]}`.

    Raises:
        DataError: there is no such array, more than one, or the file ends in the middle.
    """
    number = depth = level = 0
    element, found, inside = None, False, False
    for base, chunk in _chunks(stream):
        places, inside = _structure(chunk, inside)
        start = 0
        for at in places:
            character = chunk[at : at + 1]
            if depth == 0:
                _check_nothing_beside(file, base + start, chunk[start:at] + (character if level or character not in b"[{" else b""))
            if character in b"[{":
                level = level or (1 if character == b"[" else 2)
                depth += 1
                if depth > _HOPELESS:
                    raise DataError(f"{file}: element {number + 1} is nested more than {_HOPELESS} levels. Take it out.")
                if depth == level and character == b"[":
                    _check_is_the_array(file, chunk[:at], found)
                    found, element, start = True, _Element(base + at + 1), at + 1
                continue
            if element and depth == level:
                element.add(chunk[start:at])
                if character == b"," or number or element.text().strip():  # between the brackets of [] stands no element
                    number += 1
                    yield element.row(number)
                element, start = (_Element(base + at + 1) if character == b"," else None), at + 1
            depth -= character != b","
            start = start if depth else at + 1
        if element:
            element.add(chunk[start:])
        elif depth == 0:
            _check_nothing_beside(file, base + start, chunk[start:])
    if depth:
        raise DataError(f"{file}: ends in the middle, after element {number}. The file is damaged or was cut short; write it again.")
    if level and not found:
        raise DataError(f"{file}: the object holds no array of records. {_WRITE}")


def _check_nothing_beside(file: Path, offset: int, text: bytes) -> None:
    if text.strip():
        raise DataError(f"{file}: {text.strip()[:20]!r} at byte {offset} stands outside the array of records. {_WRITE}")


def _check_is_the_array(file: Path, before: bytes, found: bool) -> None:
    key = _KEY.search(before[-256:])
    if key and key[1] in _CONVERSATION_KEYS:
        raise DataError(f"{file}: is one conversation, not a list of them. {_WRITE}")
    if found:
        raise DataError(f"{file}: holds several arrays, and only one can be the records. {_WRITE}")


def _structure(chunk: bytes, inside: bool) -> tuple[list[int], bool]:
    """Places of the brackets and commas outside strings; `inside` tells whether the chunk begins, and then ends, in a string."""
    start, places = 0, []
    if inside and (rest := _REST_OF_STRING.match(chunk)):
        start = rest.end() + 1
        if start > len(chunk):
            return [], True
    for token in _TOKEN.finditer(chunk, start):
        if token.end() - token.start() == 1:
            if token.group() == b'"':
                return places, True
            places.append(token.start())
    return places, False


def _chunks(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of pieces of which none ends between a backslash and the character it escapes."""
    offset, carry = 0, b""
    while read := stream.read(_CHUNK):
        chunk = carry + read
        escapes = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2
        carry = chunk[len(chunk) - escapes :]
        chunk = chunk[: len(chunk) - escapes]
        if offset == 0 and chunk.startswith(MARK):
            offset, chunk = len(MARK), chunk[len(MARK) :]
        yield offset, chunk
        offset += len(chunk)
