"""Llama 3: a header for each turn, contents trimmed, no default system prompt; source: Meta's model card (2024)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_tools

STOP = "<|eot_id|>"
JINJA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BEGIN, HEADER, HEADER_END = Control("<|begin_of_text|>"), Control("<|start_header_id|>"), Control("<|end_header_id|>")
END = either(STOP)
GAP = Text("\n\n")


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is a header, an empty line, the trimmed content and `<|eot_id|>`; the last two carry loss in a learned turn."""
    refuse_tools(conversation, "Llama 3")
    yield BEGIN
    for message in conversation.messages:
        yield from turn(message.role, message.content.strip(), message.loss)


def turn(role: str, content: str, loss: bool = False) -> tuple[Piece, ...]:
    """One turn in Llama 3's form."""
    return HEADER, Text(role), HEADER_END, GAP, Text(content, loss), END[loss]
