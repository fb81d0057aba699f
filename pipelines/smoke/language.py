"""In which language a short text is written, told by simple rules that need no model.

A script tells a language where one is common for it: `ru` is said of all Cyrillic text, `ar` of all Arabic. Languages in Latin script are
told apart by their commonest words, from six words on. A language library would know more of them, and also guess where nobody can tell.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LATIN = "latin"
MIXED = "mixed"
_SCRIPTS = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru",
    "ARABIC": "ar",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "THAI": "th",
    "GREEK": "el",
    "LATIN": LATIN,
}
_DENSE = {"zh": 2, "ja": 2, "ko": 2}
"""A sign of these says about as much as two letters: Chinese that names three products in Latin letters is still Chinese."""
_WORDS = {
    "en": "the of and to in is it for you was with as are on be this have from or i not by at we can your",
    "de": "der die das und ist nicht ich du sie es ein eine den von zu mit auf für im dem auch wir sind haben",
    "fr": "le la les et est des de un une du que je vous en pour dans pas ne sur au il nous être c'est",
    "es": "el la los las de que y en un una es por con para se no lo su del al está como más qué",
    "it": "il lo la di che e un una per non in con sono del della le i è si come anche questo gli",
    "pt": "o a os as de que e do da em um uma para com não se no na é por mais você como",
    "nl": "de het een en van ik is dat niet in op te zijn met voor je maar ook wij heeft",
}
COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
LANGUAGES = tuple(sorted({*_SCRIPTS.values(), *COMMON}))
"""What may be asked for."""
ENOUGH_WORDS = 6
ENOUGH_COMMON = 0.15
"""Share of common words below which Latin text is in none of the languages we know."""


def language_of(text: str) -> str | None:
    """A code of LANGUAGES; `latin` where the script is all that can be told, `mixed` without a main script, None without letters."""
    letters = Counter(_SCRIPTS.get(unicodedata.name(sign, "").split(" ")[0].split("-")[0], "other") for sign in text if sign.isalpha())
    if not letters:
        return None
    if letters["ja"] * 10 > letters["zh"]:  # Japanese writes its nouns in Chinese signs
        letters["ja"] += letters.pop("zh", 0)
    weights = {script: count * _DENSE.get(script, 1) for script, count in letters.items()}
    script = max(weights, key=weights.__getitem__)
    if weights[script] * 2 < sum(weights.values()):
        return MIXED
    return _latin(text) if script == LATIN else script


def _latin(text: str) -> str:
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.casefold().replace("’", "'"))
    shares = {language: sum(word in common for word in words) / len(words) for language, common in COMMON.items()}
    best = max(shares, key=shares.__getitem__)
    told = len(words) >= ENOUGH_WORDS and shares[best] >= ENOUGH_COMMON and list(shares.values()).count(shares[best]) == 1
    return best if told else LATIN


def may_be(text: str, language: str) -> bool:
    """Whether `text` is in `language`, as far as can be told: a few Latin words may be in any language that is written so."""
    found = language_of(text)
    return found == language or (found == LATIN and language in COMMON) or (found in COMMON and language == LATIN)
