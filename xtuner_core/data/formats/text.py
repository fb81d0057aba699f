"""Plain text to continue pre-training on: `text`, `content`, or `messages` with one of the role pretrain."""

from __future__ import annotations

from typing import Any

from xtuner_core.data.conversation import Passage
from xtuner_core.data.formats import _parts
from xtuner_core.data.jsonl import Rejected

_KEYS = ("text", "content")
_OTHERS = {"messages", "dialogs", "conversations", "conversation", "instruction", "output", "prompt", "chosen", "rejected", "role"}


def recognises(value: Any) -> str | None:
    """A text under text or content and nothing that another format is made of, or messages of the role pretrain."""
    if not isinstance(value, dict):
        return None
    if _pretrain(value) is not None:
        return "'messages' with the role pretrain"
    key = next((key for key in _KEYS if isinstance(value.get(key), str)), None)
    return f"the key {key!r}" if key and not value.keys() & _OTHERS else None


def parse(value: Any) -> Passage:
    """One value → one passage; other keys are ignored.

    Raises:
        Rejected: no text, an empty one, or one under each name.
    """
    if not isinstance(value, dict):
        raise Rejected("expected an object with text or content")
    message = _pretrain(value)
    found = (
        [message["content"]]
        if message is not None and "content" in message
        else [value[key] for key in _KEYS if value.get(key) is not None]
    )
    if len(found) != 1:
        raise Rejected("expected a text under the key text or content" + (", not under both" if found else ""))
    passage = _parts.text(found[0], "text")
    if not passage:
        raise Rejected("empty text")
    return Passage(passage)


def _pretrain(value: dict[str, Any]) -> dict[str, Any] | None:
    messages = value.get("messages", value.get("dialogs"))
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict) and messages[0].get("role") == "pretrain":
        return messages[0]
    return None
