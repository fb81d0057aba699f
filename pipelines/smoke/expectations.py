"""What is expected of an answer, and what of it did not come true, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from pipelines.smoke.language import LANGUAGES, language_of, may_be
from pipelines.smoke.repetition import loop
from xtuner_core.config import Config, Texts

if TYPE_CHECKING:
    from pipelines.client import Reply


class Expect(Config):
    """All of it must hold; the first three are expected of every answer unless switched off."""

    non_empty: bool = Field(default=True, description="The answer has text.")
    stops: bool = Field(default=True, description="The model ends its turn by itself, before max_tokens.")
    no_repetition: bool = Field(default=True, description="The answer does not loop (the rules: pipelines/smoke/repetition.py).")
    language: str | None = Field(default=None, description=f"Language of the answer, as far as can be told: {', '.join(LANGUAGES)}.")
    regex: str | None = Field(default=None, description="A regular expression (Python's) that must be found in the answer.")
    contains: Texts = Field(default=(), description="Texts that must stand in the answer, in small or capital letters.")
    equals: str | None = Field(default=None, description="The whole answer, spaces around it aside.")
    min_tokens: int | None = Field(default=None, ge=1, description="Shortest answer, in tokens.")
    max_seconds: float | None = Field(default=None, gt=0, description="Longest time from the question to the end of the answer.")

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in LANGUAGES:
            raise ValueError(f"not a language that can be told; known are {', '.join(LANGUAGES)}")
        return value

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return value


def failures(expect: Expect, reply: Reply) -> Iterator[str]:
    """Which expectations the answer's text does not meet; the same text gives the same reasons."""
    text = reply.text.strip()
    if not text:
        if expect.non_empty:
            yield "is empty"
    elif expect.language and not may_be(text, expect.language):
        yield f"is not in language {expect.language} but {language_of(text) or 'without letters'}"
    if expect.stops and reply.finish != "stop":
        yield f"did not end by itself within {reply.tokens} tokens"
    if expect.no_repetition and (found := loop(text)):
        yield found
    if expect.regex is not None and not re.search(expect.regex, text):
        yield f"does not match {expect.regex!r}"
    missing = [part for part in expect.contains if part.casefold() not in text.casefold()]
    if missing:
        yield f"does not contain {', '.join(map(repr, missing))}"
    if expect.equals is not None and text != expect.equals.strip():
        yield f"is not {expect.equals.strip()!r}"
    if expect.min_tokens is not None and reply.tokens < expect.min_tokens:
        yield f"has {reply.tokens} tokens, fewer than {expect.min_tokens}"


def slowness(expect: Expect, reply: Reply) -> str | None:
    """Why the answer came too late, if so; apart from `failures`, because the next run may be faster."""
    if expect.max_seconds is None or reply.seconds <= expect.max_seconds:
        return None
    return f"took {reply.seconds:.1f} s, longer than {expect.max_seconds:g} s"
