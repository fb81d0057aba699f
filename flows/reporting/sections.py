"""The pages of a run, as markdown: what each stage shows; what was asked and answered stays text."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.reporting.summary import table
from pipelines import model_registry
from pipelines.artifacts import Artifact, Result, Store
from pipelines.lineage import trace_back
from pipelines.lineage_page import mermaid
from pipelines.model_card import plain
from pipelines.preview import visible
from pipelines.recipe import Recipe


def page(recipe: Recipe, results: Mapping[str, Result], failures: Sequence[str] = ()) -> str:
    """Everything that a run, whole or not, has to tell: the table of its stages, what failed, and the stages' sections."""
    sections = [section(results[name].artifact) for name, section in SECTIONS.items() if name in results]
    told = [f"**Failed:** {plain(why)}" for why in failures]
    use = f"Talk to it: `xtuner chat {_model(results['convert'].artifact)}`" if "convert" in results else ""
    return "\n\n".join(part for part in (f"# {recipe.name}", table(results), *told, *sections, use) if part) + "\n"


def data(prepared: Artifact) -> str:
    """What the data report found, and where it lies."""
    report = json.loads((prepared.record / "report.json").read_text(encoding="utf-8"))
    told = [", ".join(f"{report[name]} {name}" for name in ("lines", "accepted", "rejected", "blank", "dropped"))]
    exact, near = (report["duplicates"][kind]["documents"] for kind in ("exact", "near"))
    told.append(f"{exact} exact and {near} near copies of earlier samples")
    for entry in report["leakage"]:
        name = Path(entry["file"]).name
        told.append(entry.get("problem") or f"of {entry['questions']} questions in {name}, {entry['whole']} stand in the data as a whole")
    told += [f"samples as they are trained on: `{prepared.record / 'preview.txt'}`", f"report: `{prepared.record / 'report.html'}`"]
    return "## Data\n\n" + "\n".join(f"- {line}" for line in told)


def loss(trained: Artifact) -> str:
    """The loss curve, and where every step is told."""
    picture = base64.b64encode((trained.record / "loss.png").read_bytes()).decode()
    files = f"- every step: `{trained.record / 'metrics.jsonl'}`\n- log: `{trained.record / 'train.log'}`"
    return f"## Training\n\n![training loss](data:image/png;base64,{picture})\n\n{files}"


def scores(verdict: Artifact) -> str:
    """The verdict in short, and where it stands at length."""
    text = (verdict.payload / "report.md").read_text(encoding="utf-8")
    return f"{re.sub('^#', '##', text, flags=re.MULTILINE)}\n- all of it: `{verdict.record / 'report.html'}`"


def answers(chat: Artifact) -> str:
    """What the served model said."""
    metrics = chat.metrics
    told = [*map(_answer, metrics["answers"]), *map(_smoke_answer, metrics["smoke"]), f"- all of them: `{chat.payload / 'chat.json'}`"]
    return "## Answers\n\n" + "\n".join(told)


SECTIONS: Mapping[str, Callable[[Artifact], str]] = {"prepare": data, "train": loss, "verdict": scores, "chat": answers}
"""Node of the run → its section."""


def model_card(store: Store, name: str, verdict: Artifact) -> str:
    """What the judged model is in the registry today, where it came from, and the card that lies beside its scores."""
    judged = verdict.reference
    version = next((one for one in model_registry.versions(store, name) if one.artifacts["verdict"] == judged), None)
    card = (verdict.payload / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[-1].lstrip()  # without the header for machines
    if version is None:
        return card
    title, rest = card.split("\n", 1)
    folder = model_registry.folder(store, version) / "model"
    standing = f"**{plain(version.title)}**: {model_registry.status(store, version)}. Folder: `{folder}`"
    graph = f"## Lineage\n\n```mermaid\n{mermaid(trace_back(store, version.title))}```"
    about, heading, recipe = rest.partition("## Recipe\n")
    return f"{title}\n\n{standing}\n{about}{graph}\n\n{heading}{recipe}"


def _model(converted: Artifact) -> Path:
    return converted.payload / "model"


def _answer(answer: Mapping[str, Any]) -> str:
    return _asked(answer, "✓" if answer["correct"] else f"✗ expected {plain(visible(answer['expected']))}")


def _smoke_answer(answer: Mapping[str, Any]) -> str:
    return _asked(answer, f"✗ {plain(visible('; '.join(answer['failures'])))}" if answer["failures"] else "✓")


def _asked(answer: Mapping[str, Any], verdict: str) -> str:
    asked, said = (plain(visible(text)) for text in (answer["messages"][-1]["content"], answer["answer"]))
    return f"- **{asked}** → {said or '(nothing)'} {verdict}"
