"""Loops of real small models are found; lists, code and verse are none."""

from __future__ import annotations

import pytest

from pipelines.smoke.repetition import loop

LOOPS = {
    "an emoji": "👩" * 32,
    "a phrase": "Die Hauptstadt von Frankreich ist eine neue Hauptstadt" + ", die wichtigem Wachsgeschichte von Frankreich" * 4,
    "a sentence after a good beginning": "The sky is blue. " + "It is blue because of the air. " * 5,
    "a Chinese phrase": "我是一个语言模型，" * 8,
    "lines of one number": "This Python code will output:\n```\n" + "1\n" * 60,
    "a sentence with a running number": "".join(f"{number}. I can help you with any kind of project you have. " for number in range(1, 12)),
    "two letters": "na" * 20,
}
"""The first, second and fifth are answers of SmolLM2-135M-Instruct."""
SOUND = {
    "nothing": "",
    "emphasis": "It is very, very, very, very cold.",
    "a laugh": "ha ha ha ha ha!",
    "a table": "| a | b |\n|---|---|---|---|---|---|---|---|---|---|---|\n| 1 | 2 |\n" + "-" * 80,
    "a long number": "1" + ",000" * 12,
    "indentation": "def f():\n" + " " * 60 + "return 1",
    "a times table": "\n".join(f"{factor} x 7 = {factor * 7}" for factor in range(1, 11)),
    "a list": "1. Eat a balanced diet and include plenty of fruits.\n2. Exercise regularly to keep your body active.\n3. Get enough sleep.",
    "verse": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_a_loop(text: str) -> None:
    assert "repeats" in (loop(text) or "")


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_no_loop(text: str) -> None:
    assert loop(text) is None


def test_what_is_repeated_is_named() -> None:
    assert loop("Fine: " + "I am here to help. " * 6) == "repeats 'I am here to help.' 6 times"
