"""XTuner's own: `conversation` of `{"input", "output"}`, with `system` in the first turn and `output_with_loss` in any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.formats._parts import answer, conversation, text
from xtuner_core.data.jsonl import Rejected

_KEYS = {"system", "input", "output", "output_with_loss"}


def recognises(value: Any) -> str | None:
    """`conversation`, a list of objects with output."""
    turns = value.get("conversation") if isinstance(value, dict) else None
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "output" in turn for turn in turns):
        return "'conversation' with input/output"
    return None


def parse(value: Any) -> Conversation:
    """One value → one conversation; a turn without input begins with the assistant.

    Raises:
        Rejected: not a conversation, an unknown key, not text, an empty answer, or nothing to learn.
    """
    turns = value.get("conversation") if isinstance(value, dict) else None
    if not isinstance(turns, list):
        raise Rejected("not a conversation: expected an object with a list called conversation")
    if not turns:
        raise Rejected("no turns")
    return conversation(message for index, turn in enumerate(turns) for message in _turn(turn, index))


def _turn(turn: Any, index: int) -> Iterator[Message]:
    where = f"turn {index}"
    if not isinstance(turn, dict):
        raise Rejected(f"{where}: expected an object, found {type(turn).__name__}")
    if unknown := [key for key in turn.keys() - _KEYS if turn[key] is not None]:
        raise Rejected(f"{where}: unknown key {min(unknown)!r}; known: {', '.join(sorted(_KEYS))}")
    if system := turn.get("system"):
        if index:
            raise Rejected(f"{where}: system belongs to the first turn")
        yield Message("system", text(system, f"{where}: system"))
    if turn.get("input") is not None:
        yield Message("user", text(turn["input"], f"{where}: input"))
    said, learned = answer(turn.get("output"), f"{where}: output"), turn.get("output_with_loss")
    if learned is not None and not isinstance(learned, bool):
        raise Rejected(f"{where}: output_with_loss must be true or false")
    yield said if learned is not False else Message(said.role, said.content, False, said.thinking)
