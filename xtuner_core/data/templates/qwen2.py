"""Qwen1.5 and Qwen2: ChatML with a system prompt that is inserted when the conversation has none (Qwen team, 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Piece
from xtuner_core.data.templates import chatml

SYSTEM = "You are a helpful assistant."
STOP = chatml.STOP
JINJA = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}" + chatml.JINJA


def render(conversation: Conversation) -> Iterator[Piece]:
    """Like chatml, with the default system turn in front."""
    if conversation.messages[0].role != "system":
        yield from chatml.turn("system", SYSTEM)
    yield from chatml.render(conversation)
