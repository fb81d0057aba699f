"""Files of questions with choices and of plain texts, read strictly: .jsonl, .csv and the other kinds of file that training reads."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xtuner_core.data.formats import openai
from xtuner_core.data.inputs import parts_of, rows
from xtuner_core.data.jsonl import Rejected
from xtuner_core.errors import DataError

LETTERS = string.ascii_uppercase
WHOLE = 1 << 62
"""A part as large as any file."""

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with choices, one of which is right."""

    question: str
    chat: bool
    """It is a user's message (column `question`); otherwise a text that the choices continue (column `text`)."""
    choices: Mapping[str, str]
    """Letter → text, from A on."""
    answer: str
    """The right one's letter."""
    place: str
    """Its file and row, for messages."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A text of which the likelihood is measured."""

    row: Mapping[str, Any]
    """`{"text": ...}`, or `{"messages": [...]}`, whose assistant turns are measured."""
    question: str
    """What comes before, for people: the last message before the answer."""
    text: str
    """The last answer, or the plain text."""
    place: str


def read_choices(path: Path) -> list[ChoiceQuestion]:
    """Every question of the file: columns `question` (or `text`), `A`, `B`, ... and `answer`, the right letter.

    Raises:
        DataError: unreadable, empty, or a bad row (names file, row and reason).
    """
    return _read(path, _choice_question)


def read_measured(path: Path) -> list[Measured]:
    """Every conversation or plain text of the file.

    Raises:
        DataError: as `read_choices`.
    """
    return _read(path, _measured)


def _read(path: Path, parse: Callable[[Any, str], Parsed]) -> list[Parsed]:
    found = []
    for place, value in values(path):
        try:
            found.append(parse(value, place))
        except Rejected as reason:
            raise DataError(f"{place}: {reason}. Correct or remove it.") from None
    if not found:
        raise DataError(f"{path}: holds no sample; write one a line.")
    return found


def values(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of a file stands (`file:line`), and what it holds.

    Raises:
        DataError: the file or one of its rows is unreadable.
    """
    try:
        for part in parts_of(path, WHOLE):
            for row in rows(part):
                place = f"{path}:{row.number + (path.suffix == '.csv')}"  # a table's first line is its header
                if row.reason is not None:
                    raise DataError(f"{place}: {row.reason}. Correct or remove it.")
                if not row.blank:
                    yield place, row.value
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path in the recipe or suite.") from None


def _choice_question(value: Any, place: str) -> ChoiceQuestion:
    if not isinstance(value, dict):
        raise Rejected("is not an object with question, A, B, ... and answer")
    asked = [name for name in ("question", "text") if value.get(name)]
    if len(asked) != 1:
        raise Rejected("needs either a question (asked as the user's message) or a text (that the choices continue)")
    choices = {letter: value[letter] for letter in LETTERS if value.get(letter) not in (None, "")}
    if len(choices) < 2 or list(choices) != list(LETTERS[: len(choices)]):
        raise Rejected(f"needs the choices A, B and so on without a gap, found {', '.join(choices) or 'none'}")
    answer = value.get("answer")
    if not isinstance(answer, str) or answer not in choices:
        raise Rejected(f"answer {answer!r} is not one of the choices {', '.join(choices)}")
    texts = [value[asked[0]], *choices.values()]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise Rejected("question and choices must be text that is not blank")
    if len(set(choices.values())) < len(choices):
        raise Rejected("two choices are the same")
    return ChoiceQuestion(texts[0], asked[0] == "question", choices, answer, place)


def _measured(value: Any, place: str) -> Measured:
    if isinstance(value, dict) and isinstance(value.get("text"), str) and "messages" not in value:
        return Measured({"text": value["text"]}, "", value["text"], place)
    turns = openai.parse(value).messages
    last = max(index for index, turn in enumerate(turns) if turn.loss)
    asked = turns[last - 1].content if last else ""
    return Measured(value if isinstance(value, dict) else {"messages": value}, asked, turns[last].content, place)
