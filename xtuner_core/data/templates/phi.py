"""Phi-4: ChatML with a separator in the place of line breaks; source: the published template (Microsoft, 2024).

The tokenizer swallows white space around its control tokens, so contents are trimmed.
"""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_other_roles, refuse_tools

STOP = "<|im_end|>"
JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
START, SEPARATOR = Control("<|im_start|>"), Control("<|im_sep|>")
END = either(STOP)


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is `<|im_start|>role<|im_sep|>content<|im_end|>`; content and end token of a learned turn carry loss.

    Raises:
        Rejected: tools, tool calls or another role.
    """
    refuse_tools(conversation, "Phi-4")
    refuse_other_roles(conversation, "Phi-4", "system", "user", "assistant")
    for message in conversation.messages:
        yield START
        yield Text(message.role)
        yield SEPARATOR
        yield Text(message.content.strip(), message.loss)
        yield END[message.loss]
