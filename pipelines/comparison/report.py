"""The verdict in short, as Markdown: for the terminal, CI logs and the page in the Prefect UI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.comparison.figures import figure, gained, percent
from pipelines.model_card import plain
from pipelines.preview import visible

SHOWN_FLIPS = 3
"""Of each kind and data set."""
_LONGEST = 100
"""Characters shown of a question or answer."""


def report(verdict: Mapping[str, Any]) -> str:
    """The whole text; `verdict` is payload/scores.json."""
    datasets = verdict["datasets"]
    others = list(dict.fromkeys(role for dataset in datasets.values() for role in dataset["differences"]))
    flips = [line for name, dataset in datasets.items() for other in others for line in _flips(name, other, dataset["differences"][other])]
    parts = ["# Verdict", "\n".join(_gate(verdict["gate"])), "\n".join(_table(datasets, others)), _explained(verdict)]
    return "\n\n".join([*parts, *(["## Answers that flipped", "\n".join(flips)] if flips else [])]) + "\n"


def _gate(gate: Mapping[str, Any]) -> Iterator[str]:
    if not gate["rules"]:
        yield "The gate is open: the recipe demands nothing (`eval.gate`)."
        return
    yield "**The gate is passed.**" if gate["passed"] else "**The gate is not passed.**"
    yield ""
    for rule in gate["rules"]:
        yield f"- {'✓' if rule['holds'] else '✗'} {rule['reason']}"


def _table(datasets: Mapping[str, Any], others: Sequence[str]) -> Iterator[str]:
    roles = [*others, "tuned"]
    yield f"| data set | samples | {' | '.join(roles)} | {' | '.join(f'better than {other}' for other in others)} |"
    yield f"|---|--:|{'--:|' * len(roles)}{'--:|' * len(others)}"
    for name, dataset in datasets.items():
        values = [figure(dataset["values"][role], dataset["unit"]) for role in roles]
        gains = [gained(dataset["differences"][other], dataset["unit"]) for other in others]
        yield f"| {' | '.join([name, str(dataset['samples'] or '–'), *values, *gains])} |"


def _explained(verdict: Mapping[str, Any]) -> str:
    return (
        f"In brackets: {percent(verdict['confidence'])} interval of the difference "
        f"(paired bootstrap over the samples, {verdict['resamples']:,} resamples); a positive difference is a better model."
    )


def _flips(name: str, other: str, difference: Mapping[str, Any]) -> Iterator[str]:
    right, wrong = difference["became_right"], difference["became_wrong"]
    if not right and not wrong:
        return
    test = f"McNemar's test: p = {difference['p_value']:.2g}"
    yield f"- {name}, against {other}: {len(right)} became right, {len(wrong)} became wrong ({test})"
    for mark, flips in (("✗", wrong), ("✓", right)):
        for flip in flips[:SHOWN_FLIPS]:
            yield f"  - {mark} {_cut(flip['question'])} → {_cut(flip['after'])}" + (
                f" (expected {_cut(flip['expected'])})" if mark == "✗" else f" (before: {_cut(flip['before'])})"
            )


def _cut(text: str) -> str:
    """One line, not too long, that shows just these characters in Markdown and steers no terminal."""
    line = " ".join(visible(text).split())
    return plain(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…") or "(nothing)"
