"""The other formats: what each means, each reason to reject, and which one a file is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner_core import registry
from xtuner_core.data import formats
from xtuner_core.data.conversation import Conversation, Message, Passage, Preference, Prompt, Sample, ToolCall
from xtuner_core.data.detect import detect
from xtuner_core.data.jsonl import Rejected
from xtuner_core.errors import DataError

USER, ANSWER, BAD = Message("user", "q"), Message("assistant", "a", True), Message("assistant", "b", True)
SYSTEM = Message("system", "s")
ASK, SAY, SAY_BAD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
TOOL = {"type": "function", "function": {"name": "f"}}
PAIR = Preference((USER,), (ANSWER,), (BAD,))
TALK = Conversation((USER, ANSWER))

MEANINGS: list[tuple[str, Any, Sample]] = [
    ("sharegpt", {"conversations": [HUMAN, GPT], "id": 1}, TALK),
    ("sharegpt", {"conversations": [HUMAN | {"from": "user"}, GPT | {"from": "model", "weight": None}]}, TALK),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": "s"}, Conversation((SYSTEM, *TALK.messages))),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": "", "tools": "[]"}, TALK),
    ("sharegpt", {"conversations": [HUMAN, GPT], "tools": '[{"name": "f"}]'}, Conversation(TALK.messages, (TOOL,))),
    ("sharegpt", {"conversations": [HUMAN, GPT | {"weight": 0}, GPT]}, Conversation((USER, Message("assistant", "a"), ANSWER))),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, HUMAN, CALL, {"from": "observation", "value": "1"}, GPT]},
        Conversation(
            (SYSTEM, USER, Message("assistant", "", True, tool_calls=(ToolCall("f", {"x": 1}),)), Message("tool", "1"), ANSWER),
        ),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "text": "ignored"}, TALK),
    ("alpaca", {"instruction": "q", "output": "a", "system": "s"}, Conversation((SYSTEM, *TALK.messages))),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, Conversation((Message("user", "q\nx"), ANSWER))),
    ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": [["q", "b"]]}, Conversation((USER, BAD, USER, ANSWER))),
    ("alpaca", {"instruction": "q", "output": "<think>\nhm\n</think>\n\na"}, Conversation((USER, Message("assistant", "a", True, "hm")))),
    ("xtuner", {"conversation": [{"system": "s", "input": "q", "output": "a"}]}, Conversation((SYSTEM, *TALK.messages))),
    (
        "xtuner",
        {"conversation": [{"input": "q", "output": "a", "output_with_loss": False}, {"input": "q", "output": "b"}]},
        Conversation((USER, Message("assistant", "a"), USER, BAD)),
    ),
    ("xtuner", {"conversation": [{"output": "a"}]}, Conversation((ANSWER,))),
    ("text", {"text": "words\n", "url": "x"}, Passage("words\n")),
    ("text", {"content": "words"}, Passage("words")),
    ("text", {"messages": [{"role": "pretrain", "content": "words"}]}, Passage("words")),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
    ("preference", {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY_BAD]}, PAIR),
    ("preference", {"prompt": "q", "chosen": [ASK, SAY], "rejected": [ASK, SAY_BAD]}, PAIR),
    ("preference", {"chosen": [ASK, SAY], "rejected": [ASK, SAY_BAD]}, PAIR),
    ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}}, PAIR),
    ("preference", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PAIR),
    ("preference", {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, Preference((SYSTEM, USER), (ANSWER,), (BAD,))),
    ("rl_prompt", {"data_source": "d", "prompt": [ASK], "reward_model": {"ground_truth": "72"}}, Prompt((USER,), "72", "d")),
    ("rl_prompt", {"prompt": "q", "reward_model": {"ground_truth": ["é", 1]}}, Prompt((USER,), '["é", 1]')),
]


@pytest.mark.parametrize(("name", "value", "sample"), MEANINGS)
def test_what_a_value_means_and_that_only_its_format_recognises_it(name: str, value: Any, sample: Sample) -> None:
    assert registry.find(formats, name).parse(value) == sample
    assert [other for other in registry.names(formats) if registry.find(formats, other).recognises(value)] == [name]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *((name, value, "expected|must be text, found NoneType") for name in registry.names(formats) for value in (None, 1, "x", {})),
        ("sharegpt", {"conversations": []}, "no messages"),
        ("sharegpt", {"conversations": ["x"]}, "message 0: expected an object, found str"),
        (
            "sharegpt",
            {"conversations": [HUMAN, {"from": "alien", "value": "x"}]},
            "message 1: unknown from 'alien'; known: human, user, gpt",
        ),
        ("sharegpt", {"conversations": [HUMAN, {"from": ["gpt"], "value": "x"}]}, "message 1: unknown from"),
        ("sharegpt", {"conversations": [HUMAN, GPT | {"colour": 1}]}, "message 1: unknown key 'colour'; known: from, loss, value, weight"),
        ("sharegpt", {"conversations": [HUMAN, GPT | {"value": None}]}, "message 1: value must be text"),
        ("sharegpt", {"conversations": [HUMAN, GPT | {"value": ""}]}, "message 1: empty answer"),
        ("sharegpt", {"conversations": [HUMAN, CALL | {"value": "f(x)"}]}, "message 1: function_call: not JSON"),
        ("sharegpt", {"conversations": [HUMAN, CALL | {"value": "[]"}]}, "message 1: the function_call holds no call"),
        (
            "sharegpt",
            {"conversations": [HUMAN, CALL | {"value": '{"name": "f"}'}]},
            "message 1: function_call: arguments must be an object",
        ),
        ("sharegpt", {"conversations": [HUMAN]}, "no assistant turn"),
        ("alpaca", {"instruction": "q", "output": ""}, "output: empty answer"),
        ("alpaca", {"instruction": 1, "output": "a"}, "instruction must be text, found int"),
        ("alpaca", {"instruction": "q\0", "output": "a"}, "instruction holds a NUL"),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, "history must be a list"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, "history, pair 0: expected \\[question, answer\\]"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q", 1]]}, "history, pair 0: answer must be text"),
        ("xtuner", {"conversation": []}, "no turns"),
        ("xtuner", {"conversation": ["x"]}, "turn 0: expected an object"),
        ("xtuner", {"conversation": [{"output": "a", "colour": 1}]}, "turn 0: unknown key 'colour'"),
        ("xtuner", {"conversation": [{"output": "a"}, {"output": "a", "system": "s"}]}, "turn 1: system belongs to the first turn"),
        ("xtuner", {"conversation": [{"output": "a", "output_with_loss": 1}]}, "turn 0: output_with_loss must be true or false"),
        ("xtuner", {"conversation": [{"output": "a", "output_with_loss": False}]}, "every turn has loss false"),
        ("text", {"text": ""}, "empty text"),
        ("text", {"text": 1}, "text must be text, found int"),
        ("text", {"text": "a", "content": "b"}, "not under both"),
        ("text", {"messages": [{"role": "pretrain", "content": None}]}, "text must be text"),
        ("preference", {"prompt": "q", "chosen": "a"}, "rejected: expected a text or a list of messages, found NoneType"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: text: empty answer"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen: must end with a turn of the assistant that"),
        ("preference", {"prompt": "q", "chosen": [ASK], "rejected": "a"}, "chosen: must end with"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no prompt"),
        ("preference", {"prompt": [{"role": "x"}], "chosen": "a", "rejected": "b"}, "prompt: message 0: unknown role"),
        ("rl_prompt", {"prompt": "q", "reward_model": {}}, "reward_model: no ground_truth"),
        ("rl_prompt", {"prompt": "q", "reward_model": {"ground_truth": float("nan")}}, "reward_model: ground_truth: "),
        ("rl_prompt", {"prompt": [], "reward_model": {"ground_truth": 1}}, "prompt: must have messages"),
        ("rl_prompt", {"prompt": [ASK, SAY], "reward_model": {"ground_truth": 1}}, "end before the assistant"),
        ("rl_prompt", {"prompt": "q", "reward_model": {"ground_truth": 1}, "data_source": 1}, "data_source must be text"),
    ],
)
def test_every_reason_is_named(name: str, value: Any, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        registry.find(formats, name).parse(value)


def written(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_file_is_in_the_format_of_its_first_rows_that_any_format_knows(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", 7, {"id": 1}, {"instruction": "q", "output": "a"})
    assert detect(file) == ("alpaca", "'instruction' and 'output'")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "no row in it can be read"),
        ([7, 8], "no format fits its first rows; row 1 is a int. Set data.format to one of alpaca, openai, "),
        ([{"frage": "q", "antwort": "a"}], "row 1 is an object with the keys frage, antwort"),
        (
            [{"text": "x"}, [ASK, SAY]],
            r"several formats fit: text \(row 1: the key 'text'\); openai \(row 2: a list of messages with a role\)",
        ),
        (
            [{"messages": [ASK, SAY], "chosen": "a", "rejected": "b"}],
            r"openai \(row 1: .*\); preference \(row 1: .*Set data.format to one of openai",
        ),
    ],
)
def test_a_file_of_no_format_or_of_several_is_named(tmp_path: Path, values: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: .*" + told):
        detect(written(tmp_path / "a.jsonl", *values))


SHARED = Path(__file__).resolve().parents[5] / "shared" / "data"


@pytest.mark.parametrize(
    ("pattern", "name"), [("openai_sft", "openai"), ("gsm8k_train*", "rl_prompt"), ("gsm8k_val*", "rl_prompt"), ("pretrain*", "text")]
)
def test_the_public_samples_are_read_whole(pattern: str, name: str) -> None:
    files = list(SHARED.glob(f"{pattern}.jsonl"))
    if not files:
        pytest.skip(f"{pattern}.jsonl is not beside the project")
    assert detect(files[0])[0] == name
    parse = registry.find(formats, name).parse
    assert all(parse(json.loads(line)) for line in files[0].read_text(encoding="utf-8").splitlines())
