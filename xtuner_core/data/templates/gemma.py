"""Gemma 2 and 3: contents trimmed, the system prompt in the first user turn; source: Google's published template of Gemma 3 (2025).

Gemma 2's own template refuses a system prompt; it is merged here in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import either, refuse_tools, refuse_wrong_order

STOP = "<end_of_turn>"
JINJA = (
    "{{ '<bos>' }}{% set system = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('user and assistant must take turns') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if loop.index0 % 2 else 'user') + '\n' }}"
    "{{ (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BEGIN, START = Control("<bos>"), Control("<start_of_turn>")
END = either(STOP)
USER, MODEL, NEWLINE = Text("user\n"), Text("model\n"), Text("\n")


def render(conversation: Conversation) -> Iterator[Piece]:
    """Each turn is `<start_of_turn>role\\n content <end_of_turn>\\n`; content and end token of a learned turn carry loss.

    Raises:
        Rejected: user and assistant do not take turns, or tools.
    """
    refuse_tools(conversation, "Gemma")
    messages = conversation.messages
    system, messages = (messages[0], messages[1:]) if messages[0].role == "system" else (None, messages)
    refuse_wrong_order([message.role for message in messages], "Gemma")
    yield BEGIN
    for index, message in enumerate(messages):
        yield START
        yield MODEL if message.role == "assistant" else USER
        if system is not None and index == 0:
            yield Text(f"{system.content}\n\n")
        yield Text(message.content.strip(), message.loss)
        yield END[message.loss]
        yield NEWLINE
