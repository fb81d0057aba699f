"""Mistral Nemo and others with the Tekken tokenizer (no spaces around tags); source: the template published with Nemo (2024).

That template shows a system prompt only while the last turn is the user's, so training on whole conversations would never show it:
system prompts are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xtuner_core.data.conversation import Conversation, Message, ToolCall
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_other_roles, refuse_wrong_order, tojson

STOP = "</s>"
JINJA = None
ID_LENGTH = 9
BEGIN, USER, USER_END = Control("<s>"), Control("[INST]"), Control("[/INST]")
TOOLS, TOOLS_END = Control("[AVAILABLE_TOOLS]"), Control("[/AVAILABLE_TOOLS]")
RESULT, RESULT_END = Control("[TOOL_RESULTS]"), Control("[/TOOL_RESULTS]")
CALLS, END = either("[TOOL_CALLS]"), either(STOP)


def render(conversation: Conversation) -> Iterator[Piece]:
    """User turns between tags, answers up to `</s>`; words, calls and end token of a learned turn carry loss.

    Raises:
        Rejected: a system prompt or another role, turns out of order, words beside a tool call, a call's id that has not 9 characters.
    """
    messages = conversation.messages
    if messages[0].role == "system":
        raise Rejected(
            "the Mistral template shows a system prompt only while the last turn is the user's, so training would never show it; "
            "put it into the first user turn"
        )
    refuse_other_roles(conversation, "Mistral", "user", "assistant", "tool")
    refuse_wrong_order([message.role for message in messages if message.role != "tool" and not message.tool_calls], "Mistral")
    asked = [message.as_dict() for message in messages if message.role == "user"][-1:]
    yield BEGIN
    for index, message in enumerate(messages):
        if message.role == "user":
            # The template means the last user turn, and knows it by its words.
            if conversation.tools and message.as_dict() in asked:
                yield from _tools(conversation.tools)
            yield USER
            yield Text(message.content, message.loss)
            yield USER_END
        elif message.role == "tool":
            yield RESULT
            yield Text(f'{{"content": {message.content}, "call_id": "{_checked(message.tool_call_id, index)}"}}')
            yield RESULT_END
        else:
            yield from _answer(message, index)


def _answer(message: Message, index: int) -> Iterator[Piece]:
    loss = message.loss
    if message.tool_calls:
        if message.content:
            raise Rejected(
                f"message {index}: the Mistral template leaves out the words beside a tool call; give the call a turn without content"
            )
        yield CALLS[loss]
        yield Text("[" + ", ".join(_call(call, index) for call in message.tool_calls) + "]", loss)
    else:
        yield Text(message.content, loss)
    yield END[loss]


def _call(call: ToolCall, index: int) -> str:
    return f'{tojson({"name": call.name, "arguments": call.arguments})[:-1]}, "id": "{_checked(call.id, index)}"}}'


def _checked(id: str | None, index: int) -> str:
    if id is None or len(id) != ID_LENGTH:
        raise Rejected(f"message {index}: the Mistral template needs a tool call's id to have {ID_LENGTH} characters, found {id!r}")
    return id


def _tools(tools: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    yield TOOLS
    yield Text("[" + ", ".join(_tool(tool["function"]) for tool in tools) + "]")
    yield TOOLS_END


def _tool(function: dict[str, Any]) -> str:
    """The template's own JSON: texts in quotes without escapes."""
    parts = [
        f'"{key}": ' + (f'"{value}"' if isinstance(value, str) else tojson(value)) for key, value in function.items() if key != "return"
    ]
    return '{"type": "function", "function": {' + ", ".join(parts) + "}}"
