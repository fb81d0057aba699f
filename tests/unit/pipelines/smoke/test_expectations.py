"""Each expectation passes and fails where it should, and the reason is in words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipelines.client import Reply
from pipelines.smoke.expectations import Expect, failures, slowness


def _reply(text: str, finish: str = "stop", tokens: int = 5, seconds: float = 1.0) -> Reply:
    return Reply(text, finish, tokens, "server", 0.1, seconds)


def _expect(**fields: object) -> Expect:
    return Expect.model_validate(fields)


GOOD = _reply("The capital of France is Paris, and it lies on the Seine.")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"language": "en"},
        {"regex": r"^The .*\bParis\b"},
        {"contains": "paris"},
        {"contains": ["FRANCE", "seine"]},
        {"equals": " The capital of France is Paris, and it lies on the Seine.\n"},
        {"min_tokens": 5},
    ],
)
def test_met(fields: dict[str, object]) -> None:
    assert list(failures(_expect(**fields), GOOD)) == []


@pytest.mark.parametrize(
    ("fields", "reply", "reason"),
    [
        ({}, _reply(" \n"), "is empty"),
        ({}, _reply("and so", "length", 128), "did not end by itself within 128 tokens"),
        ({}, _reply("ha! " * 30), "repeats 'ha!' 29 times"),
        ({"language": "fr"}, GOOD, "is not in language fr but en"),
        ({"language": "en"}, _reply("42"), "is not in language en but without letters"),
        ({"regex": "Lyon|Nice"}, GOOD, "does not match 'Lyon|Nice'"),
        ({"contains": ["Paris", "Lyon", "Nice"]}, GOOD, "does not contain 'Lyon', 'Nice'"),
        ({"equals": "Paris"}, GOOD, "is not 'Paris'"),
        ({"min_tokens": 6}, GOOD, "has 5 tokens, fewer than 6"),
    ],
)
def test_not_met(fields: dict[str, object], reply: Reply, reason: str) -> None:
    assert list(failures(_expect(**fields), reply)) == [reason]


@pytest.mark.parametrize(
    ("switch", "reply"), [("non_empty", _reply("")), ("stops", _reply("a", "length")), ("no_repetition", _reply("a" * 99))]
)
def test_what_is_expected_by_itself_can_be_switched_off(switch: str, reply: Reply) -> None:
    assert list(failures(_expect(), reply))
    assert list(failures(_expect(**{switch: False}), reply)) == []


def test_an_answer_may_fail_in_several_ways() -> None:
    assert len(list(failures(_expect(contains="x", min_tokens=2), _reply("", "length", 1)))) == 4


def test_lateness_is_told_apart_from_the_text() -> None:
    late = _expect(max_seconds=0.5)
    assert list(failures(late, GOOD)) == []
    assert slowness(late, GOOD) == "took 1.0 s, longer than 0.5 s"
    assert slowness(_expect(max_seconds=1), GOOD) is None
    assert slowness(_expect(), _reply("a", seconds=1e9)) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"regex": "(a"}, "no regular expression"),
        ({"language": "xx"}, "known are ar, de"),
        ({"contain": "a"}, "Extra inputs"),
    ],
)
def test_a_wrong_expectation_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _expect(**fields)


def test_speed_leaves_out_the_first_token() -> None:
    assert Reply("a", "stop", 11, "server", 1.0, 3.0).tokens_per_second == 5
    assert Reply("a", "stop", 1, "server", 1.0, 1.0).tokens_per_second is None
    assert Reply("", "stop", 1, "server", None, 1.0).tokens_per_second is None
