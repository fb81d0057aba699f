"""OpenAI chat: a bare list of messages, or an object with `messages` (or `dialogs`, ...) and `tools`; text only.

Also what is met in the wild: thinking under three names, `weight` as in OpenAI's fine-tuning, a null for what is absent.
"""

from __future__ import annotations

from typing import Any

from xtuner_core.data.conversation import ROLES, Conversation, Message
from xtuner_core.data.formats._parts import THINK, conversation, split_thinking, text, tool_calls
from xtuner_core.data.jsonl import Rejected

LISTS = ("messages", "dialogs", "conversations", "conversation")
"""Keys of the list of messages; other keys beside it are ignored, but for tools and system."""
_THINKING = ("reasoning_content", "thinking", "reasoning")
_KEYS = {"role", "content", "loss", "weight", "name", "tool_calls", "tool_call_id", "meta", *_THINKING}
_KNOWN = ", ".join(sorted(_KEYS))


def recognises(value: Any) -> str | None:
    """A list of objects with a role, unless all are plain text (pretrain)."""
    where = "a list" if isinstance(value, list) else next((key for key in LISTS if isinstance(value, dict) and value.get(key)), None)
    entries = value if isinstance(value, list) else value[where] if where else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) and "role" in entry for entry in entries):
        return None
    if all(entry["role"] == "pretrain" for entry in entries):
        return None
    return f"{where if where == 'a list' else repr(where)} of messages with a role"


def parse(value: Any) -> Conversation:
    """One value → one conversation; assistant turns are learned unless they say `"loss": false` or `"weight": 0`.

    Raises:
        Rejected: not a conversation, an unknown role or key, not text, an empty answer, or nothing to learn.
    """
    if isinstance(value, list):
        return conversation(_messages(value))
    entries = None
    if isinstance(value, dict):
        entries = value.get("messages") or next((value[key] for key in LISTS if value.get(key) is not None), None)
    if not isinstance(entries, list):
        raise Rejected("not a conversation: expected a list of messages, or an object with messages")
    return conversation(with_system(value.get("system"), _messages(entries)), value.get("tools"))


def _messages(entries: list[Any]) -> list[Message]:
    if not entries:
        raise Rejected("no messages")
    return [parse_message(entry, index) for index, entry in enumerate(entries)]


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """The messages after a system prompt that stands beside them.

    Raises:
        Rejected: it is not text, or the messages begin with another one.
    """
    if not system or (messages and messages[0] == Message("system", text(system, "system"))):
        return messages
    if messages and messages[0].role == "system":
        raise Rejected("two system prompts: the key system, and message 0")
    return [Message("system", text(system, "system")), *messages]


def parse_message(entry: Any, index: int) -> Message:
    """One message; `index` names it in the reason.

    Raises:
        Rejected: as in `parse`.
    """
    if isinstance(entry, dict) and len(entry) == 2:  # nearly every message: no call, no set, no dictionary is made
        role, content = entry.get("role"), entry.get("content")
        if type(content) is str and "\0" not in content:
            if role == "user" or role == "system":
                return Message(role, content)
            if role == "assistant" and content and not content.startswith(THINK):
                return Message("assistant", content, True)
    return _any_message(entry, f"message {index}")


def _any_message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise Rejected(f"{where}: expected an object, found {type(entry).__name__}")
    if unknown := [key for key in entry.keys() - _KEYS if not _is_absent(entry[key])]:
        raise Rejected(f"{where}: unknown key {min(unknown)!r}; known: {_KNOWN}")
    role = entry.get("role")
    if role not in ROLES:
        raise Rejected(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    calls = tool_calls(entry["tool_calls"], f"{where}: tool_calls") if entry.get("tool_calls") else ()
    content = _content(entry.get("content"), where, may_be_absent=bool(calls) or role == "tool")
    thinking = _thinking(entry, where)
    if role != "assistant" and (calls or thinking):
        raise Rejected(f"{where}: {'tool_calls' if calls else 'thinking'} in a turn of the {role}; only the assistant's may have that")
    if role == "assistant" and thinking is None:
        thinking, content = split_thinking(content)
    if role == "assistant" and not content and not calls:
        raise Rejected(f"{where}: empty answer")
    name, call_id = (None if entry.get(key) is None else text(entry[key], f"{where}: {key}") for key in ("name", "tool_call_id"))
    return Message(role, content, _loss(entry, where), thinking, calls, name, call_id)


def _is_absent(value: Any) -> bool:
    return value is None or value == [] or value == {}


def _content(content: Any, where: str, may_be_absent: bool) -> str:
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    return text(content, f"{where}: content")


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise Rejected(f"{where}: content has a part of type {kind!r}; text only")
    return text(part.get("text"), f"{where}: content")


def _thinking(entry: dict[str, Any], where: str) -> str | None:
    found = {text(entry[key], f"{where}: {key}") for key in _THINKING if entry.get(key) is not None}
    if len(found) > 1:
        raise Rejected(f"{where}: two different thinkings, in {' and '.join(key for key in _THINKING if entry.get(key) is not None)}")
    return found.pop() if found else None


def _loss(entry: dict[str, Any], where: str) -> bool:
    loss, weight, assistant = entry.get("loss"), entry.get("weight"), entry["role"] == "assistant"
    if loss is not None and not isinstance(loss, bool):
        raise Rejected(f"{where}: loss must be true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1) or not assistant):
        raise Rejected(f"{where}: weight must be 0 or 1, in a turn of the assistant")
    if loss is not None and weight is not None and loss != bool(weight):
        raise Rejected(f"{where}: loss and weight contradict each other")
    return loss if loss is not None else bool(weight) if weight is not None else assistant
