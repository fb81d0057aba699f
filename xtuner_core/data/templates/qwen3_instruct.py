"""Qwen3-Instruct-2507: Qwen3 without thinking; source: the chat template published with the models (2025)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.pieces import Piece
from xtuner_core.data.templates import _qwen, chatml
from xtuner_core.data.templates.qwen3 import RESPONSE

STOP = chatml.STOP
JINJA = None


def render(conversation: Conversation) -> Iterator[Piece]:
    """ChatML turns; the words and calls of a learned turn, and its end token, carry loss."""
    return _qwen.render(conversation, "Qwen3-Instruct-2507", None, _words, RESPONSE)


def _words(_: int, message: Message) -> Iterator[Piece]:
    return _qwen.answer(message)
