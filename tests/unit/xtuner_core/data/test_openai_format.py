"""The OpenAI format: the spellings of one conversation, tools and thinking, what loss means, and every reason to reject."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from xtuner_core.data.conversation import ToolCall
from xtuner_core.data.formats.openai import parse, recognises
from xtuner_core.data.jsonl import Rejected

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"messages": m, "id": 7}, lambda m: {"dialogs": m}, lambda m: {"conversations": m}]
)
def test_the_spellings_of_one_conversation(wrap: Any) -> None:
    assert parse(wrap([USER, ANSWER])).as_dicts() == [USER, ANSWER]


def test_assistant_turns_are_learned_unless_they_say_no() -> None:
    messages = [{"role": "system", "content": ""}, USER | {"loss": True}, ANSWER | {"loss": False}, USER, ANSWER]
    assert [message.loss for message in parse(messages).messages] == [False, True, False, False, True]


@pytest.mark.parametrize(("marks", "learned"), [({"weight": 0}, False), ({"weight": 1.0}, True), ({"loss": False, "weight": 0}, False)])
def test_weight_is_loss_as_in_openais_fine_tuning(marks: Any, learned: bool) -> None:
    assert [message.loss for message in parse([USER, ANSWER | marks, USER, ANSWER]).messages] == [False, learned, False, True]


def test_what_is_null_was_never_there() -> None:
    nulls = dict.fromkeys(["refusal", "function_call", "audio", "tool_calls", "name", "tool_call_id", "loss", "weight", "thinking"])
    assert parse([USER, ANSWER | nulls | {"annotations": []}]) == parse([USER, ANSWER])


def test_a_call_and_its_result_have_no_need_of_content() -> None:
    tool = {"role": "tool", "content": None, "tool_call_id": "c1", "name": "f"}
    call, result = parse([USER, {"role": "assistant", "tool_calls": [CALL]}, tool, ANSWER]).messages[1:3]
    assert (call.content, call.tool_calls, call.loss) == ("", (ToolCall("f", {"x": [1, None]}, "c1"),), True)
    assert (result.content, result.tool_call_id, result.name, result.loss) == ("", "c1", "f", False)


@pytest.mark.parametrize(
    "call", [CALL, CALL | {"function": {"name": "f", "arguments": {"x": [1, None]}}}, {"id": "c1", **CALL["function"]}]
)
def test_the_spellings_of_a_call(call: Any) -> None:
    [_, message] = parse([USER, {"role": "assistant", "content": None, "tool_calls": [call]}]).messages
    assert message.tool_calls == (ToolCall("f", {"x": [1, None]}, "c1"),)


@pytest.mark.parametrize("spell", [lambda tool: [tool], lambda tool: [tool["function"]], lambda tool: json.dumps([tool])])
def test_the_spellings_of_tools(spell: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert parse({"messages": [USER, ANSWER], "tools": spell(tool)}).tools == (tool,)


@pytest.mark.parametrize(
    ("message", "thinking", "content"),
    [
        ({"reasoning_content": "hm"}, "hm", "a"),
        ({"thinking": "hm", "reasoning": None}, "hm", "a"),
        ({"reasoning": "hm"}, "hm", "a"),
        ({"content": "<think>\nhm\n\nso\n</think>\n\na\n"}, "hm\n\nso", "a\n"),
        ({"content": "<think>\n\n</think>\n\na"}, "", "a"),
        ({"content": "<think>a"}, None, "<think>a"),
        ({"content": "a <think>b</think>"}, None, "a <think>b</think>"),
        ({"content": "<think>b</think>a", "thinking": "hm"}, "hm", "<think>b</think>a"),
        ({"content": "<think>b</think>a</think>c"}, "b", "a</think>c"),
    ],
)
def test_thinking_stands_apart_from_the_answer(message: Any, thinking: str | None, content: str) -> None:
    answer = parse([USER, ANSWER | message]).messages[1]
    assert (answer.thinking, answer.content) == (thinking, content)


def test_parts_of_text_are_joined_and_a_users_tags_stay() -> None:
    parts = [{"type": "text", "text": "<think>a"}, {"type": "text", "text": "</think>", "image_url": None}]
    assert parse([USER | {"content": parts}, ANSWER]).messages[0].content == "<think>a</think>"


def test_a_system_prompt_beside_the_messages() -> None:
    system = {"role": "system", "content": "s"}
    for messages in ([USER, ANSWER], [system, USER, ANSWER]):
        assert parse({"system": "s", "messages": messages}) == parse([system, USER, ANSWER])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "not a conversation"),
        ({"talk": []}, "not a conversation"),
        ({"messages": {}}, "not a conversation"),
        ([], "no messages"),
        (["hi"], "message 0: expected an object, found str"),
        ([USER, {"role": "wizard", "content": "x"}], "message 1: unknown role 'wizard'; known: system, developer, user, assistant, tool"),
        ([USER, {"role": ["user"], "content": "x"}], "message 1: unknown role"),
        ([USER, {"content": "x"}], "message 1: unknown role None"),
        ([USER, {"role": "assistant", "content": None}], "message 1: content must be text, found NoneType"),
        (
            [USER | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
            "message 0: content has a part of type 'image_url'; text only",
        ),
        ([USER | {"content": ["x"]}, ANSWER], "a part of type 'str'; text only"),
        ([USER | {"content": [{"type": "text", "text": 1}]}, ANSWER], "message 0: content must be text, found int"),
        ([USER, ANSWER | {"colour": "x"}], "message 1: unknown key 'colour'; known: content, loss, meta, name, reasoning"),
        ([USER, ANSWER | {"refusal": "no"}], "message 1: unknown key 'refusal'"),
        ([USER, ANSWER | {"weight": 0.5}], "message 1: weight must be 0 or 1"),
        ([USER | {"weight": 1}, ANSWER], "message 0: weight must be 0 or 1, in a turn of the assistant"),
        ([USER, ANSWER | {"weight": 1, "loss": False}], "message 1: loss and weight contradict"),
        ([USER, ANSWER | {"name": 7}], "message 1: name must be text, found int"),
        ([USER | {"thinking": "hm"}, ANSWER], "message 0: thinking in a turn of the user"),
        ([USER | {"tool_calls": [CALL]}, ANSWER], "message 0: tool_calls in a turn of the user"),
        ([USER, ANSWER | {"thinking": "a", "reasoning": "b"}], "message 1: two different thinkings, in thinking and reasoning"),
        ([USER, ANSWER | {"thinking": "a\0"}], "message 1: thinking holds a NUL"),
        ([USER, ANSWER | {"content": "<think>\nhm\n</think>\n"}], "message 1: empty answer"),
        ([USER, ANSWER | {"tool_calls": {"a": 1}}], "message 1: tool_calls must be a list, found dict"),
        ([USER, ANSWER | {"tool_calls": ["f"]}], "message 1: tool_calls, call 0: expected an object, found str"),
        ([USER, ANSWER | {"tool_calls": [{"function": "f"}]}], "call 0: function must be an object, found str"),
        ([USER, ANSWER | {"tool_calls": [CALL | {"extra": 1}]}], "call 0: unknown key 'extra'"),
        ([USER, called("{")], "call 0: arguments: not JSON: .* at column 2"),
        ([USER, called('{"a": 1, "a": 2}')], "arguments: key 'a' appears twice"),
        ([USER, called("[]")], "call 0: arguments must be an object, found list"),
        ([USER, called(None)], "call 0: arguments must be an object, found NoneType"),
        ([USER, called({"when": date(2024, 1, 1)})], "call 0: arguments: not JSON: .*date"),
        ([USER, ANSWER | {"tool_calls": [{"function": {"name": 1, "arguments": {}}}]}], "call 0: name must be text"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools: not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools must be a list, found dict"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "tool 0 must be an object, found str"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tool 0: name must be text"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "two system prompts"),
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


@pytest.mark.parametrize("value", [[USER], {"messages": [USER]}, {"dialogs": [USER], "tools": []}, {"conversations": [USER]}])
def test_it_is_recognised_by_roles(value: Any) -> None:
    assert "messages with a role" in str(recognises(value))


@pytest.mark.parametrize("value", [[], {}, 1, None, "x", [1], {"messages": "x"}, {"messages": [{"from": "x"}]}, [{"role": "pretrain"}]])
def test_other_values_are_not(value: Any) -> None:
    assert recognises(value) is None
