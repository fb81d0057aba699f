"""The gate: what a recipe demands of the tuned model before it is promoted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pipelines.comparison.figures import amount, figure, percent, signed, span
from pipelines.recipe import EvalConfig, GateRule
from xtuner_core.errors import RecipeError


def require_possible(config: EvalConfig, datasets: Collection[str]) -> None:
    """Tell before the first stage of a rule that nothing could satisfy or break.

    Raises:
        RecipeError: a rule about a data set that is not among `datasets`, or against a production model that the recipe does not name.
    """
    for index, rule in enumerate(config.gate):
        if rule.dataset not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise RecipeError(f"eval.gate[{index}].dataset: no data set {rule.dataset!r} is evaluated; there are: {known}.")
        if rule.against == "production" and config.production is None:
            raise RecipeError(f"eval.gate[{index}].against: production; say in eval.production which folder holds that model.")


def judge(rule: GateRule, dataset: Mapping[str, Any], confidence: float) -> dict[str, Any]:
    """Whether a rule holds, with its figures and the reason in words; `dataset` is an entry of the verdict's scores.

    A rule that must be `sure` looks at the worse end of the interval. That is too narrow for few samples, so where answers are right or
    wrong a second word is asked for (bootstrap.py): of the exact test where a better model is demanded, of an interval that is never of
    zero width where none may be much worse.
    """
    difference = dataset["differences"][rule.against]
    least = rule.beat_by if rule.beat_by is not None else 0.0 - (rule.lose_at_most or 0.0)
    measured = difference["value"] >= least
    doubt = _doubt(rule, difference, dataset["unit"], least, confidence) if measured and rule.sure else ""
    end = "holds" if measured and not doubt else "does not hold"
    return {
        **rule.model_dump(mode="json"),
        "at_least": least,
        **{name: difference[name] for name in ("value", "low", "high", "p_value")},
        "holds": measured and not doubt,
        "reason": f"{rule.dataset}: {_finding(rule, dataset, confidence)}; {_demand(rule, dataset['unit'])}: {end}{doubt}",
    }


def _doubt(rule: GateRule, difference: Mapping[str, Any], unit: str, least: float, confidence: float) -> str:
    """Why it is not sure that the model is better by at least `least`, as it was measured; empty if it is."""
    if difference["low"] is None:
        return f", because it cannot be sure ({difference['no_interval']})"
    if difference["low"] < least:
        return ", because the interval reaches further down"
    p_value = difference["p_value"]
    if p_value is None:
        return ""
    if rule.beat_by is not None:
        chance = f", because so few answers changed that chance can have done it (McNemar's test: p = {p_value:.2g})"
        return chance if p_value > 1 - confidence else ""
    few = f", because so few samples leave room for {signed(difference['low_of_few'], unit)} (Agresti and Min's interval)"
    return few if difference["low_of_few"] < least else ""


def _finding(rule: GateRule, dataset: Mapping[str, Any], confidence: float) -> str:
    unit, difference = dataset["unit"], dataset["differences"][rule.against]
    gain, interval = difference["value"], span(difference, unit)
    compared = f"{amount(gain, unit)} {'better' if gain > 0 else 'worse'} than" if gain else "as good as"
    sureness = f"{percent(confidence)} interval {interval}" if interval else "no interval"
    return f"{figure(dataset['values']['tuned'], unit)} is {compared} {rule.against} ({sureness})"


def _demand(rule: GateRule, unit: str) -> str:
    sure = ", for sure" if rule.sure else ""
    if not (rule.beat_by or rule.lose_at_most):
        return f"at least as good demanded{sure}"
    if rule.beat_by is not None:
        return f"at least {amount(rule.beat_by, unit)} better demanded{sure}"
    return f"at most {amount(rule.lose_at_most or 0.0, unit)} worse allowed{sure}"
