"""Held-out conversations: what is asked, what is expected, and a clear word about a bad line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.heldout import HeldOut, read_heldout
from xtuner_core.errors import DataError

USER = {"role": "user", "content": "Where is my parcel?"}
ANSWER = {"role": "assistant", "content": "shipping"}


def _file(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "heldout.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER], "id": 7}, [USER, ANSWER]])
def test_object_and_bare_list_mean_the_same(tmp_path: Path, row: object) -> None:
    assert read_heldout(_file(tmp_path, json.dumps(row))) == [HeldOut((USER,), "shipping", 1)]


def test_the_cut_is_before_the_last_assistant_turn(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Route."}
    last = {"role": "assistant", "content": "  billing\n"}
    (sample,) = read_heldout(_file(tmp_path, json.dumps([system, USER, ANSWER, USER, last])))
    assert sample.messages == (system, USER, ANSWER, USER)
    assert sample.expected == "  billing\n"


def test_only_role_and_text_are_sent(tmp_path: Path) -> None:
    (sample,) = read_heldout(_file(tmp_path, json.dumps([USER | {"loss": False, "name": "eve"}, ANSWER])))
    assert sample.messages == (USER,)


def test_blank_lines_windows_ends_and_byte_order_mark(tmp_path: Path) -> None:
    row = json.dumps([USER, ANSWER])
    samples = read_heldout(_file(tmp_path, b"\xef\xbb\xbf" + row.encode() + b"\r", "", "  ", row, ""))
    assert [sample.line for sample in samples] == [1, 4]


def test_a_line_separator_inside_a_text_does_not_split_it(tmp_path: Path) -> None:
    row = json.dumps([{"role": "user", "content": "a\u2028b\u0085c"}, ANSWER], ensure_ascii=False)
    assert read_heldout(_file(tmp_path, row))[0].messages[0]["content"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "is not JSON"),
        (b'["\xff"]', "is not UTF-8"),
        ("7", "holds no list of messages"),
        ('{"text": "hello"}', "holds no list of messages"),
        ("[]", "has no assistant turn"),
        (json.dumps([ANSWER]), "has no assistant turn after a question"),
        (json.dumps([USER]), "has no assistant turn"),
        (json.dumps(["hello", ANSWER]), "message 0 is not an object"),
        (json.dumps([USER, {"role": "bot", "content": "x"}]), "message 1 has role 'bot'"),
        (json.dumps([USER, {"role": "assistant", "content": None}]), "message 1 (assistant) has no text"),
        (json.dumps([{"role": "user", "content": "\ud800"}, ANSWER]), "half a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = _file(tmp_path, json.dumps([USER, ANSWER]), line)
    with pytest.raises(DataError) as caught:
        read_heldout(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl.*No such file"):
        read_heldout(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="holds no conversation"):
        read_heldout(_file(tmp_path, "", " "))


def test_question_and_answer_are_a_conversation_in_lines_and_tables(tmp_path: Path) -> None:
    table = tmp_path / "heldout.csv"
    table.write_text('question,answer\n"Where, then?",here\n', encoding="utf-8")
    asked = {"role": "user", "content": "Where, then?"}
    assert read_heldout(table) == [HeldOut((asked,), "here", 2)]
    assert read_heldout(_file(tmp_path, '{"question": "Where, then?", "answer": "here"}')) == [HeldOut((asked,), "here", 1)]
    table.write_text("question,reply\nWhere?,here\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"heldout\.csv:2: holds no list of messages; .* or question and answer"):
        read_heldout(table)
