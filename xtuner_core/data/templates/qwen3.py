"""Qwen3 (hybrid thinking): ChatML with tools, and with the thinking behind the last question; source: the published template (2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates import _qwen, chatml
from xtuner_core.data.templates._parts import either

STOP = chatml.STOP
JINJA = None
RESPONSE = Control("<tool_response>"), Control("</tool_response>")
THINK, THINK_END = either("<think>"), either("</think>")


def render(conversation: Conversation) -> Iterator[Piece]:
    """ChatML turns; thinking (an empty block too), words, calls and end token of a learned turn carry loss.

    Thinking is written behind the last question only, and there in the last turn always: a model that is asked begins with it.
    """
    messages = conversation.messages
    question = _last_question(messages)

    def words(index: int, message: Message) -> Iterator[Piece]:
        if index > question and (message.thinking or index == len(messages) - 1):
            return _thought(message)
        return _qwen.answer(message)

    return _qwen.render(conversation, "Qwen3", None, words, RESPONSE)


def _thought(message: Message) -> Iterator[Piece]:
    loss = message.loss
    yield THINK[loss]
    yield Text("\n" + (message.thinking or "").strip("\n") + "\n", loss)
    yield THINK_END[loss]
    yield Text("\n\n" + message.content.lstrip("\n"), loss)
    yield from _qwen.calls(message)


def _last_question(messages: Sequence[Message]) -> int:
    """The number of the last user turn that is not a tool's result in disguise; the last message's if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role == "user" and not (message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")):
            return index
    return len(messages) - 1
