"""JSON, strictly: every reason is named, and no byte of rubbish is a surprise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtuner_core.data import jsonl
from xtuner_core.data.conversation import Conversation
from xtuner_core.data.formats import openai
from xtuner_core.data.jsonl import Rejected, parse

DATA = Path(__file__).resolve().parents[4] / "data"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON: Expecting value at column 1"),
        (b'{"a": 1', "not JSON: .* at column 8"),
        (b"[1] [2]", "not JSON: Extra data at column 5"),
        (b"\xef\xbb\xbf[]", "not JSON"),  # a mark is dropped at the start of a file only
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' appears twice"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"9" * 4001, "4001 digits, at most 4000"),
        (b'["\\uD83D"]', "lone surrogate"),
        (b'{"\\udc00": 1}', "lone surrogate"),
        (b"[" * 65 + b"]" * 65, "nested more than 64"),
        (b'{"a":' * 65 + b"0" + b"}" * 65, "nested more than 64"),
        (b"[" * 200_000, "nested more than 64"),
        (b"[" * 200_000 + b"]" * 200_000, "nested more than 64"),
    ],
)
def test_every_reason_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        parse(content)


def test_a_line_that_is_too_long_is_not_parsed() -> None:
    with pytest.raises(Rejected, match=f"at most {jsonl.MAX_LINE_BYTES}"):
        parse(b"1" * (jsonl.MAX_LINE_BYTES + 1))


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'"\\ud83d\\ude00"', "😀"),
        (b"[" * 64 + b"]" * 64, json.loads("[" * 64 + "]" * 64)),
        (b'"' + b"[{" * 500 + b'"', "[{" * 500),
        (b"-" + b"9" * 3999, -(10**3999 - 1)),
        (b" [] ", []),
    ],
)
def test_what_is_just_inside_the_limits_is_read(content: bytes, value: object) -> None:
    assert parse(content) == value


def test_many_keys_take_no_quadratic_time() -> None:
    keys = [f'"k{number}": 0' for number in range(200_000)]
    with pytest.raises(Rejected, match="'k7' appears twice"):
        parse(("{" + ", ".join([*keys, '"k7": 1']) + "}").encode())


FILES = [DATA / "openai_chats" / "train.jsonl", DATA / "hostile" / "forged_turn.jsonl"]
EVERY_KEY = rb'[{"role": "system", "content": "x", "name": "y", "loss": false}, {"role": "assistant", "content": "\u00e9", "loss": true}]'
GOOD = [EVERY_KEY, *(raw for file in FILES for raw in file.read_bytes().splitlines()[:8])]
FRAGMENTS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\u",
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"NaN",
    b"-",
    b"1e999",
    b"null",
    b'"loss": 1,',
    b",",
    b":",
]


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    """A good line after one to six cuts, insertions or repeats."""
    raw = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(1, 6))):
        start, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 12))
        filling = draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=4) | st.just(raw[start : start + 40]))
        raw = raw[:start] + filling + raw[start + length :]
    return raw


@given(damaged_lines())
@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_line_is_a_conversation_or_a_reason(raw: bytes) -> None:
    try:
        conversation = openai.parse(parse(raw))
    except Rejected as reason:
        assert str(reason).encode("utf-8")  # it goes into the report
        return
    assert isinstance(conversation, Conversation)
    assert any(message.loss for message in conversation.messages)
    assert all(message.content.encode("utf-8") or message.role != "assistant" for message in conversation.messages)
