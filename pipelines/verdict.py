"""Stage verdict: is the tuned model better than its base and than the model in use, how sure is that, and may it be promoted.

payload/scores.json     per data set: every model's figure, the differences with their intervals, the answers that flipped; and the gate
payload/report.md       the same for people, in short
payload/README.md       the model card with the scores
record/report.html      the same at length, one file that needs nothing else
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.comparison.bootstrap import RESAMPLES, interval, matched_interval, mcnemar
from pipelines.comparison.gate import judge, require_possible
from pipelines.model_card import CONTENDERS, card, shown_recipe
from pipelines.recipe import EvalConfig, Recipe
from pipelines.stage import Metrics, Stage, Work
from pipelines.suites import chosen
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import DataError

_DIGITS = 9
"""Of figures in the payload: the last bits of a sum differ between processors."""

Scores = Mapping[str, Any]
"""A data set's entry in a payload of the eval stage (pipelines/evaluate.py)."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Compare the evaluations in `inputs`; a gate that does not hold is a finding, not an error.

    Raises:
        DataError: as `compare`.
    """
    from pipelines.comparison.page import page
    from pipelines.comparison.report import report

    scores = {role: _read(work.inputs[role] / "scores.json")["datasets"] for role in CONTENDERS if role in work.inputs}
    verdict = compare(scores, recipe.eval)
    write_json(work.payload / "scores.json", verdict)
    write_bytes(work.payload / "report.md", report(verdict).encode())
    write_bytes(work.payload / "README.md", card(recipe, _read(work.inputs["model"] / "facts.json"), verdict).encode())
    write_bytes(work.record / "report.html", page(recipe.name, verdict).encode())
    for rule in verdict["gate"]["rules"]:
        work.log(f"gate: {rule['reason']}")
    return {
        "roles": list(scores),
        "gate": verdict["gate"],
        "datasets": {name: _figures(dataset) for name, dataset in verdict["datasets"].items()},
    }


def compare(scores: Mapping[str, Mapping[str, Scores]], config: EvalConfig) -> dict[str, Any]:
    """The verdict as JSON, of role → data set → scores.

    Raises:
        DataError: the evaluations are not of the same samples, or do not count the same.
    """
    datasets = {name: _dataset(name, {role: found[name] for role, found in scores.items()}, config.confidence) for name in scores["tuned"]}
    rules = [judge(rule, datasets[rule.dataset], config.confidence) for rule in config.gate]
    gate = {"passed": all(rule["holds"] for rule in rules), "rules": rules}
    return {"confidence": config.confidence, "resamples": RESAMPLES, "datasets": datasets, "gate": gate}


def _dataset(name: str, scores: Mapping[str, Scores], confidence: float) -> dict[str, Any]:
    tuned = scores["tuned"]
    others = [role for role in scores if role != "tuned"]
    return {
        **{field: tuned[field] for field in ("metric", "unit", "higher_is_better", "kind", "suite")},
        "samples": len(tuned["samples"]),
        "values": {role: round(one["value"], _DIGITS) for role, one in scores.items()},
        "extras": {role: one["extras"] for role, one in scores.items()},
        "differences": {role: _difference(name, role, scores[role], tuned, confidence) for role in others},
    }


def _difference(name: str, role: str, other: Scores, tuned: Scores, confidence: float) -> dict[str, Any]:
    """By how much the tuned model is better (worse: negative), in the metric's unit, with its interval and the answers that flipped."""
    _require_same_metric(name, role, other["metric"], tuned["metric"])
    before, after = (other["samples"], tuned["samples"]) if other["samples"] and tuned["samples"] else ((), ())
    _require_same_samples(name, role, before, after)
    sign = 1 if tuned["higher_is_better"] else -1
    ends = interval(_weighted(before), _weighted(after), confidence)
    low, high = sorted(round(sign * tuned["scale"] * end, _DIGITS) for end in ends) if ends else (None, None)
    return {
        "value": round(sign * (tuned["value"] - other["value"]), _DIGITS),
        "low": low,
        "high": high,
        "no_interval": None if ends else _why_no_interval(len(after)),
        **_flips(before, after, tuned["scale"], confidence),
    }


def _weighted(samples: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(sample["score"], sample["weight"]) for sample in samples]


def _require_same_metric(name: str, role: str, before: str, after: str) -> None:
    if before != after:
        raise DataError(f"{name}: the evaluator told {before} of {role} and {after} of the tuned model, which cannot be compared.")


def _require_same_samples(name: str, role: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    if len(before) != len(after):
        raise DataError(f"{name}: {len(before)} samples were asked of {role} and {len(after)} of the tuned model. Evaluate both again.")
    for number, (one, two) in enumerate(zip(before, after, strict=True), 1):
        for field in ("question", "expected"):
            if one[field] != two[field]:
                told = f"{one[field][:60]!r} for {role} and {two[field][:60]!r} for the tuned model"
                raise DataError(f"{name}: the {field} of sample {number} is {told}. Evaluate both again.")


def _why_no_interval(samples: int) -> str:
    return "one sample tells no spread" if samples else "the evaluator tells no scores of samples"


def _flips(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], scale: float, confidence: float) -> dict[str, Any]:
    """The answers that became right and wrong, where each is one or the other, the p-value that this is chance, and the worse end of the
    interval that knows how few they are.
    """
    if not before or any(sample["score"] not in (0, 1) for sample in (*before, *after)):
        return {"p_value": None, "low_of_few": None, "became_right": [], "became_wrong": []}
    changed = [(one, two) for one, two in zip(before, after, strict=True) if one["score"] != two["score"]]
    right, wrong = ([_flip(one, two) for one, two in changed if two["score"] == score] for score in (1, 0))
    low, _ = matched_interval(len(right), len(wrong), len(after), confidence)
    figures = {"p_value": mcnemar(len(right), len(wrong)), "low_of_few": round(scale * low, _DIGITS)}
    return figures | {"became_right": right, "became_wrong": wrong}


def _flip(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    return {"question": after["question"], "expected": after["expected"], "before": before["answer"], "after": after["answer"]}


def _figures(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of a data set: all but the answers."""
    kept = ("value", "low", "high", "p_value")
    differences = {role: {name: one[name] for name in kept} for role, one in dataset["differences"].items()}
    return {"metric": dataset["metric"], "unit": dataset["unit"], "values": dataset["values"], "differences": differences}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the report, and what of the recipe the model card shows.

    Raises:
        RecipeError: a rule of the gate that nothing could satisfy or break.
    """
    require_possible(recipe.eval, [one.dataset.name for one in chosen(recipe.eval)])
    return {
        **recipe.eval.model_dump(mode="json", include={"confidence", "gate"}),
        "card": {"description": recipe.description, **shown_recipe(recipe)},
    }


STAGE = Stage(name="verdict", version=2, run=run, settings=settings, libraries=("numpy", "huggingface_hub"))
