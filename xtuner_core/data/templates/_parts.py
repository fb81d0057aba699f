"""What several templates share: JSON as Jinja writes it, and the refusal of what a template has no words for."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Control

TODAY = date(2024, 7, 26)
"""The day that templates name as today's, Llama 3.2's own default: the same data gives the same tokens tomorrow."""


def tojson(value: Any) -> str:
    """JSON as transformers' `tojson` filter writes it in a chat template."""
    return json.dumps(value, ensure_ascii=False)


def either(token: str) -> tuple[Control, Control]:
    """A control token without and with loss, to be indexed by `Message.loss`."""
    return Control(token), Control(token, loss=True)


def refuse_other_roles(conversation: Conversation, template: str, *roles: str) -> None:
    """Raise Rejected for a turn that the template would refuse or leave out."""
    for index, message in enumerate(conversation.messages):
        if message.role not in roles:
            raise Rejected(f"message {index}: the {template} template has no role {message.role!r}, only {', '.join(roles)}")


def refuse_tools(conversation: Conversation, template: str) -> None:
    """Raise Rejected for tools and tool calls, which the template would leave out without a word."""
    if conversation.tools:
        raise Rejected(f"the {template} template has no place for tools")
    for message in conversation.messages:
        if message.tool_calls:
            index = conversation.messages.index(message)
            raise Rejected(f"message {index}: the {template} template has no place for tool calls")


def refuse_wrong_order(roles: list[str], template: str) -> None:
    """Raise Rejected unless user and assistant take turns, the user first."""
    for index, role in enumerate(roles):
        if role != ("user", "assistant")[index % 2]:
            raise Rejected(f"the {template} template needs user and assistant to take turns, the user first; turn {index + 1} is {role!r}")
