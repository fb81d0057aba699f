"""DeepSeek-V3: system prompts first, then bare turns; source: the published template (2024).

That template leaves the end out of a turn with a single tool call and ignores the tools themselves, so both are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_other_roles, refuse_tools

STOP = "<｜end▁of▁sentence｜>"
JINJA = (
    "{{ '<｜begin▁of▁sentence｜>' }}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ ('' if loop.first else '\n\n') + message['content'] }}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
BEGIN, USER, ASSISTANT = Control("<｜begin▁of▁sentence｜>"), Control("<｜User｜>"), Control("<｜Assistant｜>")
END = either(STOP)


def render(conversation: Conversation) -> Iterator[Piece]:
    """A control token before each turn; content and end token of a learned answer carry loss.

    Raises:
        Rejected: tools, tool calls or another role.
    """
    refuse_tools(conversation, "DeepSeek-V3")
    refuse_other_roles(conversation, "DeepSeek-V3", "system", "user", "assistant")
    messages = conversation.messages
    yield BEGIN
    yield Text("\n\n".join(message.content for message in messages if message.role == "system"))
    for message in messages:
        if message.role == "user":
            yield USER
            yield Text(message.content, message.loss)
        elif message.role == "assistant":
            yield ASSISTANT
            yield Text(message.content, message.loss)
            yield END[message.loss]
