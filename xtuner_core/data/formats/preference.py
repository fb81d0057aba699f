"""Preference pairs: `prompt`, `chosen`, `rejected` as texts or messages; without a prompt it is what both answers begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtuner_core.data.conversation import Message, Preference
from xtuner_core.data.formats import alpaca, openai, sharegpt
from xtuner_core.data.formats._parts import answer, text
from xtuner_core.data.jsonl import Rejected


def recognises(value: Any) -> str | None:
    """The keys chosen and rejected."""
    return "'chosen' and 'rejected'" if isinstance(value, dict) and {"chosen", "rejected"} <= value.keys() else None


def parse(value: Any) -> Preference:
    """One value → one pair; the prompt may also stand under conversations, messages or instruction.

    Raises:
        Rejected: a part is missing or malformed, the answers are equal, or do not end with the assistant.
    """
    if not isinstance(value, dict):
        raise Rejected("expected an object with chosen and rejected")
    chosen, rejected = (_named(key, _answer, value.get(key)) for key in ("chosen", "rejected"))
    shared = _common_beginning(chosen, rejected)
    prompt = openai.with_system(value.get("system"), _named("prompt", _prompt, value))
    if prompt == shared[-len(prompt) :]:  # the answers repeat it
        prompt = []
    prompt, chosen, rejected = [*prompt, *shared], chosen[len(shared) :], rejected[len(shared) :]
    if not prompt:
        raise Rejected("no prompt: expected the key prompt, or answers that begin with the same messages")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise Rejected(f"{name}: must end with a turn of the assistant that the other answer has not")
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected))


def _named(name: str, read: Callable[[Any], list[Message]], value: Any) -> list[Message]:
    try:
        return read(value)
    except Rejected as reason:
        raise Rejected(f"{name}: {reason}") from None


def _answer(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [answer(value, "text")]
    return messages_of([value] if isinstance(value, dict) else value)


def messages_of(value: Any) -> list[Message]:
    """Messages of either spelling, role/content or from/value."""
    if not isinstance(value, list):
        raise Rejected(f"expected a text or a list of messages, found {type(value).__name__}")
    return [(sharegpt.parse_turn if sharegpt.is_turn(entry) else openai.parse_message)(entry, index) for index, entry in enumerate(value)]


def _prompt(value: dict[str, Any]) -> list[Message]:
    if value.get("instruction") is not None:
        return [Message("user", alpaca.question(value))]
    given = next((value[key] for key in ("prompt", "conversations") if value.get(key) is not None), [])
    return [Message("user", text(given, "text"))] if isinstance(given, str) else messages_of(given)


def _common_beginning(left: list[Message], right: list[Message]) -> list[Message]:
    length = next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right)))
    return left[:length]
