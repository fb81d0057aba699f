"""What a run tells at its end: a summary for programs, a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.artifacts import Result
from pipelines.chat import told
from pipelines.comparison.figures import figure, gained
from pipelines.pipeline import STAGES
from pipelines.recipe import Recipe

CHAT_FIGURES = ("passed", "total", "smoke_passed", "smoke_total", "first_token_seconds", "tokens_per_second", "why")
"""What the JSON of a run says about its chat test."""


def summarize(recipe: Recipe, results: Mapping[str, Result]) -> dict[str, Any]:
    """The run as JSON: stages, scores, differences with their intervals, gate, chat and whether all is well."""
    chat, verdict = results["chat"].artifact.metrics, results["verdict"].artifact.metrics
    datasets = verdict["datasets"]
    return {
        "recipe": recipe.name,
        "stages": [_stage(name, results[name]) for name in STAGES],
        "support": [_stage(name, result) for name, result in results.items() if name not in STAGES],
        "scores": {role: {name: one["values"][role] for name, one in datasets.items()} for role in verdict["roles"]},
        "differences": {name: one["differences"] for name, one in datasets.items()},
        "gate": verdict["gate"],
        "chat": {name: chat[name] for name in CHAT_FIGURES},
        "ok": chat["ok"] and verdict["gate"]["passed"],
    }


def faults(summary: Mapping[str, Any]) -> str:
    """Why a model that was made is not well."""
    broken = [rule["reason"] for rule in summary["gate"]["rules"] if not rule["holds"]]
    gate = [f"it does not pass the gate: {'; '.join(broken)}"] if broken else []
    chat = [f"the chat test failed: {'; '.join(summary['chat']['why'])}"] if summary["chat"]["why"] else []
    return ", and ".join([*gate, *chat])


def _stage(name: str, result: Result) -> dict[str, Any]:
    return {
        "name": name,
        "key": result.artifact.manifest["key"],
        "state": state_of(result),
        "seconds": round(result.seconds, 2),
        "artifact": str(result.artifact.path),
    }


def state_of(result: Result) -> str:
    """In a word."""
    return "cached" if result.cached else "ran"


def table(results: Mapping[str, Result]) -> str:
    """The markdown table of the stages that were reached, with what each of them has to say."""
    rows = ["| stage | state | seconds | result |", "|---|---|--:|---|"]
    for name in STAGES:
        if result := results.get(name):
            rows.append(f"| {name} | {state_of(result)} | {result.seconds:.1f} | {outcome(name, results)} |")
    return "\n".join(rows)


def outcome(name: str, results: Mapping[str, Result]) -> str:
    """What came out of a node of the run, in a line; of eval only when the verdict is there."""
    metrics = results[name].artifact.metrics
    match name:
        case "prepare":
            full = f"{metrics['pack_efficiency']:.1%} full"
            return f"{metrics['accepted']} conversations, {metrics['tokens']} tokens in {metrics['packs']} packs ({full})"
        case "train":
            return f"{metrics['steps']} steps, loss {metrics['first_loss']:.3f} → {metrics['last_loss']:.3f}"
        case "convert":
            return f"{metrics['tensors']} tensors verified, {metrics['next_token_agreement']:.1%} of next tokens kept"
        case "eval" if "verdict" in results:
            return ", ".join(_score(name, one) for name, one in results["verdict"].artifact.metrics["datasets"].items())
        case "verdict":
            return "the gate is passed" if metrics["gate"]["passed"] else "the gate is not passed"
        case "chat":
            return told(metrics)
        case _:
            return ""


def _score(name: str, dataset: Mapping[str, Any]) -> str:
    base, tuned = (figure(dataset["values"][role], dataset["unit"]) for role in ("base", "tuned"))
    return f"{name}: base {base} → tuned {tuned}, {gained(dataset['differences']['base'], dataset['unit'])}"
