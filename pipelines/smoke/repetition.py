"""Loops: text in which a model repeats itself over and over, as badly trained ones do."""

from __future__ import annotations

import re
import unicodedata

TIMES = 4
LOOP_CHARACTERS = 30
"""`very, very, very, very` is emphasis; a loop goes on."""
_REPEATED = re.compile(rf"(.{{1,200}}?)\1{{{TIMES - 1},}}", re.DOTALL)
NGRAM = 4
NGRAM_SHARE = 0.5
NGRAM_WORDS = 40
_WORD = re.compile(r"[⺀-鿿가-힣]|\w+|[^\w\s]+")
"""Chinese, Japanese and Korean are not written in words: each sign counts."""


def loop(text: str) -> str | None:
    """What `text` repeats, in words; None if it does not loop.

    Two rules. One piece of up to 200 characters, with a letter or an emoji in it, stands four times or more end to end, over 30 characters
    or more. Or, for loops with small changes: of 40 words or more, at least half of the 4-grams stood in the text before (seq-rep-4 of
    Welleck et al. 2019, Neural Text Generation with Unlikelihood Training).
    """
    for found in _REPEATED.finditer(text):
        if len(found[0]) >= LOOP_CHARACTERS and any(_says_something(sign) for sign in found[1]):
            return f"repeats {_short(found[1].strip())!r} {len(found[0]) // len(found[1])} times"
    words = _WORD.findall(text.casefold())
    if len(words) >= NGRAM_WORDS and (share := seq_rep(words)) >= NGRAM_SHARE:
        return f"repeats itself: {share:.0%} of its {NGRAM}-grams stood in it before"
    return None


def seq_rep(words: list[str]) -> float:
    """The share of 4-grams that are repetitions of earlier ones."""
    grams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _says_something(sign: str) -> bool:
    """Rules, indentation, tables and long numbers are repetitive by nature."""
    return sign.isalpha() or unicodedata.category(sign) == "So"


def _short(piece: str) -> str:
    return piece if len(piece) <= 40 else f"{piece[:40]}…"
