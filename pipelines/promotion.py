"""Changing the registry of models (pipelines/model_registry.py): a run's result becomes a version once, goes into production, comes back.

The link `production` is the truth; killing at any instant leaves the old one or the new one, and the history complete: the intent tells
what a killed process had done but not written down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import Artifact, Damaged, Hold, Store, sealed
from pipelines.model_history import Entry, succession, write_line, written
from pipelines.model_registry import (
    INTENT,
    Status,
    Version,
    find,
    folder,
    history,
    home,
    intent_done,
    model_name,
    names,
    number_in_production,
    trained_on,
    versions,
)
from pipelines.recipe import Recipe
from xtuner_core.durable import publish, remove, sync_directory, write_json
from xtuner_core.errors import DataError, RecipeError

Decision = Literal["reject", "keep", "promote", "ask"]


def decide(recipe: Recipe, version: Version, now: Status) -> Decision:
    """What the recipe wants done with a version that its run has made; what a person has taken out or rejected stays so."""
    if now == "rejected" and not version.gate:
        return "reject"
    if now != "candidate" or recipe.promotion.when == "never":
        return "keep"
    return "promote" if recipe.promotion.when == "gate" else "ask"


def register(
    store: Store, recipe: Recipe, made: Mapping[str, Artifact], gate: bool, faults: str, scores: Mapping[str, Any], by: str = "run"
) -> Version:
    """Make the run's result a version of its model; the version it is already, if it is one."""
    name = model_name(recipe)
    with _locked(store, name):
        references = {node: artifact.reference for node, artifact in made.items()}
        known = versions(store, name)
        version = next((old for old in known if _is_result_of(old, references)), None) or _publish(
            store,
            Version(
                name=name,
                number=known[-1].number + 1 if known else 1,
                recipe=recipe.name,
                created=_now(),
                artifacts=references,
                data=trained_on(store, name, made),
                gate=gate,
                faults=faults,
                scores={role: dict(figures) for role, figures in scores.items()},
            ),
        )
        if not any(entry.version == version.number and entry.what == "registered" for entry in history(store, name)):
            _append(store, version, "registered", by, version.faults or "passed")
        return version


def promote(store: Store, version: Version, by: str, why: str, unless: Callable[[], bool] = lambda: False) -> bool:
    """Put a version into production; whoever opens the link sees the old model or the new one. False if it is there already, or `unless`
    holds when nobody else can change the registry any more.

    Raises:
        DataError: the exported folder is missing, damaged, or not the one that was judged; every byte is read again first.
    """
    with _locked(store, version.name):
        if number_in_production(store, version.name) == version.number or unless():
            return False
        _put(store, version, "promoted", by, why)
        return True


def reject(store: Store, version: Version, by: str, why: str) -> None:
    """Note that a version shall not be used.

    Raises:
        RecipeError: it is in production.
    """
    with _locked(store, version.name):
        if number_in_production(store, version.name) == version.number:
            raise RecipeError(f"{version.title} is in production; `xtuner rollback {version.name}` takes it out.")
        if not any(entry.version == version.number and entry.what == "rejected" for entry in history(store, version.name)):
            _append(store, version, "rejected", by, why)


def rollback(store: Store, name: str, by: str, why: str) -> Version:
    """Put the version back that was in production before; again goes further back. Returns it.

    Raises:
        RecipeError: there is none.
        DataError: as `promote`.
    """
    with _locked(store, name):
        if not versions(store, name):
            find(store, name)  # tells which models there are
        before = succession(history(store, name))[:-1]
        if not before:
            raise RecipeError(f"{name}: no version was in production before; `xtuner models {name}` lists what there is to promote.")
        version = find(store, f"{name}@{before[-1]}")
        _put(store, version, "rolled back", by, why)
        return version


def require_whole(store: Store, version: Version) -> None:
    """Read every byte of the exported folder again.

    Raises:
        DataError: it is missing, damaged, or not the one that the version is about.
    """
    made = version.artifacts["convert"]
    try:
        artifact = store.find(made["stage"], made["key"], full=True)
    except Damaged as damage:
        raise DataError(f"{version.title}: its exported model is damaged: {store.root / made['stage'] / made['key']}: {damage}") from None
    if artifact is None:
        again = f"run the recipe {version.recipe} as it was then to make it again"
        raise DataError(f"{version.title}: its exported model {made['stage']}/{made['key']} is not in {store.root} any more; {again}.")
    if artifact.digest != made["payload_digest"]:
        raise DataError(f"{version.title}: {artifact.path} was made again and is not the model that was judged; run the recipe again.")
    if (link := folder(store, version) / "model").resolve() != artifact.payload / "model":
        raise DataError(f"{link}: leads to {link.resolve()} instead of {artifact.payload / 'model'}; restore the link.")


def _is_result_of(version: Version, references: Mapping[str, Mapping[str, str]]) -> bool:
    """The same bytes, judged alike: not who asked for them, nor with which libraries they came out the same."""
    judged = ("convert", "verdict", "chat")
    return all(version.artifacts[node]["payload_digest"] == references[node]["payload_digest"] for node in judged)


def _publish(store: Store, version: Version) -> Version:
    target = folder(store, version)
    draft = target.with_name(f".{target.name}.draft")
    for abandoned in target.parent.glob(".*.draft"):  # of processes that were killed: we hold the lock
        remove(abandoned)
    draft.mkdir(parents=True)
    write_json(draft / "version.json", sealed(asdict(version)))
    made = version.artifacts["convert"]
    _link(draft / "model", os.path.relpath(store.root / made["stage"] / made["key"] / "payload" / "model", target))
    publish(draft, target)
    return version


def _put(store: Store, version: Version, what: Literal["promoted", "rolled back"], by: str, why: str) -> None:
    """Write down what will be done, do it, write it into the history."""
    hold = _held(store, version)
    require_whole(store, version)
    place = home(store, version.name)
    entry = Entry(_now(), version.number, what, by, why)
    write_json(place / INTENT, asdict(entry))
    _link(place / "production", f"versions/{version.number:04d}")
    del hold
    _settle(store, version.name)


def _held(store: Store, version: Version) -> Hold | None:
    """A clean-up that had chosen the exported model leaves it alone from now on, or has removed it already."""
    made = version.artifacts["convert"]
    folder = store.root / made["stage"] / made["key"]
    return Hold(folder) if folder.is_dir() else None


def _settle(store: Store, name: str) -> None:
    """Bring the history up to what the link says, as far as a process that was killed left that undone."""
    place = home(store, name)
    intent = intent_done(store, name)
    if intent and intent not in written(place / "history.jsonl"):
        write_line(place / "history.jsonl", intent)
    (place / INTENT).unlink(missing_ok=True)


def _append(store: Store, version: Version, what: Literal["registered", "rejected"], by: str, why: str) -> None:
    write_line(home(store, version.name) / "history.jsonl", Entry(_now(), version.number, what, by, why))


def _link(link: Path, target: str) -> None:
    draft = link.with_name(f".{link.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    os.replace(draft, link)
    sync_directory(link.parent)


@contextmanager
def _locked(store: Store, name: str) -> Iterator[None]:
    """One process at a time; what an earlier one left undone is done first."""
    from filelock import FileLock

    home(store, name)
    locks = store.root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"models-{name}.lock"):
        _settle(store, name)
        yield


@contextmanager
def at_rest(store: Store) -> Iterator[None]:
    """Nobody changes the registry meanwhile, and nothing is half done."""
    with ExitStack() as stack:
        for name in names(store):
            stack.enter_context(_locked(store, name))
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
