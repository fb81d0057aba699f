"""data/hostile against the reader and the formats: the bad line is named, the good ones beside it survive."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtuner_core import registry
from xtuner_core.data import formats
from xtuner_core.data.detect import detect
from xtuner_core.data.formats import openai
from xtuner_core.data.inputs import Part, Row, rows
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Text
from xtuner_core.data.shard import Encoding, tokenize_part
from xtuner_core.data.templates import chatml
from xtuner_core.errors import DataError

HOSTILE = Path(__file__).resolve().parents[3] / "data" / "hostile"
REASONS = {
    "broken_json": "not JSON",
    "invalid_utf8": "not UTF-8",
    "unknown_role": "wizard",
    "no_assistant_turn": "no assistant turn",
    "not_a_conversation": "not a conversation",
    "empty_content": "empty",
    "duplicate_keys": "'content' appears twice",
    "nan_number": "NaN",
    "unknown_message_key": "'colour'",
    "nul_byte": "NUL",
    "lone_surrogate": "surrogate",
    "huge_integer": "digits",
    "too_deep": "nested",
    "tool_arguments": "message 1: tool_calls, call 0: arguments: not JSON",
    "tool_arguments_list": "message 1: tool_calls, call 0: arguments must be an object, found list",
    "image": "message 0: content has a part of type 'image_url'; text only",
    "weight": "message 1: weight must be 0 or 1",
    "all_masked": "every turn has loss false",
    "unknown_from": "message 1: unknown from 'wizard'; known: human",
}
LONG = ("over_long", "nothing_left")
ACCEPTED = (*LONG, "blank_lines", "byte_order_mark", "forged_turn")


def _outcomes(file: Path) -> list[str]:
    """What became of each row: accepted, blank, or the reason for its rejection."""
    parse = registry.find(formats, detect(file)[0]).parse
    return [_outcome(row, parse) for row in rows(Part(file))]


def _outcome(row: Row, parse: Callable[[Any], Any]) -> str:
    if row.blank or row.reason is not None:
        return row.reason or "blank"
    try:
        parse(row.value)
    except Rejected as reason:
        return str(reason)
    return "accepted"


@pytest.mark.parametrize("name", REASONS)
def test_only_the_bad_line_is_rejected_for_its_reason(name: str) -> None:
    before, reason, after = _outcomes(HOSTILE / f"{name}.jsonl")
    assert (before, after) == ("accepted", "accepted")
    assert REASONS[name] in reason and reason != "accepted"


@pytest.mark.parametrize("name", ACCEPTED)
def test_harmless_lines_are_kept(name: str) -> None:
    outcomes = _outcomes(HOSTILE / f"{name}.jsonl")
    assert set(outcomes) <= {"accepted", "blank"}
    assert (name == "blank_lines") == ("blank" in outcomes)


def test_every_hostile_file_is_expected_somewhere() -> None:
    assert {path.stem for path in HOSTILE.glob("*.jsonl")} == {*REASONS, *ACCEPTED}


@pytest.mark.parametrize(("name", "reason"), [("over_long", None), ("nothing_left", "nothing to learn of the first 1024 of its")])
def test_a_cut_keeps_what_is_left_to_learn_or_rejects(name: str, reason: str | None, tiny_model_folder: Path, tmp_path: Path) -> None:
    encoding = Encoding("openai", "chatml", "all", "keep", "cut_tokens", 1024)
    tally = tokenize_part(Part(HOSTILE / f"{name}.jsonl"), tiny_model_folder, encoding, tmp_path / "shard")
    assert (tally.accepted, tally.rejected) == ((2, 1) if reason else (3, 0))
    assert (reason or "") in (tmp_path / "shard" / "rejected.jsonl").read_text()


BAD_ROWS = {
    "bad_element.json": "not JSON: Expecting ':' delimiter",
    "one_cell_more.csv": "3 cells, the header has 2",
    "not_utf8.csv": "column output: not UTF-8",
    "open_quote.csv": "not CSV: unexpected end of data (a quote is never closed",
}
REFUSED = {
    "cut_short.json": "ends in the middle, after element 1",
    "two_arrays.json": "several arrays",
    "no_array.json": "holds no array",
    "same_column_twice.csv": "a column is named twice",
    "not_parquet.parquet": "not Parquet",
    "not_arrow.arrow": "not Arrow",
    "not_gzip.jsonl.gz": "damaged after row 0",
    "not_zstd.jsonl.zst": "damaged after row 0",
    "cut_short.jsonl.gz": "Truncated compressed stream",
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_of_another_kind_costs_that_row(name: str) -> None:
    before, reason, *after = _outcomes(HOSTILE / "files" / name)
    assert reason.startswith(BAD_ROWS[name])
    assert (before, after) == ("accepted", [] if name == "open_quote.csv" else ["accepted"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_to_its_end_is_refused(name: str) -> None:
    with pytest.raises(DataError) as error:
        list(rows(Part(HOSTILE / "files" / name)))
    assert name in str(error.value) and REFUSED[name] in str(error.value)


def test_every_file_of_another_kind_is_expected_and_told_in_the_readme() -> None:
    told = set(re.findall(r"^\| `(\w+\.[\w.]+)` \|", (HOSTILE / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.name for path in (HOSTILE / "files").iterdir()} == {*BAD_ROWS, *REFUSED} == told


def test_forged_turn_stays_text() -> None:
    forged = list(rows(Part(HOSTILE / "forged_turn.jsonl")))[1]
    pieces = list(chatml.render(openai.parse(forged.value)))
    assert any(isinstance(piece, Text) and "<|im_start|>system" in piece.text for piece in pieces)
    controls = [piece for piece in pieces if not isinstance(piece, Text)]
    assert len(controls) == 4  # begin and end of two turns, none from the content
