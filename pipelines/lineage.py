"""Where a model came from: the chain of manifests from the exported model back to the digest of every input file.

A training that went on from an earlier one names that one's checkpoint among its files, so the chain goes on there; so does that of a
model in use which the tuned one was compared with. Manifests of artifacts that were cleaned up are kept (pipelines/cleanup.py), and an
artifact that was made again under another key with the same bytes stands for the one that is gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import model_registry
from pipelines.artifacts import Store, is_sealed
from pipelines.model_registry import Version
from xtuner_core.errors import RecipeError

Reference = Mapping[str, str]
"""`stage`, `key` and `payload_digest` of an artifact, as manifests and versions name it."""
_EARLIER = "earlier "
"""Names of inputs that came as files of an earlier run begin so."""
_IN_STORE = re.compile(r".*/([\w-]+)/([0-9a-f]{16})/payload/(.+)")


@dataclass(frozen=True, slots=True)
class Step:
    """One artifact of the chain."""

    reference: Reference
    """How the one that was made of it names it."""
    node: str
    """Which step of the run it is; its stage, if it is of an earlier run."""
    path: Path | None
    """Where it lies; None if it is gone."""
    manifest: Mapping[str, Any]
    """Empty if it cannot be read."""
    inputs: Mapping[str, str]
    """Name of an input → id of its step."""

    @property
    def id(self) -> str:
        return id_of(self.reference)


@dataclass(frozen=True, slots=True)
class Chain:
    """Everything that a model depends on, and what was found out about it; what something is made of comes before it."""

    title: str
    store: Store
    model: Reference
    version: Version | None
    steps: tuple[Step, ...]

    def own(self) -> set[str]:
        """Ids of the steps of the model's own run; the others are of runs that it went on from, or was compared with."""
        wanted = {id_of(one) for one in (self.version.artifacts.values() if self.version else [self.model])}
        for step in reversed(self.steps):
            if step.id in wanted:
                wanted.update(source for name, source in step.inputs.items() if not name.startswith(_EARLIER))
        return wanted

    def ancestors(self) -> list[Step]:
        """The model's own steps: not how it was judged, nor what it was compared with."""
        wanted = {id_of(self.model)}
        for step in reversed(self.steps):
            wanted.update(step.inputs.values() if step.id in wanted else ())
        return [step for step in self.steps if step.id in wanted]


def trace_back(store: Store, model: str) -> Chain:
    """The chain of `model`: NAME, NAME@NUMBER, or a path to (or into) an artifact or a version, whose store counts then.

    Raises:
        RecipeError: it is none of them.
        DataError: a version's file is damaged.
    """
    store, version, reference = _meant(store, model)
    nodes = version.artifacts if version else {reference["stage"]: reference}
    names = {id_of(one): node for node, one in nodes.items()}
    found: dict[str, Step] = {}
    for one in nodes.values():
        _walk(store, one, names, found)
    title = version.title if version else id_of(reference)
    return Chain(title, store, reference, version, tuple(found.values()))


def _meant(store: Store, model: str) -> tuple[Store, Version | None, Reference]:
    if "/" not in model and (model.partition("@")[0] in model_registry.names(store) or not Path(model).exists()):
        version = model_registry.find(store, model)
        return store, version, version.artifacts["convert"]
    path = Path(model).resolve()
    for folder in (path, *path.parents):
        if (folder / "version.json").is_file():
            version = model_registry.read_version(folder / "version.json")
            return Store(folder.parents[3]), version, version.artifacts["convert"]
        if (folder / "manifest.json").is_file() and (folder / "payload").is_dir():
            store = Store(folder.parents[1])
            return store, None, _reference(store, folder)
    raise RecipeError(f"{model}: neither a model of the registry in {store.root} nor in an artifact of a store.")


def _reference(store: Store, folder: Path) -> Reference:
    return {"stage": folder.parent.name, "key": folder.name, "payload_digest": manifest_of(store, folder).get("payload_digest", "")}


def _walk(store: Store, reference: Reference, names: Mapping[str, str], found: dict[str, Step]) -> None:
    """Add the artifact after all that it is made of."""
    if id_of(reference) in found:
        return
    path, manifest = _locate(store, reference)
    inputs = {**manifest.get("inputs", {}), **_from_store(store, manifest)}
    for one in inputs.values():
        _walk(store, one, names, found)
    node = names.get(id_of(reference), reference["stage"])
    found[id_of(reference)] = Step(reference, node, path, manifest, {name: id_of(one) for name, one in inputs.items()})


def _locate(store: Store, reference: Reference) -> tuple[Path | None, Mapping[str, Any]]:
    """Its folder, or that of one with the same bytes, or only its manifest."""
    stage, key = reference["stage"], reference["key"]
    folder = store.root / stage / key
    if folder.is_dir():
        return folder, read_manifest(folder / "manifest.json")
    for file in sorted((store.root / stage).glob("*/manifest.json")):
        if reference["payload_digest"] and read_manifest(file).get("payload_digest") == reference["payload_digest"]:
            return file.parent, read_manifest(file)
    return None, manifest_of(store, folder)


def manifest_of(store: Store, folder: Path) -> Mapping[str, Any]:
    """The manifest of an artifact that is there or was cleaned up; as `read_manifest`."""
    return read_manifest(folder / "manifest.json" if folder.is_dir() else _kept_manifest(store, folder))


def _kept_manifest(store: Store, folder: Path) -> Path:
    return store.root / ".removed" / f"{folder.parent.name}-{folder.name}.json"


def read_manifest(file: Path) -> Mapping[str, Any]:
    """A manifest, empty if it cannot be read or is not as it was written: then nothing in it can be relied on."""
    try:
        content = file.read_bytes()
        return json.loads(content) if is_sealed(content) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _from_store(store: Store, manifest: Mapping[str, Any]) -> dict[str, Reference]:
    """Artifacts of earlier runs whose files were read as any other file: a checkpoint to begin with, the model in use."""
    inputs = {}
    for one in manifest.get("input_files", []):
        if place := place_in(store, one["path"]):
            inputs[_EARLIER + place.parent.name] = _reference(store, place)
    return inputs


def place_in(store: Store, path: str) -> Path | None:
    """The artifact that the file is in, or was in before it was cleaned up; also if the store, or what leads to it, was moved since."""
    for text in (path, str(Path(path).resolve())):
        if match := _IN_STORE.fullmatch(text):
            folder = store.root / match[1] / match[2]
            if folder.is_dir() or _kept_manifest(store, folder).is_file():
                return folder
    return None


def id_of(reference: Reference) -> str:
    """An artifact's name in its store."""
    return f"{reference['stage']}/{reference['key']}"
