"""Alpaca: `instruction`, `input`, `output` (Taori et al., 2023), with `system` and `history` as LLaMA-Factory has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.formats._parts import answer, conversation, text
from xtuner_core.data.jsonl import Rejected


def recognises(value: Any) -> str | None:
    """The keys instruction and output."""
    return "'instruction' and 'output'" if isinstance(value, dict) and {"instruction", "output"} <= value.keys() else None


def parse(value: Any) -> Conversation:
    """One value → one conversation: the question is the instruction, then the input on a line of its own; other keys are ignored.

    Raises:
        Rejected: a part is missing or not text, or an answer is empty.
    """
    if not isinstance(value, dict):
        raise Rejected("expected an object with instruction and output")
    return conversation([*_before(value), Message("user", question(value)), answer(value.get("output"), "output")])


def question(value: dict[str, Any]) -> str:
    """Instruction and input as one text."""
    instruction, given = text(value.get("instruction"), "instruction"), text(value.get("input") or "", "input")
    return f"{instruction}\n{given}" if instruction and given else instruction or given


def _before(value: dict[str, Any]) -> Iterator[Message]:
    if system := value.get("system"):
        yield Message("system", text(system, "system"))
    history = value.get("history") or []
    if not isinstance(history, list):
        raise Rejected(f"history must be a list, found {type(history).__name__}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected(f"history, pair {index}: expected [question, answer]")
        yield Message("user", text(pair[0], f"history, pair {index}: question"))
        yield answer(pair[1], f"history, pair {index}: answer")
