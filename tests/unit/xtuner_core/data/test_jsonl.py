"""The reader of JSON lines: every line is read, every reason is named, and no byte of rubbish is a surprise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtuner_core.data import jsonl
from xtuner_core.data.conversation import Conversation
from xtuner_core.data.formats import openai
from xtuner_core.data.jsonl import Line, Rejected, input_files, parse, read_lines
from xtuner_core.errors import DataError

DATA = Path(__file__).resolve().parents[4] / "data"


def line(content: bytes) -> Line:
    return Line(Path("x.jsonl"), 1, 0, content)


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
        parse(line(content))


def test_a_line_that_is_too_long_is_not_parsed() -> None:
    with pytest.raises(Rejected, match=f"at most {jsonl.MAX_LINE_BYTES}"):
        parse(line(b"1" * (jsonl.MAX_LINE_BYTES + 1)))


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
    assert parse(line(content)) == value


def test_many_keys_take_no_quadratic_time() -> None:
    keys = [f'"k{number}": 0' for number in range(200_000)]
    with pytest.raises(Rejected, match="'k7' appears twice"):
        parse(line(("{" + ", ".join([*keys, '"k7": 1']) + "}").encode()))


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"").rstrip(b"\r")), max_size=20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_numbers_and_offsets_lead_back_to_the_bytes(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], mark: bool) -> None:
    file = tmp_path_factory.getbasetemp() / "offsets.jsonl"
    start = b"\xef\xbb\xbf" if mark else b""
    file.write_bytes(raw := start + b"".join(content + b"\r\n" for content in contents))
    lines = list(read_lines(file))
    assert [one.number for one in lines] == list(range(1, len(lines) + 1))
    rest = lines[1:] if contents else []
    assert [raw[one.offset : one.offset + len(one.content)] for one in rest] == [one.content for one in rest]
    if contents and not contents[0].startswith(b"\xef\xbb\xbf"):
        assert [one.content for one in lines] == contents


def test_input_files_of_a_path_a_folder_and_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl"))
    assert input_files([b]) == [b]
    assert input_files([tmp_path]) == [a, b, c]
    assert input_files([f"{tmp_path}/*.jsonl"]) == [a, b]
    assert input_files([b, tmp_path, b]) == [b, a, c]


@pytest.mark.parametrize("missing", ["gone.jsonl", "empty", "*.json"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=missing.replace("*", r"\*") + ": no such file"):
        input_files([tmp_path / missing])


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
        conversation = openai.parse(parse(line(raw)))
    except Rejected as reason:
        assert str(reason).encode("utf-8")  # it goes into the report
        return
    assert isinstance(conversation, Conversation)
    assert any(message.loss for message in conversation.messages)
    assert all(message.content.encode("utf-8") or message.role != "assistant" for message in conversation.messages)
