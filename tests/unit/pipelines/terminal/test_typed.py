"""Messages of one line and of several."""

from __future__ import annotations

import io
import sys

import pytest

from pipelines.terminal.typed import read_message


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\nmore\\\nstill\nnext\n", ["one\nmore\nstill", "next"]),
        ('"""\none\n\n  two\n"""\nnext\n', ["one\n\n  two", "next"]),
        ('"""one\ntwo"""\nnext\n', ["one\ntwo", "next"]),
        ('"""one"""\nnext\n', ["one", "next"]),
        ('""""""\n', [""]),
        ('"""one\nuntil the end', ["one\nuntil the end"]),
        ("one\\", ["one\\"]),
        ('say """ here\n', ['say """ here']),
        ("\n", [""]),
        ("", []),
    ],
)
def test_messages(typed: str, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    read = []
    with pytest.raises(EOFError):
        while True:
            read.append(read_message(""))
    assert read == messages


def test_bytes_that_are_no_text_become_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape"))
    assert read_message("") == "caf?"
