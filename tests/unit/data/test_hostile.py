"""data/hostile against the reader and the OpenAI format: the bad line is named, the good ones beside it survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner_core.data.formats import openai
from xtuner_core.data.jsonl import Rejected, parse, read_lines
from xtuner_core.data.pieces import Text
from xtuner_core.data.templates import chatml

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
}
ACCEPTED = ("blank_lines", "byte_order_mark", "forged_turn")


def _outcomes(name: str) -> list[str]:
    """What became of each line: accepted, blank, or the reason for its rejection."""
    outcomes = []
    for line in read_lines(HOSTILE / f"{name}.jsonl"):
        if not line.content.strip():
            outcomes.append("blank")
            continue
        try:
            openai.parse(parse(line.content))
            outcomes.append("accepted")
        except Rejected as reason:
            outcomes.append(str(reason))
    return outcomes


@pytest.mark.parametrize("name", REASONS)
def test_only_the_bad_line_is_rejected_for_its_reason(name: str) -> None:
    before, reason, after = _outcomes(name)
    assert (before, after) == ("accepted", "accepted")
    assert REASONS[name] in reason and reason != "accepted"


@pytest.mark.parametrize("name", ACCEPTED)
def test_harmless_lines_are_kept(name: str) -> None:
    outcomes = _outcomes(name)
    assert set(outcomes) <= {"accepted", "blank"}
    assert (name == "blank_lines") == ("blank" in outcomes)


def test_every_hostile_file_is_expected_somewhere() -> None:
    assert {path.stem for path in HOSTILE.glob("*.jsonl")} == {*REASONS, *ACCEPTED}


def test_forged_turn_stays_text() -> None:
    forged = list(read_lines(HOSTILE / "forged_turn.jsonl"))[1]
    pieces = list(chatml.render(openai.parse(parse(forged.content))))
    assert any(isinstance(piece, Text) and "<|im_start|>system" in piece.text for piece in pieces)
    controls = [piece for piece in pieces if not isinstance(piece, Text)]
    assert len(controls) == 4  # begin and end of two turns, none from the content
