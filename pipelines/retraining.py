"""What a recipe means today: its own model in production, if it goes on from that, and whether there is anything new to learn.

The same files lead to the same run, whatever went into production since: a run that goes on begins with the last version that has not
seen all of today's files. So a run that is asked for twice is cached the second time, although its model may be in production by then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import base_model, model_registry, prepare
from pipelines.artifacts import Artifact, Store
from pipelines.model_registry import REGISTRY, Version
from pipelines.pipeline import Node, nodes
from pipelines.recipe import Recipe, changed, load_recipe
from xtuner_core.config import DataConfig, Source, trained_otherwise
from xtuner_core.data.prepare import Input
from xtuner_core.digest import key_of

SHOWN = 5
"""Differences that a message tells."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """With whose trained weights a run begins, at the base model if None; and why, in one line."""

    version: Version | None
    why: str


@dataclass(frozen=True, slots=True)
class News:
    """What there is to learn since a version was trained, a line each."""

    since: Version
    changes: list[str]


def recipe_of_today(recipe: str | Recipe, changes: Sequence[str] | None, store: Store) -> Recipe:
    """What every command and the flow begin with: the recipe that is meant (a shipped name, a file or the whole), as it is today.

    Raises:
        RecipeError: it is not there, not readable, or a change does not fit it.
        DataError: it goes on from production, and a training file is not there.
    """
    return as_of_today(asked(recipe, changes), store)


def asked(recipe: str | Recipe, changes: Sequence[str] | None) -> Recipe:
    """The recipe that is meant, as it is written (RecipeError: as `recipe_of_today`)."""
    return load_recipe(recipe, changes or []) if isinstance(recipe, str) else changed(recipe, changes or [])


def as_of_today(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with folders in place of what it says about production; stages see nothing else."""
    return _compared(_continued(recipe, store), store)


def _compared(recipe: Recipe, store: Store) -> Recipe:
    if recipe.eval.production != REGISTRY:
        return recipe
    if version := model_registry.production(store, model_registry.model_name(recipe)):
        update = {"production": str(model_registry.folder(store, version) / "model")}
    else:  # the first one has nothing to be better than
        update = {"production": None, "gate": tuple(rule for rule in recipe.eval.gate if rule.against != "production")}
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=update)})


def _continued(recipe: Recipe, store: Store) -> Recipe:
    version = beginning(recipe, store).version
    if version is None:
        return recipe
    inputs = training_inputs(recipe)
    known = {entry["sha256"] for entry in version.data}
    old = [digest in known for digest in store.file_digests([one.file for one in inputs])]
    sources = split(inputs, old, recipe.retrain.replay, version.number, recipe.data)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"train": sources}),
            "train": recipe.train.model_copy(update={"start": str(model_registry.checkpoint(store, version))}),
        }
    )


def split(inputs: Sequence[Input], old: Sequence[bool], replay: float, draw: int, data: DataConfig) -> tuple[Source, ...]:
    """Training files one by one: new ones as the recipe says, of the old ones the share `replay`, another part of them for each `draw`."""
    return tuple(
        Source(
            path=str(one.file),
            format=None if one.format == data.format else one.format,
            sample_ratio=one.sample_ratio * (replay if seen else 1),
            draw=draw if seen else 0,
        )
        for one, seen in zip(inputs, old, strict=True)
        if replay or not seen
    )


def training_inputs(recipe: Recipe) -> list[Input]:
    """Every file that is trained on once, folders and patterns expanded."""
    return [one for one in prepare.inputs_of(recipe) if not one.validation]


# Where training begins --------------------------------------------------------------------------------------------------------------


def beginning(recipe: Recipe, store: Store) -> Beginning:
    """Where the training of the recipe, as it is written, begins today."""
    name = model_registry.model_name(recipe)
    if recipe.retrain.start == "base":
        return Beginning(None, "training begins at the base model, as the recipe says")
    in_use = model_registry.production(store, name)
    if in_use is None:
        return Beginning(None, f"training begins at the base model: no version of {name} is in production yet")
    if reason := _unfit(recipe, store, in_use):
        return Beginning(None, f"training begins at the base model and not at {in_use.title}, which is in production: {reason}")
    version = _not_ahead(store, in_use, store.file_digests([one.file for one in training_inputs(recipe)]))
    if version is None:
        return Beginning(None, f"training begins at the base model, as that of {in_use.title} did: all files were in it")
    if gone := _without_checkpoint(store, version):
        return Beginning(None, f"training begins at the base model: {version.title} is the last that has not seen all files, and {gone}")
    return Beginning(version, f"training begins with the weights of {version.title}")


def _not_ahead(store: Store, version: Version | None, digests: Collection[str]) -> Version | None:
    """The version, or the one before it that has not seen all of these files."""
    while version and {entry["sha256"] for entry in version.data}.issuperset(digests):
        version = model_registry.went_on_from(store, version)
    return version


def _unfit(recipe: Recipe, store: Store, version: Version) -> str:
    """Why training cannot go on from a version; empty if it can. What settings do not tell, the engine does when it loads the tensors."""
    if gone := _without_checkpoint(store, version):
        return gone
    try:
        train, base = (model_registry.artifact(store, version, node).manifest for node in ("train", "base"))
    except (OSError, ValueError):
        return "what it was made of is not in the store any more"
    if differs := trained_otherwise(train["ingredients"]["settings"]["train"], recipe.train):
        return differs
    return "" if _same_base(recipe, store, base) else "model.base is another model than the one it was trained on"


def _without_checkpoint(store: Store, version: Version) -> str:
    there = (model_registry.checkpoint(store, version) / "checkpoint.json").is_file()
    return "" if there else "its training checkpoint is not in the store any more"


def _same_base(recipe: Recipe, store: Store, earlier: Mapping[str, Any]) -> bool:
    """By the bytes, if today's base is in the store, else by what the recipe says of it."""
    now = store.ingredients(base_model.STAGE, recipe, {})
    made = Artifact(store.root / base_model.STAGE.name / key_of(now))
    if made.path.is_dir():
        return made.digest == earlier["payload_digest"]
    return all(now[part] == earlier["ingredients"][part] for part in ("settings", "files"))


# Whether there is anything new ------------------------------------------------------------------------------------------------------

_FOLLOWS_FROM_DATA = ("files", "settings.inputs", "settings.files", "settings.card.data.train")
_BY_CONTENT = {"prepare": _FOLLOWS_FROM_DATA, "train": ("files",), "convert": _FOLLOWS_FROM_DATA, "verdict": _FOLLOWS_FROM_DATA}
"""What tells which files are trained on, and with which weights a run begins: in a recipe that goes on, not by itself a reason to."""


def nothing_new(recipe: Recipe, store: Store) -> str | None:
    """Why a run that nobody asked for by hand need not be: a line that begins with `no new data`; None if there is something to learn.

    `recipe` is the one of today.
    """
    found = news(recipe, store)
    if found is None or found.changes:
        return None
    made = f"{found.since.title} ({found.since.created})"
    return f"no new data: {made} was trained on what the files of data.train hold, with the same settings, base model and libraries"


def news(recipe: Recipe, store: Store) -> News | None:
    """What has changed since the newest version that this recipe made, promoted or not; None if it has made none.

    A run that ended before its model was registered does not count. `recipe` is the one of today.
    """
    last = newest_made(recipe, store)
    if last is None:
        return None
    steps = [node for node in nodes(recipe) if "production" not in node.name]  # what is in use changes without anything new to learn
    changes = [f"file {file}" for file in new_files(recipe, store, last)]
    return News(last, [*changes, *(change for node in steps for change in _changes(node, recipe, store, last))])


def newest_made(recipe: Recipe, store: Store) -> Version | None:
    """The newest version that this recipe made, whatever has become of it."""
    made = [version for version in model_registry.versions(store, model_registry.model_name(recipe)) if version.recipe == recipe.name]
    return made[-1] if made else None


def new_files(recipe: Recipe, store: Store, version: Version) -> list[Path]:
    """The training files that neither the version nor those that it goes on from have seen."""
    known = {entry["sha256"] for entry in version.data}
    files = [one.file for one in training_inputs(recipe)]
    return [file for file, digest in zip(files, store.file_digests(files), strict=True) if digest not in known]


def _changes(node: Node, recipe: Recipe, store: Store, version: Version) -> list[str]:
    try:
        before = model_registry.artifact(store, version, node.name).manifest["ingredients"]
    except (OSError, ValueError, KeyError):
        return [f"{node.name}: what {version.title} was made of is not in the store any more"]
    by_content = _BY_CONTENT.get(node.name, ()) if recipe.retrain.start == "production" else ()
    now = store.ingredients(node.stage, recipe, {})
    old, new = (_without_production(_fields({**one, "inputs": {}}, by_content)) for one in (before, now))
    return [
        f"{node.name}: {field}: {old.get(field)} → {new.get(field)}" for field in sorted({**old, **new}) if old.get(field) != new.get(field)
    ]


def _without_production(fields: dict[str, Any]) -> dict[str, Any]:
    """The gate's rules against production there are only while something is in production."""
    gate = [rule for rule in fields.get("settings.gate", []) if rule["against"] != "production"]
    return {**fields, "settings.gate": gate} if "settings.gate" in fields else fields


def _fields(tree: Mapping[str, Any], without: Collection[str], above: str = "") -> dict[str, Any]:
    """The leaves by path; lists are leaves."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if (path := f"{above}{name}") not in without:
            found.update(_fields(value, without, f"{path}.") if isinstance(value, dict) else {path: value})
    return found
