"""The registry: versions of a model, and which of them is in production.

STORE/models/<name>/versions/<0001>/version.json     what the version is: its artifacts, its data, its scores
                                   /model            link to the exported folder
                   /production                       link to the version in use, replaced by one rename
                   /history.jsonl                    who did what when, and why

A run's result becomes a version once; what is a version, or was one in production, is never removed by `xtuner cache gc`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.artifacts import Artifact, Store
from pipelines.recipe import Recipe
from xtuner_core.durable import publish, sync_directory, write_json
from xtuner_core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Version:
    """One model that the registry knows."""

    name: str
    number: int
    recipe: str
    created: str
    artifacts: dict[str, dict[str, str]]
    """Node of the run → the artifact's `reference` (stage, key, payload_digest)."""
    data: list[dict[str, str]]
    """Path and sha256 of every file it was trained on, those of the versions it went on from included."""
    gate: bool
    """Whether the recipe's gate and the chat test passed."""
    faults: str
    """Why not."""
    scores: dict[str, dict[str, float]]
    """Role → data set → figure."""

    @property
    def title(self) -> str:
        return f"{self.name}@{self.number}"


def model_name(recipe: Recipe) -> str:
    """What the recipe's models are called in the registry."""
    return recipe.promotion.model or recipe.name


def home(store: Store, name: str) -> Path:
    """Where the registry keeps a model."""
    return store.root / "models" / name


def folder(store: Store, version: Version) -> Path:
    """Where the registry keeps a version; `model` in it is the exported folder."""
    return home(store, version.name) / "versions" / f"{version.number:04d}"


def names(store: Store) -> list[str]:
    """Every model of the registry."""
    return sorted(path.name for path in (store.root / "models").glob("*") if (path / "versions").is_dir())


def versions(store: Store, name: str) -> list[Version]:
    """A model's versions, oldest first."""
    files = sorted((home(store, name) / "versions").glob("[0-9]*/version.json"))
    return [Version(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def production(store: Store, name: str) -> Version | None:
    """The version in use, None if there is none."""
    file = home(store, name) / "production" / "version.json"
    try:
        return Version(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def find(store: Store, text: str) -> Version:
    """The version that `NAME@NUMBER` means; of `NAME` alone the one in production, or the newest while there is none.

    Raises:
        RecipeError: there is no such model or version; the message lists what there is.
    """
    name, _, number = text.partition("@")
    known = versions(store, name)
    if not known:
        raise RecipeError(f"{text}: no such model in {store.root}; known: {', '.join(names(store)) or 'none'}.")
    if not number:
        return production(store, name) or known[-1]
    for version in known:
        if number.isdecimal() and version.number == int(number):
            return version
    raise RecipeError(f"{text}: {name} has the versions {', '.join(str(version.number) for version in known)}.")


def register(store: Store, recipe: Recipe, made: Mapping[str, Artifact], gate: bool, faults: str, scores: Mapping[str, Any]) -> Version:
    """Make the run's result a version of its model; the version it is already, if it is one."""
    name = model_name(recipe)
    with _locked(store, name):
        references = {node: artifact.reference for node, artifact in made.items()}
        known = versions(store, name)
        for version in known:
            if (version.artifacts["convert"], version.artifacts["verdict"]) == (references["convert"], references["verdict"]):
                return version
        version = Version(
            name=name,
            number=known[-1].number + 1 if known else 1,
            recipe=recipe.name,
            created=_now(),
            artifacts=references,
            data=made["prepare"].manifest["input_files"],
            gate=gate,
            faults=faults,
            scores={role: dict(figures) for role, figures in scores.items()},
        )
        target = folder(store, version)
        draft = target.with_name(f".{target.name}.draft")
        draft.mkdir(parents=True, exist_ok=True)
        write_json(draft / "version.json", asdict(version))
        _link(draft / "model", os.path.relpath(made["convert"].payload / "model", target))
        publish(draft, target)
        _note(store, version, "registered", "run", faults or "passed")
        return version


def promote(store: Store, version: Version, by: str, why: str) -> None:
    """Put a version into production; whoever opens the link sees the old model or the new one."""
    with _locked(store, version.name):
        _link(home(store, version.name) / "production", f"versions/{version.number:04d}")
        _note(store, version, "promoted", by, why)


def _link(link: Path, target: str) -> None:
    draft = link.with_name(f".{link.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    os.replace(draft, link)
    sync_directory(link.parent)


def _note(store: Store, version: Version, what: str, by: str, why: str) -> None:
    line = {"at": _now(), "version": version.number, "what": what, "by": by, "why": why}
    with open(home(store, version.name) / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _locked(store: Store, name: str) -> FileLock:
    locks = store.root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"models-{name}.lock")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
