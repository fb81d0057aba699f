"""JSON, strictly: one text that cannot be used says why, and nothing in it is lost in silence."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 4000
"""Python itself refuses to convert longer ones (a ValueError that is no JSONDecodeError)."""
MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Rejected(ValueError):
    """A line cannot be used; the message is the reason that goes into the report."""


def too_long(size: int) -> str:
    """Why a line of `size` bytes is rejected."""
    return f"line of {size} bytes, at most {MAX_LINE_BYTES} are read"


def parse(content: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        Rejected: too long, not UTF-8, not JSON, a duplicate key, NaN or infinity, too many digits, half a character, nested too deeply.
    """
    if len(content) > MAX_LINE_BYTES:
        raise Rejected(too_long(len(content)))
    try:
        return parse_text(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Rejected(f"not UTF-8 at byte {error.start} of the line") from None


def parse_text(text: str) -> Any:
    """Like `parse`, of text that is decoded already."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Rejected(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise Rejected(f"nested more than {MAX_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise Rejected(f"nested more than {MAX_DEPTH} levels")
    if "\\u" in text and _SURROGATE.search(text) and not _encodable(value):
        raise Rejected("holds half a character (a lone surrogate), which has no UTF-8 form")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Rejected(f"key {again!r} appears twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise Rejected(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Rejected(f"a number of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
"""Made once: a decoder costs as much as a line."""


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _depth(value: Any) -> int:
    level, deepest = [value], 0
    while level:
        deepest += 1
        level = [child for node in level if isinstance(node, (dict, list)) for child in (node.values() if isinstance(node, dict) else node)]
    return deepest
