"""The OpenAI format: three spellings of one conversation, and what loss means."""

from __future__ import annotations

from typing import Any

import pytest

from xtuner_core.data.formats.openai import parse
from xtuner_core.data.jsonl import Rejected

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"messages": m, "id": 7}, lambda m: {"dialogs": m}])
def test_three_spellings_of_one_conversation(wrap: Any) -> None:
    assert parse(wrap([USER, ANSWER])).as_dicts() == [USER, ANSWER]


def test_assistant_turns_are_learned_unless_they_say_no() -> None:
    messages = [{"role": "system", "content": ""}, USER | {"loss": True}, ANSWER | {"loss": False}, USER, ANSWER]
    assert [message.loss for message in parse(messages).messages] == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "not a conversation"),
        ({"conversation": []}, "not a conversation"),
        ({"messages": {}}, "not a conversation"),
        ([], "no messages"),
        (["hi"], "message 0: expected an object, found str"),
        ([USER, {"role": "tool", "content": "x"}], "message 1: unknown role 'tool'; known: system, user, assistant"),
        ([USER, {"role": ["user"], "content": "x"}], "message 1: unknown role"),
        ([USER, {"content": "x"}], "message 1: unknown role None"),
        ([USER, {"role": "assistant", "content": None}], "message 1: content must be text, found NoneType"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "content must be text, found list"),
        ([USER, ANSWER | {"weight": 1}], "message 1: unknown key 'weight'"),
        ([USER, ANSWER | {"loss": 1}], "message 1: loss must be true or false"),
        ([USER, ANSWER | {"content": ""}], "message 1: empty answer"),
        ([USER, ANSWER | {"content": "a\0b"}], "NUL"),
        ([USER], "no assistant turn"),
        ([USER, ANSWER | {"loss": False}], "every turn has loss false"),
    ],
)
def test_every_reason_is_named(value: Any, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        parse(value)
