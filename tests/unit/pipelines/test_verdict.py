"""The verdict: what is compared with what, what the gate says of it, and reports that no answer can break."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import verdict
from pipelines.comparison.page import page
from pipelines.comparison.report import report
from pipelines.evaluate import _as_json
from pipelines.evaluators import DatasetScore, Sample
from pipelines.recipe import EvalConfig, EvalDataset, load_recipe
from pipelines.stage import Work
from pipelines.suites import Chosen
from xtuner_core.errors import DataError, RecipeError

TINY = "qwen3_tiny_full_openai"
EVIL = "<script>alert('&')</script> | `a` **b** [c](http://d)\n\x1b[31m"
Roles = dict[str, dict[str, Any]]


def as_evaluated(score: DatasetScore, name: str = "tickets", suite: str | None = None) -> dict[str, Any]:
    """A data set's entry as the eval stage writes it."""
    return json.loads(json.dumps(_as_json(Chosen(EvalDataset(name=name), suite), score)))


def answered(right: str, question: str = "q", answer: str = "no") -> dict[str, Any]:
    """`+` is a right answer, `-` a wrong one."""
    samples = [Sample(f"{question}{n}", "yes", "yes" if mark == "+" else answer, float(mark == "+")) for n, mark in enumerate(right)]
    return as_evaluated(DatasetScore("accuracy", tuple(samples)))


def lost(nats: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    samples = tuple(Sample(f"q{n}", "", "", score, weight) for n, (score, weight) in enumerate(zip(nats, tokens, strict=True)))
    return as_evaluated(DatasetScore("loss", samples, extras={"perplexity": 2.5}), suite="general")


def compared(base: dict[str, Any], tuned: dict[str, Any], *rules: dict[str, Any], **others: Any) -> dict[str, Any]:
    config = EvalConfig.model_validate({"gate": [{"dataset": "tickets", **rule} for rule in rules]})
    return verdict.compare({"base": {"tickets": base}, "tuned": {"tickets": tuned}, **others}, config)


def outcome(base: dict[str, Any], tuned: dict[str, Any], **rule: Any) -> tuple[bool, str]:
    gate = compared(base, tuned, rule)["gate"]
    assert gate["passed"] == gate["rules"][0]["holds"]
    return gate["passed"], gate["rules"][0]["reason"]


def test_figures_differences_and_flips_of_answers() -> None:
    found = compared(answered("+--+-"), answered("-+++-"))["datasets"]["tickets"]
    assert (found["metric"], found["unit"], found["samples"], found["values"]) == ("accuracy", "%", 5, {"base": 40.0, "tuned": 60.0})
    difference = found["differences"]["base"]
    assert difference["value"] == 20.0
    assert difference["low"] <= 20.0 <= difference["high"]
    assert difference["p_value"] == 1.0
    assert [flip["question"] for flip in difference["became_right"]] == ["q1", "q2"]
    assert difference["became_wrong"] == [{"question": "q0", "expected": "yes", "before": "yes", "after": "no"}]


def test_of_a_loss_less_is_better_and_long_samples_count_more() -> None:
    found = compared(lost([2.0, 1.0, 3.0], [100, 1, 100]), lost([1.5, 9.0, 2.5], [100, 1, 100]))["datasets"]["tickets"]
    difference = found["differences"]["base"]
    assert difference["value"] == pytest.approx((0.5 * 200 - 8) / 201)
    assert difference["low"] < 0 < difference["high"] == pytest.approx(0.5)
    assert (difference["p_value"], difference["became_right"], difference["became_wrong"]) == (None, [], [])
    assert found["extras"]["tuned"] == {"perplexity": 2.5}


def test_the_model_in_use_is_compared_too() -> None:
    found = compared(answered("----"), answered("+++-"), production={"tickets": answered("++++")})["datasets"]["tickets"]
    assert {role: one["value"] for role, one in found["differences"].items()} == {"base": 75.0, "production": -25.0}
    assert [flip["question"] for flip in found["differences"]["production"]["became_wrong"]] == ["q3"]


def test_without_scores_of_samples_there_is_a_difference_but_no_interval() -> None:
    base, tuned = (as_evaluated(DatasetScore("rouge1", (), reported=value)) for value in (20.0, 22.5))
    difference = compared(base, tuned)["datasets"]["tickets"]["differences"]["base"]
    assert (difference["value"], difference["low"], difference["high"]) == (2.5, None, None)
    assert difference["no_interval"] == "the evaluator tells no scores of samples"
    single = compared(answered("-"), answered("+"))["datasets"]["tickets"]["differences"]["base"]
    assert (single["low"], single["no_interval"]) == (None, "one sample tells no spread")


def test_where_one_evaluation_tells_no_samples_the_figures_are_compared_all_the_same() -> None:
    silent = as_evaluated(DatasetScore("accuracy", (), reported=25.0))
    for base, tuned, value in ((silent, answered("+-"), 25.0), (answered("+-"), silent, -25.0)):
        difference = compared(base, tuned)["datasets"]["tickets"]["differences"]["base"]
        assert (difference["value"], difference["low"], difference["p_value"]) == (value, None, None)
        assert difference["no_interval"] == "the evaluator tells no scores of samples"
    with pytest.raises(DataError, match="tickets: the evaluator told rouge1 of base and accuracy of the tuned model"):
        compared(as_evaluated(DatasetScore("rouge1", (), reported=1.0)), answered("+-"))


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (answered("+-+"), "tickets: 3 samples were asked of base and 2 of the tuned model"),
        (answered("+-", question="other"), r"tickets: the question of sample 1 is 'other0' for base and 'q0' for the tuned model"),
        ({**answered("+-"), "samples": [{**one, "expected": "?"} for one in answered("+-")["samples"]]}, "the expected of sample 1 is"),
    ],
)
def test_evaluations_of_other_samples_are_refused(base: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        compared(base, answered("+-"))


MANY, SOME = "+" * 90 + "-" * 10, "+" * 40 + "-" * 60


@pytest.mark.parametrize(
    ("base", "tuned", "rule", "holds", "told"),
    [
        (SOME, MANY, {"beat_by": 20}, True, "90.0 % is 50.0 points better than base (95 % interval +40.0 to +60.0); at least 20.0 points"),
        (SOME, MANY, {"beat_by": 50}, True, "at least 50.0 points better demanded: holds"),
        (SOME, MANY, {"beat_by": 50.1}, False, "at least 50.1 points better demanded: does not hold"),
        (SOME, MANY, {"beat_by": 45, "sure": True}, False, "for sure: does not hold, because the interval reaches further down"),
        (SOME, MANY, {"beat_by": 20, "sure": True}, True, "at least 20.0 points better demanded, for sure: holds"),
        (MANY, SOME, {"lose_at_most": 49}, False, "50.0 points worse than base (95 % interval -60.0 to -40.0); at most 49.0 points"),
        (MANY, SOME, {"lose_at_most": 50}, True, "at most 50.0 points worse allowed: holds"),
        (MANY, SOME, {"lose_at_most": 50, "sure": True}, False, "because the interval reaches further down"),
        (SOME, SOME, {"lose_at_most": 0}, True, "40.0 % is as good as base (95 % interval 0.0 to 0.0); at least as good demanded: holds"),
        ("----", "++++", {"beat_by": 50}, True, "(95 % interval +100.0 to +100.0)"),
        ("----", "++++", {"beat_by": 50, "sure": True}, False, "so few answers changed that chance can have done it (McNemar's test: p"),
        ("+-+", "+-+", {"lose_at_most": 1}, True, "at most 1.0 points worse allowed: holds"),
        ("+-+", "+-+", {"lose_at_most": 1, "sure": True}, False, "because so few samples leave room for -39.2 points (Agresti and Min's"),
        (SOME * 9, SOME * 9, {"lose_at_most": 1, "sure": True}, True, "at most 1.0 points worse allowed, for sure: holds"),
        ("-", "+", {"beat_by": 50, "sure": True}, False, "(no interval); at least 50.0 points better demanded, for sure: does not hold"),
    ],
)  # fmt: skip
def test_the_gate_says_what_it_saw_and_what_was_demanded(base: str, tuned: str, rule: dict[str, Any], holds: bool, told: str) -> None:
    passed, reason = outcome(answered(base), answered(tuned), **rule)
    assert passed == holds
    assert reason.startswith("tickets: ") and told in reason


def test_a_rule_about_a_loss_is_in_its_unit() -> None:
    before, after = lost([2.0] * 9, [5] * 9), lost([1.5] * 9, [5] * 9)
    assert outcome(before, after, beat_by=0.4) == (
        True,
        "tickets: 1.5 nats per token is 0.5 nats per token better than base (95 % interval +0.5 to +0.5); "
        "at least 0.4 nats per token better demanded: holds",
    )
    assert not outcome(after, before, lose_at_most=0.4)[0]


def test_all_rules_must_hold_and_no_rule_demands_nothing() -> None:
    found = compared(answered(SOME), answered(MANY), {"beat_by": 20}, {"lose_at_most": 1}, {"beat_by": 90})
    assert [rule["holds"] for rule in found["gate"]["rules"]] == [True, True, False]
    assert not found["gate"]["passed"]
    assert "**The gate is not passed.**" in report(found)
    free = compared(answered(SOME), answered(SOME))
    assert free["gate"] == {"passed": True, "rules": []}
    assert "The gate is open: the recipe demands nothing" in report(free)
    assert "The gate is open: the recipe demands nothing" in page("r", free)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["eval.gate=[{dataset: tickets, beat_by: 1}]"],
            r"eval\.gate\[0\]\.dataset: no data set 'tickets' is evaluated; there are: chats\.",
        ),
        (
            ["eval.gate=[{dataset: chats, against: production, beat_by: 1}]"],
            r"eval\.gate\[0\]\.against: production; say in eval\.production",
        ),
    ],
)
def test_a_rule_about_nothing_that_is_evaluated_is_told_before_anything_runs(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        verdict.STAGE.settings(load_recipe(TINY, overrides))


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str, Roles], Work]:
    """A new place for the stage, with these evaluations as its inputs."""

    def make(name: str, scores: Roles) -> Work:
        for role, datasets in scores.items():
            (tmp_path / name / role).mkdir(parents=True)
            (tmp_path / name / role / "scores.json").write_text(json.dumps({"datasets": datasets}), encoding="utf-8")
        parts = {part: tmp_path / name / part for part in ("payload", "record", "scratch", "cache", "model")}
        for folder in parts.values():
            folder.mkdir()
        facts = {"base": "org/base", "license": "mit", "relation": "finetune", "dtype": "bfloat16", "tensors": 3, "parameters": 9}
        facts |= {"checks": {"agreement": 1.0}, "data": [], "counts": {}, "training": {}}
        (parts["model"] / "facts.json").write_text(json.dumps(facts))
        inputs = {"model": parts.pop("model"), **{role: tmp_path / name / role for role in scores}}
        return Work(inputs, **parts, log=print)

    return make


def test_the_stage_writes_the_same_bytes_twice_and_a_card_with_the_scores(place: Callable[[str, Roles], Work]) -> None:
    scores = {
        "base": {"chats": answered("+---"), "texts": lost([3.0, 1.0], [4, 9])},
        "production": {"chats": answered("++--"), "texts": lost([2.0, 2.0], [4, 9])},
        "tuned": {"chats": answered("-+++"), "texts": lost([1.0, 1.0], [4, 9])},
    }
    recipe = load_recipe(TINY, ["eval.gate=[{dataset: chats, beat_by: 60}]"])
    works = [place(name, scores) for name in ("first", "second")]
    metrics, again = (verdict.run(recipe, work) for work in works)
    assert metrics == again
    assert metrics["gate"]["passed"] is False
    assert metrics["datasets"]["chats"]["values"] == {"base": 25.0, "production": 50.0, "tuned": 75.0}
    assert "became_right" not in metrics["datasets"]["chats"]["differences"]["base"]
    files = [{path.name: path.read_bytes() for path in work.payload.iterdir()} for work in works]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["README.md", "report.md", "scores.json"]
    card = files[0]["README.md"].decode()
    assert "base_model: org/base" in card and "| chats | accuracy | 25.0 % | 50.0 % | 75.0 % | \\+50.0 points \\(" in card
    assert "| texts | 2 | 1.615 nats per token | 2 nats per token | 1 nats per token | +0.6154 nats per token (0 to +2)" in (
        files[0]["report.md"].decode()
    )
    assert "chats: 75.0 % is 50.0 points better than base" in (works[0].record / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_nothing_that_was_asked_or_answered_becomes_markup() -> None:
    texts = [answered("+-", question, answer) for question, answer in ((EVIL, EVIL), ("q", "no"))]
    right = [answered("-+", question, answer) for question, answer in ((EVIL, EVIL), ("q", "no"))]
    found, clean = (compared(base, tuned, {"beat_by": 1}) for base, tuned in zip(texts, right, strict=True))
    evil, good = Reader(page(EVIL, found)), Reader(page("r", clean))
    assert evil.tags == good.tags and evil.attributes == good.attributes
    assert evil.shown.count("<script>alert('&')</script> | `a`") == 6
    assert "\x1b" not in page(EVIL, found) + report(found)
    assert "<script>" not in page(EVIL, found) + report(found).replace("\\<script\\>", "")
    rows = [line for line in report(found).splitlines() if line.startswith("| ")]
    assert len(rows) == 2, "a pipe in a question makes no row"


@given(st.text(), st.text())
@settings(max_examples=40)
def test_any_text_is_shown_in_a_whole_page(question: str, answer: str) -> None:
    found = compared(answered("+-", question, answer), answered("-+", question, answer))
    assert Reader(page("r", found)).tags == Reader(page("r", compared(answered("+-"), answered("-+")))).tags
    assert len(report(found).splitlines()) == len(report(compared(answered("+-"), answered("-+"))).splitlines())


def test_the_page_needs_nothing_else_and_draws_every_difference() -> None:
    found = compared(answered(SOME), answered(MANY), {"beat_by": 20}, production={"tickets": answered(MANY)})
    text = page("r", found)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "http" not in text.replace("http-equiv", "") and "src=" not in text
    assert (text.count('class="gain"'), text.count('class="interval"'), text.count('class="limit"')) == (2, 2, 1)
    assert "50 became right" in text


def test_of_many_flips_the_page_shows_some_and_says_where_the_others_are() -> None:
    found = compared(answered("-" * 500), answered("+" * 500))
    assert "300 more: scores.json" in page("r", found)
    assert page("r", found).count("<tr>") < 250
    assert len(report(found).splitlines()) < 20
