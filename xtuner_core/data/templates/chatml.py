"""ChatML (OpenAI, 2023), without a default system prompt: each turn under the name of its role."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from xtuner_core.data.conversation import ROLES, Conversation
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_tools

JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STOP = "<|im_end|>"
START = Control("<|im_start|>")
END = either(STOP)
NEWLINE = Text("\n")
HEADERS = {role: Text(f"{role}\n") for role in ROLES}


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is `<|im_start|>role\\n content <|im_end|>\\n`; content and end token of a learned turn carry loss."""
    refuse_tools(conversation, "ChatML")
    return chain.from_iterable([turn(role, content, loss) for role, content, loss, *_ in conversation.messages])


def turn(role: str, content: str, loss: bool = False) -> tuple[Piece, ...]:
    """One turn in ChatML."""
    return START, HEADERS[role], Text(content, loss), END[loss], NEWLINE
