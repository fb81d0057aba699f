"""The verdict as one HTML page: no script, no network; everything that comes from data or answers is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from pipelines.comparison.figures import figure, gained, percent
from pipelines.page_parts import document, safe, section, table

_STYLE = """
.interval { stroke: var(--bar); stroke-width: 3; } .gain { fill: var(--bar); } svg .name { fill: var(--ink); font-size: 13px; }
.zero { stroke: var(--soft); } .number { white-space: normal; } details td { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""
_SHOWN_FLIPS = 200
"""Of each kind and data set; all of them are in scores.json."""


def page(recipe: str, verdict: Mapping[str, Any]) -> str:
    """The whole page; `verdict` is payload/scores.json."""
    datasets = verdict["datasets"]
    parts = (
        f"<h1>Verdict on {safe(recipe)}</h1>",
        _gate(verdict["gate"]),
        section("How much better the tuned model is", _plots(verdict)),
        section("Figures", _figures(datasets)),
        section("Answers that flipped", _flips(datasets)),
    )
    return document(f"Verdict on {recipe}", _STYLE, parts)


def _gate(gate: Mapping[str, Any]) -> str:
    if not gate["rules"]:
        return '<p class="soft">The gate is open: the recipe demands nothing (eval.gate).</p>'
    head = '<p class="good">The gate is passed.</p>' if gate["passed"] else '<p class="bad">The gate is not passed.</p>'
    return head + "".join(
        f'<p><span class="{"good" if rule["holds"] else "bad"}">{"✓" if rule["holds"] else "✗"}</span> {safe(rule["reason"])}</p>'
        for rule in gate["rules"]
    )


def _figures(datasets: Mapping[str, Any]) -> str:
    others = list(dict.fromkeys(role for dataset in datasets.values() for role in dataset["differences"]))
    roles = [*others, "tuned"]
    headers = (
        "data set",
        "kind",
        "suite",
        "metric",
        "samples#",
        *(f"{role}#" for role in roles),
        *(f"better than {role}#" for role in others),
    )
    rows = []
    for name, dataset in datasets.items():
        unit, about = dataset["unit"], (name, dataset["kind"], dataset["suite"] or "", dataset["metric"], dataset["samples"] or "–")
        differences = (gained(dataset["differences"][role], unit) for role in others)
        rows.append((*about, *(figure(dataset["values"][role], unit) for role in roles), *differences))
        for extra in sorted({name for extras in dataset["extras"].values() for name in extras}):
            known = (dataset["extras"][role].get(extra) for role in roles)
            rows.append(("", "", "", extra, "", *("–" if value is None else f"{value:.4g}" for value in known), *("" for _ in others)))
    return table(headers, rows)


def _flips(datasets: Mapping[str, Any]) -> str:
    found = [
        _flipped(f"{name}, against {role}", difference)
        for name, dataset in datasets.items()
        for role, difference in dataset["differences"].items()
        if difference["became_right"] or difference["became_wrong"]
    ]
    return "".join(found) or '<p class="soft">None.</p>'


def _flipped(title: str, difference: Mapping[str, Any]) -> str:
    kinds = (("became wrong", difference["became_wrong"]), ("became right", difference["became_right"]))
    counts = " and ".join(f"{len(flips)} {kind}" for kind, flips in kinds)
    told = f"{title}: {counts} (McNemar's exact test: p = {difference['p_value']:.2g})"
    return f"<p>{safe(told)}</p>" + "".join(_answers(kind, flips) for kind, flips in kinds if flips)


def _answers(kind: str, flips: Sequence[Mapping[str, str]]) -> str:
    rows = ((flip["question"], flip["expected"], flip["before"], flip["after"]) for flip in flips[:_SHOWN_FLIPS])
    more = f'<p class="soft">{len(flips) - _SHOWN_FLIPS} more: scores.json.</p>' if len(flips) > _SHOWN_FLIPS else ""
    shown = table(("question", "expected", "answer before", "answer of the tuned model"), rows) + more
    return f"<details><summary>{kind}: {safe(len(flips))}</summary>{shown}</details>"


@dataclass(frozen=True, slots=True)
class _Row:
    """A difference to draw: its name, the gain, the interval's ends if it has them, and what the gate demands."""

    name: str
    value: float
    ends: tuple[float, ...]
    demands: tuple[float, ...]


_WIDTH, _LEFT, _ROW, _TOP = 900, 230, 30, 14


def _plots(verdict: Mapping[str, Any]) -> str:
    """A plot for each unit: zero, the differences as dots, their intervals as lines, the gate's demands dashed."""
    units: dict[str, list[_Row]] = {}
    missing = {}
    for name, dataset in verdict["datasets"].items():
        unit = "percentage points" if dataset["unit"] == "%" else dataset["unit"] or dataset["metric"]
        for role, difference in dataset["differences"].items():
            units.setdefault(unit, []).append(_row(name, role, difference, verdict["gate"]["rules"]))
            if difference["no_interval"]:
                missing[f"{name}: no interval, because {difference['no_interval']}."] = None
    told = (
        f"Right of zero the tuned model is better. Lines are {percent(verdict['confidence'])} intervals "
        f"(paired bootstrap over the samples, {verdict['resamples']:,} resamples); dashed is what the gate demands."
    )
    plots = "".join(_plot(unit, rows) for unit, rows in units.items())
    return plots + "".join(f'<p class="soft">{safe(line)}</p>' for line in (told, *missing))


def _row(name: str, role: str, difference: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> _Row:
    ends = () if difference["low"] is None else (difference["low"], difference["high"])
    about = [rule for rule in rules if (rule["dataset"], rule["against"]) == (name, role)]
    return _Row(f"{name} over {role}", difference["value"], ends, tuple(rule["at_least"] for rule in about))


def _plot(unit: str, rows: Sequence[_Row]) -> str:
    points = [0.0, *(point for row in rows for point in (row.value, *row.ends, *row.demands))]
    left, right = min(points), max(points)
    margin = (right - left or 1.0) * 0.05
    left, right = left - margin, right + margin
    bottom = _TOP + _ROW * len(rows)

    def across(value: float) -> str:
        return f"{_LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - 20):.1f}"

    def upright(css: str, value: float, top: float, end: float) -> str:
        return f'<line class="{css}" x1="{across(value)}" x2="{across(value)}" y1="{top}" y2="{end}"/>'

    drawn = []
    for number, row in enumerate(rows):
        middle = _TOP + _ROW * number + _ROW / 2
        drawn.append(f'<text class="name" x="0" y="{middle + 4}">{safe(row.name)}</text>')
        drawn += [upright("limit", demand, middle - _ROW / 2, middle + _ROW / 2) for demand in row.demands]
        if row.ends:
            drawn.append(f'<line class="interval" x1="{across(row.ends[0])}" x2="{across(row.ends[1])}" y1="{middle}" y2="{middle}"/>')
        drawn.append(f'<circle class="gain" cx="{across(row.value)}" cy="{middle}" r="5"/>')
    labels = [
        f'<text x="{across(tick)}" y="{bottom + 16}" text-anchor="middle">{f"{tick:+g}" if tick else 0}</text>'
        for tick in _ticks(left, right)
    ]
    labels.append(f'<text x="0" y="{bottom + 16}">{safe(unit)}</text>')
    body = upright("zero", 0.0, _TOP, bottom) + "".join([*drawn, *labels])
    return f'<svg viewBox="0 0 {_WIDTH} {bottom + 24}" role="img" aria-label="Differences in {safe(unit)}">{body}</svg>'


def _ticks(left: float, right: float) -> list[float]:
    """Round numbers, nine of them at most."""
    size = 10 ** floor(log10(right - left))
    step = next(size * part for part in (0.2, 0.5, 1.0, 2.0) if (right - left) / (size * part) <= 9)
    return [round(number * step, 12) for number in range(int(left / step) - 1, int(right / step) + 2) if left <= number * step <= right]
