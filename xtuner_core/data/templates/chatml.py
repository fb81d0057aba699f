"""ChatML, as Qwen2/2.5 and InternLM2 use it (OpenAI, 2023), without a default system prompt."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece, Text

JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STOP = "<|im_end|>"


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is `<|im_start|>role\\n content <|im_end|>\\n`; content and end token of a learned turn carry loss."""
    for message in conversation.messages:
        yield Control("<|im_start|>")
        yield Text(f"{message.role}\n")
        yield Text(message.content, loss=message.loss)
        yield Control(STOP, loss=message.loss)
        yield Text("\n")
