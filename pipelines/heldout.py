"""Held-out conversations in OpenAI chat JSONL: what a model is asked, and what it should say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.questions import values
from xtuner_core.data.conversation import ROLES
from xtuner_core.errors import DataError


class _Unusable(ValueError):
    """Why a line is no held-out conversation; becomes the DataError's reason."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One conversation, cut before its last assistant turn."""

    messages: tuple[dict[str, str], ...]
    """What is sent: `{"role", "content"}`, at least one."""
    expected: str
    """The last assistant turn's text, as written in the file."""
    line: int
    """Its line in the file, from 1."""


def read_heldout(path: Path) -> list[HeldOut]:
    """Every conversation of the file; a line holds `{"messages": [...]}`, the bare list, or `question` and `answer`, as does a .csv file.

    Blank lines are skipped.

    Raises:
        DataError: no such file, no conversation in it, or a bad line (names file, line and reason).
    """
    found = [_of_row(value, place) for place, value in values(path)] if path.suffix == ".csv" else _of_lines(path)
    if not found:
        raise DataError(f"{path}: holds no conversation; write one JSON conversation a line.")
    return found


def _of_lines(path: Path) -> list[HeldOut]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: held-out conversations cannot be read: {error.strerror}. Check the path in the recipe.") from None
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _of_row(value: Any, place: str) -> HeldOut:
    try:
        return _cut(_messages(value), int(place.rpartition(":")[2]))
    except _Unusable as reason:
        raise DataError(f"{place}: {reason}. Correct or remove it.") from None


def _parse(line: bytes, path: Path, number: int) -> HeldOut:
    try:
        return _cut(_messages(json.loads(line.decode())), number)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        reason = f"is not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        reason = "is not a conversation (nested too deeply)"
    except ValueError as error:
        reason = str(error)
    raise DataError(f"{path}:{number}: {reason}. Correct or remove this line.")


def _messages(row: Any) -> list[dict[str, str]]:
    if isinstance(row, dict) and "messages" not in row and {"question", "answer"} <= row.keys():
        row = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    turns = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(turns, list):
        raise _Unusable('holds no list of messages; write {"messages": [{"role": ..., "content": ...}, ...]}, or question and answer')
    return [_message(turn, index) for index, turn in enumerate(turns)]


def _message(turn: Any, index: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _Unusable(f"message {index} is not an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise _Unusable(f"message {index} has role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _Unusable(f"message {index} ({role}) has no text as its content")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"message {index} ({role}) holds half a character (a lone surrogate)") from None
    return {"role": role, "content": content}


def _cut(messages: list[dict[str, str]], number: int) -> HeldOut:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise _Unusable("has no assistant turn after a question, so there is no right answer to compare with")
    return HeldOut(tuple(messages[: answers[-1]]), messages[answers[-1]]["content"], number)
