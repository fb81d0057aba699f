"""A model's history: who did what with which version, a line of JSON each, only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from xtuner_core.durable import write_bytes
from xtuner_core.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a model's history."""

    at: str
    version: int
    what: Literal["registered", "promoted", "rejected", "rolled back"]
    by: str
    why: str


def succession(entries: Sequence[Entry]) -> list[int]:
    """The versions that rolling back goes through, the one in production last."""
    order: list[int] = []
    for entry in entries:
        if entry.what == "rolled back":
            del order[-1:]
        elif entry.what == "promoted":
            order.append(entry.version)
    return order


def write_line(file: Path, entry: Entry) -> None:
    """Append; a torn line before it is cut off."""
    rows = file.read_bytes() if file.exists() else b""
    if torn := len(rows.rpartition(b"\n")[2]):
        write_bytes(file, rows[:-torn])
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def written(file: Path) -> list[Entry]:
    """The lines, oldest first; a last one that was torn by a power cut is passed over.

    Raises:
        DataError: another line cannot be read.
    """
    rows = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [_entry(file, number, row) for number, row in enumerate(rows, 1)]


def _entry(file: Path, number: int, row: bytes) -> Entry:
    try:
        return Entry(**json.loads(row))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}:{number}: not a line of the history ({error}). Restore it from a backup, or mend the line.") from None
