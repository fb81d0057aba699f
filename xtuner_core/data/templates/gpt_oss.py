"""gpt-oss, in OpenAI's harmony format: channels for thinking, calls and answers; source: the published chat template (2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates import _typescript
from xtuner_core.data.templates._parts import TODAY, either, refuse_other_roles, tojson

STOP = "<|return|>"
JINJA = None
SYSTEM = (
    f"You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: {TODAY:%Y-%m-%d}\n\n"
    "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
SYSTEM_WITH_TOOLS = SYSTEM + "\nCalls to these tools must go to the commentary channel: 'functions'."
START, CHANNEL, MESSAGE, END = either("<|start|>"), either("<|channel|>"), either("<|message|>"), either("<|end|>")
RETURN, CALL = either(STOP), either("<|call|>")


def render(conversation: Conversation) -> Iterator[Piece]:
    """What a learned turn has behind its first `<|start|>assistant` carries loss: channels, thinking, words, calls, end token.

    Thinking is written in the last turn, and before calls that no answer follows.

    Raises:
        Rejected: a role the template leaves out, several calls in one turn, both words and thinking before a call, a tool's result
            without a call.
    """
    messages, tools = conversation.messages, conversation.tools
    yield from _turn("system", SYSTEM_WITH_TOOLS if tools else SYSTEM)
    first = messages[0].content if messages[0].role in ("system", "developer") else None
    messages = messages if first is None else messages[1:]
    refuse_other_roles(Conversation(messages), "gpt-oss", "user", "assistant", "tool")
    if first or tools:
        yield from _turn("developer", _developer(first, tools))
    last_answer = max((index for index, one in enumerate(messages) if one.role == "assistant" and not one.tool_calls), default=-1)
    called = None
    for index, message in enumerate(messages):
        if message.role == "user":
            yield from _turn("user", message.content, message.loss)
        elif message.role == "tool":
            if called is None:
                raise Rejected(f"message {index}: a tool's result without a call before it")
            yield from _result(called, message.content)
        elif message.tool_calls:
            called = _checked(message, index)
            yield from _call(message, thought=index > last_answer)
        elif index == len(messages) - 1:
            yield from _last_answer(message)
        else:
            called = None
            yield from _answer(message.content, END, message.loss, START[False])


def _turn(role: str, content: str, loss: bool = False) -> tuple[Piece, ...]:
    return START[False], Text(role), MESSAGE[False], Text(content, loss), END[loss]


def _developer(instructions: str | None, tools: Sequence[dict[str, Any]]) -> str:
    told = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    return told + "# Tools\n\n" + _typescript.namespace("functions", tools) if tools else told


def _answer(content: str, end: tuple[Control, Control], loss: bool, start: Control) -> Iterator[Piece]:
    yield start
    yield Text("assistant", start.loss)
    yield from _channel("final", content, loss)
    yield end[loss]


def _channel(name: str, content: str, loss: bool) -> tuple[Piece, ...]:
    return CHANNEL[loss], Text(name, loss), MESSAGE[loss], Text(content, loss)


def _thinking(thinking: str, loss: bool) -> Iterator[Piece]:
    yield START[False]
    yield Text("assistant")
    yield from _channel("analysis", thinking, loss)
    yield END[loss]


def _last_answer(message: Message) -> Iterator[Piece]:
    loss = message.loss
    if message.thinking is not None:
        yield from _thinking(message.thinking, loss)
    # Behind its thinking the model itself begins the next part.
    yield from _answer(message.content, RETURN, loss, START[loss and message.thinking is not None])


def _checked(message: Message, index: int) -> str:
    """The name of the turn's only call."""
    if len(message.tool_calls) != 1:
        raise Rejected(f"message {index}: the gpt-oss template has place for one tool call a turn")
    if message.content and message.thinking:
        raise Rejected(f"message {index}: the gpt-oss template has place for either words or thinking before a tool call")
    return message.tool_calls[0].name


def _call(message: Message, thought: bool) -> Iterator[Piece]:
    loss = message.loss
    call = message.tool_calls[0]
    before = (message.content or message.thinking) if thought else None
    if before:
        yield from _thinking(before, loss)
    goes_on = loss and bool(before)
    yield START[goes_on]
    yield Text("assistant", goes_on)
    yield Text(f" to=functions.{call.name}", loss)
    yield CHANNEL[loss]
    yield Text("commentary json", loss)
    yield MESSAGE[loss]
    yield Text(tojson(call.arguments), loss)
    yield CALL[loss]


def _result(name: str, content: str) -> Iterator[Piece]:
    yield START[False]
    yield Text(f"functions.{name} to=assistant")
    yield CHANNEL[False]
    yield Text("commentary")
    yield MESSAGE[False]
    yield Text(tojson(content))
    yield END[False]
