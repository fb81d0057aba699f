"""Qwen2.5-Instruct: ChatML with a default system prompt and tools; source: the chat template published with the models (2024)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.pieces import Piece, Text
from xtuner_core.data.templates import _qwen, chatml

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
STOP = chatml.STOP
JINJA = None
RESPONSE = Text("<tool_response>"), Text("</tool_response>")
"""No control tokens in this vocabulary, unlike Qwen3's."""


def render(conversation: Conversation) -> Iterator[Piece]:
    """ChatML turns; the words and calls of a learned turn, and its end token, carry loss."""
    return _qwen.render(conversation, "Qwen2.5", SYSTEM, _words, RESPONSE)


def _words(_: int, message: Message) -> Iterator[Piece]:
    return _qwen.answer(message)
