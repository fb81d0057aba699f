"""JSON lines, strictly: every line is read, and one that cannot be used says why."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_core.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 4000
"""Python itself refuses to convert longer ones (a ValueError that is no JSONDecodeError)."""
_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Rejected(ValueError):
    """A line cannot be used; the message is the reason that goes into the report."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file. `number` counts from 1, `offset` is in bytes."""

    file: Path
    number: int
    offset: int
    content: bytes


def input_files(patterns: Iterable[str | Path]) -> list[Path]:
    """The .jsonl files that paths, folders (searched below) and globs mean, in a fixed order, each once.

    Raises:
        DataError: a pattern matches nothing.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(path.rglob("*.jsonl"))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(
                f"{pattern}: no such file, and no .jsonl matches it. Check data.train (relative to where you are, or to the project)."
            )
        files.update(dict.fromkeys(file.resolve() for file in found))
    return list(files)


def read_lines(file: Path) -> Iterator[Line]:
    """Every line, blank ones included, without its line break; a byte-order mark at the start is dropped."""
    offset = 0
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            content = raw.removeprefix(_MARK) if number == 1 else raw
            yield Line(file, number, offset, content.rstrip(b"\r\n"))
            offset += len(raw)


def parse(line: Line) -> Any:
    """The JSON value of a line.

    Raises:
        Rejected: too long, not UTF-8, not JSON, a duplicate key, NaN or infinity, too many digits, half a character, nested too deeply.
    """
    if len(line.content) > MAX_LINE_BYTES:
        raise Rejected(f"line of {len(line.content)} bytes, at most {MAX_LINE_BYTES} are read")
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"not UTF-8 at byte {error.start} of the line") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise Rejected(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise Rejected(f"nested more than {MAX_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise Rejected(f"nested more than {MAX_DEPTH} levels")
    if _SURROGATE.search(text) and not _encodable(value):
        raise Rejected("holds half a character (a lone surrogate), which has no UTF-8 form")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise Rejected(f"key {key!r} appears twice in one object")
        value[key] = item
    return value


def _no_constant(name: str) -> Any:
    raise Rejected(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Rejected(f"a number of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


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
