"""The graph of a run: which stage feeds which, in one table, and what a run would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines import base_model, chat, chatters, convert, evaluate, launchers, prepare, production, suites, train, verdict
from pipelines.artifacts import Artifact, Damaged, Store, key_of
from pipelines.recipe import Recipe
from pipelines.stage import Stage
from xtuner_core import adapters, registry, trackers
from xtuner_core.data import formats, packing, templates
from xtuner_core.optim import optimizers, schedules


@dataclass(frozen=True, slots=True)
class Node:
    """One step of a run: a stage, and where its inputs come from (input name → node name)."""

    name: str
    stage: Stage
    inputs: Mapping[str, str]


def nodes(recipe: Recipe) -> tuple[Node, ...]:
    """The steps of the recipe's run, in order; the model in use is judged too where the recipe names one."""
    judged = {"base": "eval-base", "tuned": "eval"}
    in_use: tuple[Node, ...] = ()
    if recipe.eval.production is not None:
        judged["production"] = "eval-production"
        in_use = (Node("production", production.STAGE, {}), Node("eval-production", evaluate.STAGE, {"model": "production"}))
    return (
        Node("base", base_model.STAGE, {}),
        Node("prepare", prepare.STAGE, {"base": "base"}),
        Node("train", train.STAGE, {"base": "base", "data": "prepare"}),
        Node("convert", convert.STAGE, {"base": "base", "data": "prepare", "checkpoint": "train"}),
        Node("eval-base", evaluate.STAGE, {"model": "base"}),
        *in_use,
        Node("eval", evaluate.STAGE, {"model": "convert"}),
        Node("verdict", verdict.STAGE, {"model": "convert", **judged}),
        Node("chat", chat.STAGE, {"model": "convert"}),
    )


STAGES = ("prepare", "train", "convert", "eval", "chat")
"""The five stages that users see; the other nodes serve them."""


def needed_for(name: str, recipe: Recipe) -> list[Node]:
    """The nodes that must exist for `name`, in order, `name` last."""
    wanted = {name}
    for node in reversed(nodes(recipe)):
        if node.name in wanted:
            wanted.update(node.inputs.values())
    return [node for node in nodes(recipe) if node.name in wanted]


def check(recipe: Recipe) -> None:
    """Tell a wrong name or a missing file before the first stage runs, not hours later.

    Raises:
        RecipeError: a name that no module has, a suite or kind of data set that is not known, a rule of the gate about nothing that is
            evaluated, or a tracker whose package is not installed.
        DataError: a file that is not there.
    """
    asked = {recipe.data.format, *(source.format for source in recipe.data.train)} - {"auto", None}
    named = [(launchers, recipe.train.launcher), *((formats, name) for name in sorted(name for name in asked if name))]
    named += [(packing, recipe.data.packing), (adapters, recipe.train.method)]
    named += [(optimizers, recipe.train.optimizer), (schedules, recipe.train.scheduler)]
    named += [(chatters, recipe.chat.chatter)] if recipe.chat.chatter != "auto" else []
    named += [(templates, recipe.model.template)] if recipe.model.template not in (None, templates.OWN) else []
    for package, name in named:
        registry.require(package, name)
    trackers.require_installed(recipe.train.trackers)
    registry.find(launchers, recipe.train.launcher).check(recipe.launch)
    check_stages(nodes(recipe), recipe)


def check_stages(chosen: Iterable[Node], recipe: Recipe) -> None:
    """Look at all that these steps read of the recipe; errors as those of `check`."""
    suites.chosen(recipe.eval)  # prepare's report looks for its questions
    for node in chosen:
        node.stage.files(recipe)
        node.stage.settings(recipe)


@dataclass(frozen=True, slots=True)
class Planned:
    """What a run would do with one node."""

    node: Node
    state: Literal["cached", "will run", "depends"]
    why: str
    key: str | None = None
    artifact: Artifact | None = None


def plan(recipe: Recipe, store: Store) -> Iterator[Planned]:
    """Say for every node whether it is cached, will run (and why), or depends on one that will run; errors as those of `check_stages`."""
    check_stages(nodes(recipe), recipe)
    found: dict[str, Artifact] = {}
    for node in nodes(recipe):
        waiting = [source for source in node.inputs.values() if source not in found]
        if waiting:
            yield Planned(node, "depends", f"on {', '.join(waiting)}")
            continue
        inputs = {name: found[source] for name, source in node.inputs.items()}
        ingredients = store.ingredients(node.stage, recipe, inputs)
        key = key_of(ingredients)
        try:
            artifact = store.find(node.stage.name, key)
        except Damaged as damage:
            yield Planned(node, "will run", f"damaged: {damage}", key)
            continue
        if artifact is None:
            yield Planned(node, "will run", _what_changed(store, node, ingredients), key)
        else:
            found[node.name] = artifact
            yield Planned(node, "cached", str(artifact.path), key, artifact)


def _what_changed(store: Store, node: Node, ingredients: dict[str, Any]) -> str:
    last = store.newest(node.stage.name, ingredients["inputs"])
    if last is None:
        return "never made"
    before, now = _flat(last.manifest["ingredients"]), _flat(ingredients)
    changes = [f"{field}: {before.get(field)} → {now.get(field)}" for field in sorted(before | now) if before.get(field) != now.get(field)]
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {path: leaf for key, child in value.items() for path, leaf in _flat(child, f"{name}.{key}" if name else str(key)).items()}
    if isinstance(value, list):
        return {path: leaf for index, child in enumerate(value) for path, leaf in _flat(child, f"{name}[{index}]").items()}
    return {name: value[:12] if isinstance(value, str) and len(value) == 64 else value}
