"""ShareGPT: `conversations` of `{"from", "value"}`, with `system` and `tools` beside it, as LLaMA-Factory's samples have them."""

from __future__ import annotations

from typing import Any

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.formats import openai
from xtuner_core.data.formats._parts import conversation, json_of, text, tool_call
from xtuner_core.data.jsonl import Rejected

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
_KEYS = {"from", "value", "loss", "weight"}


def recognises(value: Any) -> str | None:
    """`conversations`, a list of objects with from and value, that is not the prompt of a preference pair."""
    entries = value.get("conversations") if isinstance(value, dict) and "chosen" not in value else None
    if isinstance(entries, list) and entries and all(is_turn(entry) for entry in entries):
        return "'conversations' with from/value"
    return None


def is_turn(entry: Any) -> bool:
    """Whether it is an object with from and value."""
    return isinstance(entry, dict) and "from" in entry and "value" in entry


def parse(value: Any) -> Conversation:
    """One value → one conversation; all turns of the assistant are learned, calls of functions too.

    Raises:
        Rejected: not a conversation, an unknown speaker or key, not text, an empty answer, a call that is no JSON, or nothing to learn.
    """
    entries = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise Rejected("not a conversation: expected an object with a list of conversations")
    if not entries:
        raise Rejected("no messages")
    messages = [parse_turn(entry, index) for index, entry in enumerate(entries)]
    return conversation(openai.with_system(value.get("system"), messages), value.get("tools"))


def parse_turn(entry: Any, index: int) -> Message:
    """One turn; `index` names it in the reason.

    Raises:
        Rejected: as in `parse`.
    """
    where = f"message {index}"
    if not isinstance(entry, dict):
        raise Rejected(f"{where}: expected an object, found {type(entry).__name__}")
    if unknown := [key for key in entry.keys() - _KEYS if entry[key] is not None]:
        raise Rejected(f"{where}: unknown key {min(unknown)!r}; known: {', '.join(sorted(_KEYS))}")
    speaker = entry.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Rejected(f"{where}: unknown from {speaker!r}; known: {', '.join(SPEAKERS)}")
    content = text(entry.get("value"), f"{where}: value")
    told = {"role": SPEAKERS[speaker], "content": content, "loss": entry.get("loss"), "weight": entry.get("weight")}
    if speaker != "function_call":
        return openai.parse_message(told, index)
    return openai.parse_message({**told, "content": None, "tool_calls": _calls(content, where)}, index)


def _calls(content: str, where: str) -> list[Any]:
    calls = json_of(content, f"{where}: function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise Rejected(f"{where}: the function_call holds no call")
    for call in calls:
        tool_call(call, f"{where}: function_call")
    return calls
