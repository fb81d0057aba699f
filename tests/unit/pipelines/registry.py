"""Results of runs as the registry sees them, made by stages that write a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines import promotion
from pipelines.artifacts import Artifact, Store
from pipelines.model_registry import Version
from pipelines.recipe import load_recipe
from pipelines.stage import Metrics, Stage, Work

RECIPE = load_recipe("qwen3_tiny_full_openai", ["promotion.model=tickets"])


def result(store: Store, weights: str) -> dict[str, Artifact]:
    """The artifacts of a run that came to these weights."""
    made: dict[str, Artifact] = {}
    nodes = {"prepare": (), "train": ("prepare",), "convert": ("prepare", "train"), "verdict": ("convert",), "chat": ("convert",)}
    for name, inputs in nodes.items():
        stage = Stage(name=name, version=1, run=_writer(f"{name} of {weights}"), settings=lambda recipe: weights)
        made[name] = store.produce(stage, RECIPE, {one: made[one] for one in inputs}, print).artifact
    return made


def _writer(text: str) -> Any:
    def run(recipe: Any, work: Work) -> Metrics:
        (work.payload / "model").mkdir()
        (work.payload / "model" / "weights").write_text(text)
        return {"sources": []}

    return run


def registered(store: Store, weights: str, gate: bool = True) -> Version:
    """A version of model tickets."""
    faults = "" if gate else "chats: 3 points worse"
    return promotion.register(store, RECIPE, result(store, weights), gate, faults, {"tuned": {"chats": 51.5}})


def in_use(store: Store) -> str:
    """What a server reads that was given the path of the model in production."""
    return Path(store.root, "models", "tickets", "production", "model", "weights").read_text()
