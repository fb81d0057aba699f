"""What a run tells at its end: a summary for programs, a table for the terminal, a page for the Prefect UI."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import Artifact, Result
from pipelines.chat import told
from pipelines.comparison.figures import figure, gained
from pipelines.model_card import plain
from pipelines.pipeline import STAGES
from pipelines.preview import visible
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
    state = "cached" if result.cached else "ran"
    manifest = result.artifact.manifest
    return {
        "name": name,
        "key": manifest["key"],
        "state": state,
        "seconds": round(result.seconds, 2),
        "artifact": str(result.artifact.path),
    }


def table(summary: Mapping[str, Any], results: Mapping[str, Result]) -> str:
    """The markdown table of stages, with what each of them has to say."""
    rows = ["| stage | state | seconds | result |", "|---|---|--:|---|"]
    for stage in summary["stages"]:
        rows.append(f"| {stage['name']} | {stage['state']} | {stage['seconds']:.1f} | {_result(stage['name'], summary, results)} |")
    return "\n".join(rows)


def _result(name: str, summary: Mapping[str, Any], results: Mapping[str, Result]) -> str:
    metrics = results[name].artifact.metrics
    match name:
        case "prepare":
            full = f"{metrics['pack_efficiency']:.1%} full"
            return f"{metrics['accepted']} conversations, {metrics['tokens']} tokens in {metrics['packs']} packs ({full})"
        case "train":
            return f"{metrics['steps']} steps, loss {metrics['first_loss']:.3f} → {metrics['last_loss']:.3f}"
        case "convert":
            return f"{metrics['tensors']} tensors verified, {metrics['next_token_agreement']:.1%} of next tokens kept"
        case "eval":
            return ", ".join(_score(name, one) for name, one in results["verdict"].artifact.metrics["datasets"].items())
        case _:
            return told(metrics)


def _score(name: str, dataset: Mapping[str, Any]) -> str:
    base, tuned = (figure(dataset["values"][role], dataset["unit"]) for role in ("base", "tuned"))
    return f"{name}: base {base} → tuned {tuned}, {gained(dataset['differences']['base'], dataset['unit'])}"


def page(summary: Mapping[str, Any], results: Mapping[str, Result]) -> str:
    """The markdown artifact: table, verdict, data, loss curve, answers; what was asked and answered stays text."""
    curve = _picture(results["train"].artifact.record / "loss.png")
    prepared = results["prepare"].artifact.record
    chat = results["chat"].artifact.metrics
    answers = "\n".join([*(_answer(answer) for answer in chat["answers"]), *(_smoke_answer(answer) for answer in chat["smoke"])])
    model = results["convert"].artifact.payload / "model"
    return (
        f"# {summary['recipe']}\n\n{table(summary, results)}\n\n{_verdict(results['verdict'].artifact)}\n\n"
        f"## Data\n\n{data(prepared)}\n\n{curve}\n\n"
        f"## Answers\n\n{answers}\n\nTalk to it: `xtuner chat {model}`\n"
    )


def _verdict(artifact: Artifact) -> str:
    text = (artifact.payload / "report.md").read_text(encoding="utf-8")
    return f"{re.sub('^#', '##', text, flags=re.MULTILINE)}\n- all of it: `{artifact.record / 'report.html'}`"


def data(record: Path) -> str:
    """What the data report found, and where it lies."""
    report = json.loads((record / "report.json").read_text(encoding="utf-8"))
    told = [", ".join(f"{report[name]} {name}" for name in ("lines", "accepted", "rejected", "blank", "dropped"))]
    exact, near = (report["duplicates"][kind]["documents"] for kind in ("exact", "near"))
    told.append(f"{exact} exact and {near} near copies of earlier samples")
    for entry in report["leakage"]:
        name = Path(entry["file"]).name
        told.append(entry.get("problem") or f"of {entry['questions']} questions in {name}, {entry['whole']} stand in the data as a whole")
    return "\n".join(f"- {line}" for line in [*told, f"report: `{record / 'report.html'}`"])


def _picture(path: Path) -> str:
    return f"![training loss](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"


def _answer(answer: Mapping[str, Any]) -> str:
    return _asked(answer, "✓" if answer["correct"] else f"✗ expected {plain(visible(answer['expected']))}")


def _smoke_answer(answer: Mapping[str, Any]) -> str:
    return _asked(answer, f"✗ {plain(visible('; '.join(answer['failures'])))}" if answer["failures"] else "✓")


def _asked(answer: Mapping[str, Any], verdict: str) -> str:
    asked, said = (plain(visible(text)) for text in (answer["messages"][-1]["content"], answer["answer"]))
    return f"- **{asked}** → {said or '(nothing)'} {verdict}"
