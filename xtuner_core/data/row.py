"""One row of an input file, whatever its kind: a value, a reason why it has none, or a blank line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from xtuner_core.data.jsonl import MAX_LINE_BYTES, Rejected, parse, too_long


class Row(NamedTuple):
    """One line, element or row.

    `number` counts from 1 within its part; `offset` is in bytes of the unpacked file, -1 where rows have none (parquet, arrow).
    Unless `blank`, either `reason` says why the row cannot be used, or `value` is what it holds.
    """

    number: int
    offset: int
    value: Any = None
    reason: str | None = None
    blank: bool = False


def lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Every line, line break included, as (size in bytes, content).

    Of a line longer than MAX_LINE_BYTES only so many bytes are kept, and memory: the size is greater than the content.
    """
    while content := stream.readline(MAX_LINE_BYTES):
        size, piece = len(content), content
        while not piece.endswith(b"\n") and (piece := stream.readline(2**20)):
            size += len(piece)
        yield size, content


def json_row(number: int, offset: int, size: int, content: bytes) -> Row:
    """The row whose JSON is `content`, the beginning of `size` bytes."""
    if size > len(content):
        return Row(number, offset, reason=too_long(size))
    try:
        return Row(number, offset, parse(content))
    except Rejected as reason:
        return Row(number, offset, reason=str(reason))
