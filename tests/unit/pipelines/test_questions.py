"""Files of questions with choices and of texts: what they mean, and a clear word about a bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.questions import read_choices, read_measured
from xtuner_core.errors import DataError

GOOD: dict[str, Any] = {"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"}


def _jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    table = tmp_path / "set.csv"
    table.write_text('question,A,B,C,answer\n2 + 2?,3,4,,B\n"a, b?",x,y,z,A\n', encoding="utf-8")
    first, second = read_choices(table)
    (same,) = read_choices(_jsonl(tmp_path, GOOD))
    assert (first.question, dict(first.choices), first.answer, first.chat) == (same.question, dict(same.choices), same.answer, same.chat)
    assert (first.place, second.place, same.place) == (f"{table}:2", f"{table}:3", f"{tmp_path / 'set.jsonl'}:1")
    assert second.choices == {"A": "x", "B": "y", "C": "z"}


def test_a_text_is_continued_and_a_question_asked(tmp_path: Path) -> None:
    text = {name: value for name, value in GOOD.items() if name != "question"} | {"text": "Two and two are"}
    assert [question.chat for question in read_choices(_jsonl(tmp_path, GOOD, text))] == [True, False]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "D"}, "answer 'D' is not one of the choices A, B"),
        ({"answer": "4"}, "answer '4' is not one"),
        ({"answer": None}, "answer None is not one"),
        ({"answer": ["B"]}, r"answer ['B'] is not one"),
        ({"question": ""}, "either a question"),
        ({"text": "both"}, "either a question"),
        ({"question": 7}, "must be text"),
        ({"question": " "}, "must be text"),
        ({"B": ""}, "needs the choices A, B and so on without a gap, found A"),
        ({"D": "5"}, "without a gap, found A, B, D"),
        ({"A": "4"}, "two choices are the same"),
    ],
)
def test_a_bad_question_is_named_with_its_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = _jsonl(tmp_path, GOOD, GOOD | change)
    with pytest.raises(DataError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_a_table_without_a_column_is_told(tmp_path: Path) -> None:
    table = tmp_path / "set.csv"
    table.write_text("question,A,B\n2 + 2?,3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"set\.csv:2: answer None is not one of the choices A, B"):
        read_choices(table)
    table.write_text("question,A,B,answer\n2 + 2?,3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"set\.csv:2: 3 cells, the header has 4"):
        read_choices(table)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "set.jsonl").write_text(content)
    for read in (read_choices, read_measured):
        with pytest.raises(DataError, match=r"set\.jsonl: holds no sample"):
            read(tmp_path / "set.jsonl")


def test_measured_texts_are_conversations_or_plain(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    plain, bare, object_ = read_measured(_jsonl(tmp_path, {"text": "Once upon"}, turns, {"messages": turns, "id": 7}))
    assert (plain.row, plain.question, plain.text) == ({"text": "Once upon"}, "", "Once upon")
    assert (bare.question, bare.text) == (object_.question, object_.text) == ("Hi", "Hello")
    with pytest.raises(DataError, match=r"set\.jsonl:1: "):
        read_measured(_jsonl(tmp_path, turns[:1]))
