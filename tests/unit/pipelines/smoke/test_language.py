"""Which languages are told apart, and where the rules say that nobody can tell."""

from __future__ import annotations

import pytest

from pipelines.smoke.language import language_of, may_be

TEXTS = {
    "en": "The capital of France is Paris, and it lies on the Seine.",
    "de": "Die Hauptstadt von Frankreich ist Paris, und sie liegt an der Seine.",
    "fr": "La capitale de la France est Paris, et elle est sur les bords de la Seine.",
    "es": "La capital de Francia es Paris, y está en las orillas del río Sena.",
    "it": "La capitale della Francia è Parigi, che si trova sulle rive della Senna.",
    "pt": "A capital da França é Paris, que não fica longe do mar como você diz.",
    "nl": "De hoofdstad van Frankrijk is Parijs, en het ligt niet aan de zee.",
    "zh": "法国的首都是巴黎 (Paris)，位于塞纳河畔。",
    "ja": "フランスの首都はパリです。東京は日本の首都です。",
    "ko": "프랑스의 수도는 파리입니다.",
    "ru": "Столица Франции — Париж.",
    "ar": "عاصمة فرنسا هي باريس.",
    "he": "בירת צרפת היא פריז.",
    "hi": "फ्रांस की राजधानी पेरिस है।",
    "th": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "el": "Η πρωτεύουσα της Γαλλίας είναι το Παρίσι.",
}


@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_told_and_not_taken_for_another(language: str, text: str) -> None:
    assert language_of(text) == language
    assert [other for other in TEXTS if may_be(text, other)] == [language]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我用 Python 写代码", "zh"),  # names in Latin letters do not make it English
        ("漢字かな交じり文", "ja"),
        ("Paris.", "latin"),
        ("Hola! ¿Cómo estás?", "latin"),  # too few words
        ("Warszawa jest stolicą Polski i leży nad Wisłą", "latin"),  # none of the languages we know
        ("Привет, my good old friend", "latin"),
        ("Это cat", "ru"),
        ("42 + 1 = 43 🎉", None),
        ("", None),
        ("αβγ где abc", "mixed"),
    ],
)
def test_what_can_be_told(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_a_few_latin_words_may_be_in_any_language_that_is_written_so() -> None:
    assert may_be("Paris.", "en") and may_be("Paris.", "fr") and may_be(TEXTS["fr"], "latin")
    assert not may_be("Paris.", "ru")
    assert not may_be("42", "en")
