"""Llama 3.1, 3.2 and 3.3: dates in the system turn, tools in the first user turn; source: the published templates (Meta, 2024)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Piece, Text
from xtuner_core.data.templates import llama3
from xtuner_core.data.templates._parts import TODAY, refuse_other_roles, tojson

STOP = llama3.STOP
JINJA = None
DATES = f"Cutting Knowledge Date: December 2023\nToday Date: {TODAY:%d %b %Y}\n\n"
HOW_TO_CALL = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the "
    'given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def render(conversation: Conversation) -> Iterator[Piece]:
    """Always a system turn; each turn's words and `<|eot_id|>` carry loss if it is learned.

    Raises:
        Rejected: a role the template has not, tools without a user turn first, several calls in one turn, or words beside a call.
    """
    refuse_other_roles(conversation, "Llama 3.2", "system", "user", "assistant", "tool")
    messages, tools = conversation.messages, conversation.tools
    system, messages = (messages[0], messages[1:]) if messages[0].role == "system" else (None, messages)
    yield llama3.BEGIN
    yield from _system_turn(system, bool(tools))
    if tools:
        if not messages or messages[0].role != "user":
            raise Rejected("the Llama 3.2 template writes tools into the first user turn, and this conversation does not begin with one")
        guide = HOW_TO_CALL + "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
        yield from llama3.turn("user", guide + messages[0].content.strip())
        messages = messages[1:]
    for message in messages:
        yield from _turn(message)


def _system_turn(system: Message | None, tools: bool) -> Iterator[Piece]:
    loss = system is not None and system.loss
    yield llama3.HEADER
    yield Text("system")
    yield llama3.HEADER_END
    yield Text("\n\nEnvironment: ipython\n" + DATES if tools else "\n\n" + DATES)
    yield Text(system.content.strip() if system else "", loss)
    yield llama3.END[loss]


def _turn(message: Message) -> tuple[Piece, ...]:
    if message.tool_calls:
        return llama3.turn("assistant", _call(message), message.loss)
    if message.role == "tool":
        return llama3.turn("ipython", tojson(message.content))
    return llama3.turn(message.role, message.content.strip(), message.loss)


def _call(message: Message) -> str:
    if len(message.tool_calls) != 1:
        raise Rejected("the Llama 3.2 template has place for one tool call a turn")
    if message.content:
        raise Rejected("the Llama 3.2 template leaves out the words beside a tool call; give the call a turn without content")
    call = message.tool_calls[0]
    return f'{{"name": "{call.name}", "parameters": {tojson(call.arguments)}}}'
