"""InternLM2 and InternLM2.5-Chat: ChatML behind a begin-of-text token (Shanghai AI Laboratory, 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece
from xtuner_core.data.templates import chatml

STOP = chatml.STOP
JINJA = "{{ '<s>' }}" + chatml.JINJA
BEGIN = Control("<s>")


def render(conversation: Conversation) -> Iterator[Piece]:
    """Like chatml, with the begin-of-text token in front."""
    yield BEGIN
    yield from chatml.render(conversation)
