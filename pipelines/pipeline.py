"""The graph of a run: which stage feeds which, in one table, and what a run would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines import base_model, chat, chatters, convert, evaluate, launchers, prepare, production, suites, train, verdict
from pipelines.artifacts import Artifact, Damaged, Store, key_of
from pipelines.changes import Change, changes, origin, origin_of
from pipelines.recipe import Recipe
from pipelines.stage import Stage
from xtuner_core import adapters, registry, trackers
from xtuner_core.data import formats, packing, templates
from xtuner_core.optim import optimizers, schedules

TOLD = 3
"""Changes that one line names."""


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
    """In a line."""
    key: str | None = None
    artifact: Artifact | None = None
    changes: tuple[Change, ...] = ()
    """All that changed since `last`; of a node that depends on others, beside them."""
    last: Artifact | None = None
    """What the node made in the recipe's last run; perhaps it is cleaned up, and only its manifest is there."""


def plan(recipe: Recipe, store: Store) -> Iterator[Planned]:
    """Say for every node whether it is cached, will run (and why), or depends on one that will run; errors as those of `check_stages`."""
    check_stages(nodes(recipe), recipe)
    found: dict[str, Artifact] = {}
    stages = {node.name: node.stage.name for node in nodes(recipe)}
    for node in nodes(recipe):
        last = _last(store, recipe, node, {name: stages[source] for name, source in node.inputs.items()})
        inputs = {name: found[source] for name, source in node.inputs.items() if source in found}
        ingredients = store.ingredients(node.stage, recipe, inputs)
        changed = _changed(node, recipe, last, ingredients, inputs)
        if waiting := [source for source in node.inputs.values() if source not in found]:
            yield Planned(node, "depends", f"on {', '.join(waiting)}", changes=changed, last=last)
            continue
        step = _look_up(store, node, key_of(ingredients), changed, last)
        if step.artifact:
            found[node.name] = step.artifact
        yield step


def _look_up(store: Store, node: Node, key: str, changed: tuple[Change, ...], last: Artifact | None) -> Planned:
    try:
        artifact = store.find(node.stage.name, key)
    except Damaged as damage:
        return Planned(node, "will run", f"damaged: {damage}", key, last=last)
    if artifact:
        return Planned(node, "cached", str(artifact.path), key, artifact)
    return Planned(node, "will run", _why(key, changed, last), key, changes=changed, last=last)


def _why(key: str, changed: Sequence[Change], last: Artifact | None) -> str:
    if last is None:
        return "never made"
    if last.manifest["key"] == key:
        return f"cleaned up: {last.manifest.get('removed', 'its folder is gone')}"
    more = f"; and {len(changed) - TOLD} more" if len(changed) > TOLD else ""
    return "; ".join(change.told() for change in changed[:TOLD]) + more


def _last(store: Store, recipe: Recipe, node: Node, inputs: Mapping[str, str]) -> Artifact | None:
    """What the node made last; the inputs' stages tell the evaluation of the base from that of the tuned model."""
    for artifact in store.recent(node.stage.name):
        made_from = {name: one["stage"] for name, one in artifact.manifest.get("inputs", {}).items()}
        if artifact.manifest["recipe"] == recipe.name and made_from == inputs:
            return artifact
    return None


def _changed(
    node: Node, recipe: Recipe, last: Artifact | None, ingredients: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> tuple[Change, ...]:
    if last is None:
        return ()
    found = changes(origin_of(last.manifest), origin(ingredients, node.stage.files(recipe), inputs))
    return tuple(change for change in found if change.kind != "input" or change.what in inputs)


def explain(step: Planned) -> Iterator[str]:
    """All that `xtuner plan --why` tells of a node beside its line."""
    if step.last is not None and step.state != "cached":
        made = f"{step.last.path.parent.name}/{step.last.path.name} of {step.last.manifest['created'][:16].replace('T', ' ')}"
        yield f"since {made}:"
        yield from (f"  {change.kind:<8} {change.told()}" for change in step.changes)
    if step.state == "depends":
        if step.last is None:
            yield "never made by this recipe"
        elif not step.changes:
            yield "  nothing of its own changed: it is cached again if what it depends on comes out the same"
