"""What the Qwen templates share: ChatML turns, tools in the system turn, calls and results as JSON between tags (Qwen team, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xtuner_core.data.conversation import Conversation, Message, ToolCall
from xtuner_core.data.pieces import Piece, Text
from xtuner_core.data.templates._parts import either, refuse_other_roles, tojson
from xtuner_core.data.templates.chatml import END, NEWLINE, START, turn

ROLES = ("system", "user", "assistant", "tool")
CALL, CALL_END = either("<tool_call>"), either("</tool_call>")
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
HOW_TO_CALL: tuple[Piece, ...] = (
    Text("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "),
    CALL[False],
    CALL_END[False],
    Text(" XML tags:\n"),
    CALL[False],
    Text('\n{"name": <function-name>, "arguments": <args-json-object>}\n'),
    CALL_END[False],
)
SYSTEM_HEADER, USER_HEADER, ASSISTANT_HEADER = Text("system\n"), Text("user"), Text("assistant\n")

Words = Callable[[int, Message], Iterator[Piece]]
"""What the assistant writes in the turn of this number, before the stop token."""


def render(conversation: Conversation, template: str, system: str | None, words: Words, response: tuple[Piece, Piece]) -> Iterator[Piece]:
    """System turn with the tools, then the turns; `system` is the default prompt, `response` encloses a tool's result.

    Raises:
        Rejected: a role that the Qwen templates leave out.
    """
    refuse_other_roles(conversation, template, *ROLES)
    messages, tools = conversation.messages, conversation.tools
    first = messages[0] if messages[0].role == "system" else Message("system", system) if system else None
    if tools:
        yield from _system_with_tools(first, tools)
    elif first is not None:
        yield from turn(first.role, first.content, first.loss)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            yield START
            yield ASSISTANT_HEADER
            yield from words(index, message)
            yield END[message.loss]
            yield NEWLINE
        elif message.role == "tool":
            yield from _result(messages, index, response)
        elif message is not first:
            yield from turn(message.role, message.content, message.loss)


def answer(message: Message) -> Iterator[Piece]:
    """An answer without thinking: its words, then its calls."""
    yield Text(message.content, message.loss)
    yield from calls(message)


def calls(message: Message) -> Iterator[Piece]:
    """The tool calls, each on lines of its own below the words."""
    for number, call in enumerate(message.tool_calls):
        if number or message.content:
            yield Text("\n", message.loss)
        yield CALL[message.loss]
        yield Text(_call(call), message.loss)
        yield CALL_END[message.loss]


def _call(call: ToolCall) -> str:
    return f'\n{{"name": "{call.name}", "arguments": {tojson(call.arguments)}}}\n'


def _system_with_tools(system: Message | None, tools: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    yield START
    yield SYSTEM_HEADER
    if system is not None:
        yield Text(system.content, system.loss)
        yield Text("\n\n")
    yield Text(TOOLS + "".join(f"\n{tojson(tool)}" for tool in tools))
    yield from HOW_TO_CALL
    yield END[False]
    yield NEWLINE


def _result(messages: Sequence[Message], index: int, response: tuple[Piece, Piece]) -> Iterator[Piece]:
    """A tool's result; neighbouring ones share one user turn."""
    if index == 0 or messages[index - 1].role != "tool":
        yield START
        yield USER_HEADER
    yield NEWLINE
    yield response[0]
    yield Text(f"\n{messages[index].content}\n")
    yield response[1]
    if index + 1 == len(messages) or messages[index + 1].role != "tool":
        yield END[False]
        yield NEWLINE
