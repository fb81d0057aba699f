"""SmolLM2-Instruct: ChatML with a system prompt that is inserted when the conversation has none."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation, Message
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
        conversation = Conversation((Message("system", SYSTEM), *conversation.messages), conversation.tools)
    yield from chatml.render(conversation)
