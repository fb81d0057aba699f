"""OpenAI chat: a bare list of messages, `{"messages": [...]}` or `{"dialogs": [...]}`; text content only."""

from __future__ import annotations

from typing import Any

from xtuner_core.data.conversation import ROLES, Conversation, Message
from xtuner_core.data.jsonl import Rejected

_KEYS = {"role", "content", "loss", "name"}


def parse(value: Any) -> Conversation:
    """One JSON value → one conversation; assistant turns are learned unless they say `"loss": false`.

    Raises:
        Rejected: not a conversation, an unknown role or key, an empty answer, or nothing to learn.
    """
    messages = tuple(_message(entry, index) for index, entry in enumerate(_entries(value)))
    if not any(message.role == "assistant" for message in messages):
        raise Rejected("no assistant turn")
    if not any(message.loss for message in messages):
        raise Rejected("nothing to learn: every turn has loss false")
    return Conversation(messages)


def _entries(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = value.get("messages", value.get("dialogs"))
    if not isinstance(value, list):
        raise Rejected("not a conversation: expected a list of messages, or an object with messages")
    if not value:
        raise Rejected("no messages")
    return value


def _message(entry: Any, index: int) -> Message:
    if not isinstance(entry, dict):
        raise Rejected(f"message {index}: expected an object, found {type(entry).__name__}")
    if unknown := entry.keys() - _KEYS:
        raise Rejected(f"message {index}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(sorted(_KEYS))}")
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise Rejected(f"message {index}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Rejected(f"message {index}: content must be text, found {type(content).__name__}")
    if "\0" in content:
        raise Rejected(f"message {index}: content holds a NUL character")
    learned = entry.get("loss", role == "assistant")
    if not isinstance(learned, bool):
        raise Rejected(f"message {index}: loss must be true or false")
    if role == "assistant" and not content:
        raise Rejected(f"message {index}: empty answer")
    return Message(role, content, learned)
