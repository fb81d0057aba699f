"""The registry of models: which versions there are, where they came from, and which is in production. Only read here
(pipelines/promotion.py changes it).

STORE/models/<name>/versions/<0001>/version.json     what the version is: its artifacts, its data, its scores; sealed
                                   /model            link to the exported folder
                   /production                       link to the version in use, replaced by one rename
                   /history.jsonl                    who did what when, and why
                   /.intent.json                     the line of the history that belongs to a change of the link, until it is there

`xtuner cache gc` keeps the artifacts of the version in production, of the one before it and of the newest one (pipelines/inventory.py); of
older versions only the files above and the manifests. All links are relative, so that the store may be moved.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.artifacts import Artifact, Store, is_sealed
from pipelines.model_history import Entry, written
from pipelines.recipe import Recipe
from xtuner_core.errors import DataError, RecipeError

Status = Literal["candidate", "rejected", "production", "retired"]
REGISTRY = "registry"
"""As `eval.production` of a recipe: the recipe's own model in production."""
INTENT = ".intent.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TO_PRODUCTION = ("promoted", "rolled back")


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
    """Where the registry keeps a model.

    Raises:
        RecipeError: the name is none, and might lead out of the registry.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(f"{name!r} is no name of a model: letters, digits, '.', '_' and '-', beginning with a letter or digit.")
    return store.root / "models" / name


def folder(store: Store, version: Version) -> Path:
    """Where the registry keeps a version; `model` in it is the exported folder."""
    return home(store, version.name) / "versions" / f"{version.number:04d}"


def names(store: Store) -> list[str]:
    """Every model of the registry."""
    return sorted(path.name for path in (store.root / "models").glob("[!.]*") if (path / "versions").is_dir())


def versions(store: Store, name: str) -> list[Version]:
    """A model's versions, oldest first.

    Raises:
        DataError: a version's file is damaged.
    """
    files = (home(store, name) / "versions").glob("[0-9]*/version.json")
    return sorted(map(read_version, files), key=lambda version: version.number)


def production(store: Store, name: str) -> Version | None:
    """The version in use, None if there is none.

    Raises:
        DataError: the link leads nowhere, or the version's file is damaged.
    """
    link = home(store, name) / "production"
    return read_version(link / "version.json") if link.is_symlink() else None


def number_in_production(store: Store, name: str) -> int | None:
    try:
        return int(Path(os.readlink(home(store, name) / "production")).name)
    except (FileNotFoundError, ValueError):
        return None


def read_version(file: Path) -> Version:
    """A version's file.

    Raises:
        DataError: it is not there, or not as it was written.
    """
    try:
        content = file.read_bytes()
        if is_sealed(content):
            return Version(**{name: value for name, value in json.loads(content).items() if name != "seal"})
        reason = "was edited"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"cannot be read ({error})"
    raise DataError(f"{file}: {reason}. Restore it from a backup, or remove its folder and run the recipe again.")


def artifact(store: Store, version: Version, node: str) -> Artifact:
    """What a node of the version's run made, whether it is in the store any more or not; of what was cleaned up the manifest is known."""
    made = version.artifacts[node]
    return store.known(made["stage"], made["key"])


def checkpoint(store: Store, version: Version) -> Path:
    """The trained tensors that a later run may begin with."""
    return artifact(store, version, "train").payload / "checkpoint"


def went_on_from(store: Store, version: Version) -> Version | None:
    """The version with whose weights the training of this one began; None if that was the base model, or a version that is unknown."""
    return _of_checkpoint(store, version.name, artifact(store, version, "train"))


def _of_checkpoint(store: Store, name: str, train: Artifact) -> Version | None:
    """The version whose checkpoint a training began with, by the checkpoint's content."""
    try:
        begun_with = train.manifest["ingredients"]["files"][:1]
    except (OSError, ValueError):
        return None
    return next((version for version in versions(store, name) if begun_with and _facts_digest(store, version) == begun_with[0]), None)


def _facts_digest(store: Store, version: Version) -> str | None:
    """sha256 of its checkpoint.json, which holds those of the tensors."""
    try:
        files = artifact(store, version, "train").manifest["files"]
    except (OSError, ValueError):
        return None
    return next((file["sha256"] for file in files if file["path"] == "payload/checkpoint/checkpoint.json"), None)


def trained_on(store: Store, name: str, made: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Path and sha256 of every training file of a run, and of those that the version it went on from had seen, without validation files."""
    manifest = made["prepare"].manifest
    used = [
        file for file, source in zip(manifest["input_files"], manifest["metrics"]["sources"], strict=True) if source["split"] == "train"
    ]
    before = _of_checkpoint(store, name, made["train"])
    every = [*(before.data if before else []), *used]
    return list({file["sha256"]: {"path": file["path"], "sha256": file["sha256"]} for file in every}.values())


def find(store: Store, text: str) -> Version:
    """The version that `NAME@NUMBER` or `NAME@production` means; of `NAME` alone the one in production, or the newest while there is none.

    Raises:
        RecipeError: there is no such model or version; the message lists what there is.
    """
    name, at, number = text.partition("@")
    known = versions(store, name)
    if not known:
        raise RecipeError(f"{text}: no such model in {store.root}; known: {', '.join(names(store)) or 'none'}.")
    if not at:
        return production(store, name) or known[-1]
    if number == "production":
        if version := production(store, name):
            return version
        raise RecipeError(f"{text}: no version of {name} is in production.")
    for version in known:
        if number.isdecimal() and version.number == int(number):
            return version
    raise RecipeError(f"{text}: {name} has the versions {', '.join(str(version.number) for version in known)}.")


def history(store: Store, name: str) -> list[Entry]:
    """Who did what, oldest first; a last line that was torn by a power cut is passed over.

    Raises:
        DataError: another line cannot be read.
    """
    entries = written(home(store, name) / "history.jsonl")
    intent = intent_done(store, name)
    return [*entries, intent] if intent and intent not in entries else entries


def intent_done(store: Store, name: str) -> Entry | None:
    """What was to be done, if it was done."""
    try:
        intent = Entry(**json.loads((home(store, name) / INTENT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return intent if number_in_production(store, name) == intent.version else None


def status(store: Store, version: Version) -> Status:
    """What has become of a version."""
    entries = [entry for entry in history(store, version.name) if entry.version == version.number]
    if number_in_production(store, version.name) == version.number:
        return "production"
    if any(entry.what in _TO_PRODUCTION for entry in entries):
        return "retired"
    rejected = not version.gate or any(entry.what == "rejected" for entry in entries)
    return "rejected" if rejected else "candidate"


def judged_against_another(store: Store, recipe: Recipe, version: Version) -> bool:
    """Whether the recipe, as it is written, wants a version compared with the one in production, and it was with another or with none.

    By what the version's run read: whatever was in production when it was resumed.
    """
    if recipe.eval.production != REGISTRY:
        return False
    in_use = production(store, version.name)
    if "production" not in version.artifacts or in_use is None:
        return ("production" in version.artifacts) or in_use is not None
    try:
        compared = artifact(store, version, "production").manifest["ingredients"]["files"]
        files = artifact(store, in_use, "convert").manifest["files"]
    except (OSError, ValueError):
        return True
    return not {file["sha256"] for file in files}.issuperset(compared)
