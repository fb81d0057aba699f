"""What a line of input means, whatever its format: every format becomes one of these, every template renders the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the assistant calls; `arguments` is a JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, with the arguments as an object, as chat templates expect them."""
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.id is None else {"id": self.id, **call}

    @classmethod
    def from_dict(cls, call: dict[str, Any]) -> ToolCall:
        """The opposite of `as_dict`."""
        return cls(call["function"]["name"], call["function"]["arguments"], call.get("id"))


class Message(NamedTuple):
    """One turn. `loss` says whether the model learns to write it; `thinking` is what it wrote before its answer.

    A tuple, for millions are made, and a frozen dataclass takes three times as long.
    """

    role: str
    content: str
    loss: bool = False
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The form that `apply_chat_template` and OpenAI clients take; absent parts are left out."""
        parts = {"reasoning_content": self.thinking, "name": self.name, "tool_call_id": self.tool_call_id}
        calls = {"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **{key: part for key, part in parts.items() if part is not None}, **calls}

    @classmethod
    def from_dict(cls, turn: dict[str, Any]) -> Message:
        """The opposite of `as_dict`, but for `loss`, which is not in it."""
        calls = tuple(ToolCall.from_dict(call) for call in turn.get("tool_calls", ()))
        optional = (turn.get(key) for key in ("name", "tool_call_id"))
        return cls(turn["role"], turn["content"], False, turn.get("reasoning_content"), calls, *optional)


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Each in its own form."""
    return [message.as_dict() for message in messages]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, at least one of them with loss; `tools` are the functions offered, as OpenAI's JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages as `apply_chat_template` takes them."""
        return as_dicts(self.messages)


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text to continue pre-training on: every token but the first is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, the first better; kept for later use."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    def as_dict(self) -> dict[str, Any]:
        """As it is kept."""
        return {"prompt": as_dicts(self.prompt), "chosen": as_dicts(self.chosen), "rejected": as_dicts(self.rejected)}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with a checkable answer, for reinforcement learning; kept for later use."""

    messages: tuple[Message, ...]
    answer: str
    source: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it is kept."""
        return {"messages": as_dicts(self.messages), "answer": self.answer, "source": self.source}


Sample = Conversation | Passage | Preference | Prompt
