"""The one canonical unit of chat data; every input format becomes this, every template renders this."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `loss` says whether the model learns to write it."""

    role: str
    content: str
    loss: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, at least one of them with loss."""

    messages: tuple[Message, ...]

    def as_dicts(self) -> list[dict[str, str]]:
        """The form that `apply_chat_template` and OpenAI clients take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]
