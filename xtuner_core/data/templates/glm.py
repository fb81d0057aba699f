"""GLM-4.5 and 4.6: a control token before each turn, thinking, calls as tags; source: the published template (Z.ai, 2025).

A turn ends where the next one begins, so the token of the next turn is the stop token and carries the loss of the turn before it. The
template writes none behind the last turn; we add it, or the model would not learn to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_other_roles, tojson

STOP = "<|user|>"
JINJA = None
BEGIN, ASSISTANT = (Control("[gMASK]"), Control("<sop>")), Control("<|assistant|>")
SYSTEM, USER, RESULT = either("<|system|>"), either(STOP), either("<|observation|>")
THINK, THINK_END = either("<think>"), either("</think>")
CALL, CALL_END = either("<tool_call>"), either("</tool_call>")
KEY, KEY_END = either("<arg_key>"), either("</arg_key>")
VALUE, VALUE_END = either("<arg_value>"), either("</arg_value>")
RESPONSE, RESPONSE_END = Control("<tool_response>"), Control("</tool_response>")
TOOLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_END = "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"


def render(conversation: Conversation) -> Iterator[Piece]:
    """Thinking (an empty block too), words, calls and the token behind them carry loss in a learned turn.

    Thinking is written behind the last question only. Contents of the assistant are trimmed.

    Raises:
        Rejected: a role that the template leaves out.
    """
    refuse_other_roles(conversation, "GLM-4.5", "system", "user", "assistant", "tool")
    messages = conversation.messages
    question = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    yield from BEGIN
    if conversation.tools:
        yield from _tools(conversation.tools)
    stopping = False
    for index, message in enumerate(messages):
        if message.role == "assistant":
            yield ASSISTANT
            yield from _words(message, message.thinking if index > question else None)
        elif message.role == "tool":
            if index == 0 or messages[index - 1].role != "tool":
                yield RESULT[stopping]
            yield NEWLINE
            yield RESPONSE
            yield Text(f"\n{message.content}\n")
            yield RESPONSE_END
        else:
            yield (SYSTEM if message.role == "system" else USER)[stopping]
            yield NEWLINE
            yield Text(message.content, message.loss)
        stopping = message.role == "assistant" and message.loss
    if stopping:
        yield (RESULT if messages[-1].tool_calls else USER)[True]


NEWLINE = Text("\n")


def _words(message: Message, thinking: str | None) -> Iterator[Piece]:
    loss = message.loss
    content = message.content.strip()
    yield Text("\n", loss)
    yield THINK[loss]
    yield Text((thinking or "").strip(), loss)
    yield THINK_END[loss]
    if content:
        yield Text(f"\n{content}", loss)
    for call in message.tool_calls:
        yield Text("\n", loss)
        yield CALL[loss]
        yield Text(f"{call.name}\n", loss)
        yield from _arguments(call.arguments, loss)
        yield CALL_END[loss]


def _arguments(arguments: dict[str, Any], loss: bool) -> Iterator[Piece]:
    for key, value in arguments.items():
        yield KEY[loss]
        yield Text(key, loss)
        yield KEY_END[loss]
        yield Text("\n", loss)
        yield VALUE[loss]
        yield Text(value if isinstance(value, str) else tojson(value), loss)
        yield VALUE_END[loss]
        yield Text("\n", loss)


def _tools(tools: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    yield SYSTEM[False]
    yield Text(TOOLS + "".join(f"{tojson(tool)}\n" for tool in tools) + TOOLS_END)
    yield CALL[False]
    yield Text("{function-name}\n")
    yield from _arguments({"{arg-key-1}": "{arg-value-1}", "{arg-key-2}": "{arg-value-2}"}, False)
    yield Text("...\n")
    yield CALL_END[False]
