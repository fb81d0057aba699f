"""Which format a file is in, told by its first rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from xtuner_core import registry
from xtuner_core.data import formats
from xtuner_core.data.inputs import Part, rows
from xtuner_core.errors import DataError

FIRST_ROWS = 64
_CHOOSE = "Set data.format to one of"


def detect(file: Path) -> tuple[str, str]:
    """(Name of the format, what shows it) of a file; rows that no format recognises are left for the parser to reject.

    Raises:
        DataError: no format fits, or several do.
    """
    told: dict[str, tuple[int, str]] = {}
    first: Any = None
    for number, value in islice(_values(file), FIRST_ROWS):
        first = first or (number, value)
        for name, reason in _recognised(value):
            told.setdefault(name, (number, reason))
    if len(told) == 1:
        [(name, (_, reason))] = told.items()
        return name, reason
    known = ", ".join(registry.names(formats))
    if not told:
        raise DataError(f"{file}: {_shown(first)}. {_CHOOSE} {known}, or bring the rows into the shape of one.")
    listed = "; ".join(f"{name} (row {number}: {reason})" for name, (number, reason) in told.items())
    raise DataError(f"{file}: several formats fit: {listed}. {_CHOOSE} {', '.join(told)}.")


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    return ((row.number, row.value) for row in rows(Part(file)) if not row.blank and row.reason is None)


def _recognised(value: Any) -> Iterator[tuple[str, str]]:
    for name in registry.names(formats):
        if reason := registry.find(formats, name).recognises(value):
            yield name, reason


def _shown(first: tuple[int, Any] | None) -> str:
    if first is None:
        return "no row in it can be read, so its format cannot be told"
    number, value = first
    what = f"an object with the keys {', '.join(map(str, list(value)[:12]))}" if isinstance(value, dict) else f"a {type(value).__name__}"
    return f"no format fits its first rows; row {number} is {what}"
