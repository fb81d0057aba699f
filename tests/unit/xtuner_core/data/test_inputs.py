"""Input files of every kind: which are found, and every row of them read, with its place, in bounded memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xtuner_core.data.inputs import Part, input_files, rows
from xtuner_core.errors import DataError


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"").rstrip(b"\r")), max_size=20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_numbers_and_offsets_lead_back_to_the_bytes(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], mark: bool) -> None:
    assume(not (contents and contents[0].startswith(b"\xef\xbb\xbf")))
    file = tmp_path_factory.getbasetemp() / "offsets.jsonl"
    start = b"\xef\xbb\xbf" if mark else b""
    file.write_bytes(raw := start + b"".join(content + b"\r\n" for content in contents))
    found = list(rows(Part(file)))
    assert [row.number for row in found] == list(range(1, len(contents) + 1))
    assert [row.blank for row in found] == [not content.strip() for content in contents]
    edges = [*(row.offset for row in found), len(raw)]
    assert [raw[left:right] for left, right in pairwise(edges)] == [content + b"\r\n" for content in contents]


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
