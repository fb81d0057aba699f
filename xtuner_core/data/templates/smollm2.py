"""SmolLM2-Instruct: ChatML with a system prompt that is inserted when the conversation has none (Hugging Face, 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Piece
from xtuner_core.data.templates import chatml

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
STOP = chatml.STOP
JINJA = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(conversation: Conversation) -> Iterator[Piece]:
    """Like chatml, with the default system turn in front."""
    if conversation.messages[0].role != "system":
        yield from chatml.turn("system", SYSTEM)
    yield from chatml.render(conversation)
