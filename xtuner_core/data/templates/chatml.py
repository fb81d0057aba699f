"""ChatML (OpenAI, 2023), without a default system prompt: each turn under the name of its role."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
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


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is `<|im_start|>role\\n content <|im_end|>\\n`; content and end token of a learned turn carry loss."""
    refuse_tools(conversation, "ChatML")
    for message in conversation.messages:
        yield from turn(message.role, message.content, message.loss)


def turn(role: str, content: str, loss: bool = False) -> tuple[Piece, ...]:
    """One turn in ChatML."""
    return START, Text(f"{role}\n"), Text(content, loss), END[loss], NEWLINE
