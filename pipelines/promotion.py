"""The registry: versions of a model, and which of them is in production.

STORE/models/<name>/versions/<0001>/version.json     what the version is: its artifacts, its data, its scores; sealed
                                   /model            link to the exported folder
                   /production                       link to the version in use, replaced by one rename
                   /history.jsonl                    who did what when, and why
                   /.intent.json                     the line of the history that belongs to a change of the link, until it is there

A run's result becomes a version once. `xtuner cache gc` keeps the artifacts of the version in production, of the one before it and of the
newest one (pipelines/inventory.py); of older versions only the files above and the manifests.
All links are relative, so that the store may be moved. The link `production` is the truth; killing at any instant leaves the old one or
the new one, and the history complete: the intent tells what a killed process had done but not written down.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from pipelines.artifacts import Artifact, Damaged, Hold, Store, is_sealed, sealed
from pipelines.model_history import Entry, succession, write_line, written
from pipelines.recipe import Recipe
from xtuner_core.durable import publish, remove, sync_directory, write_json
from xtuner_core.errors import DataError, RecipeError

Status = Literal["candidate", "rejected", "production", "retired"]
Decision = Literal["reject", "keep", "promote", "ask"]
REGISTRY = "registry"
"""As `eval.production` of a recipe: the recipe's own model in production."""
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
    intent = _intent(store, name)
    return [*entries, intent] if intent and intent not in entries else entries


def status(store: Store, version: Version) -> Status:
    """What has become of a version."""
    entries = [entry for entry in history(store, version.name) if entry.version == version.number]
    if _number_in_production(store, version.name) == version.number:
        return "production"
    if any(entry.what in _TO_PRODUCTION for entry in entries):
        return "retired"
    rejected = not version.gate or any(entry.what == "rejected" for entry in entries)
    return "rejected" if rejected else "candidate"


def decide(recipe: Recipe, version: Version, now: Status) -> Decision:
    """What the recipe wants done with a version that its run has made; what a person has taken out or rejected stays so."""
    if now == "rejected" and not version.gate:
        return "reject"
    if now != "candidate" or recipe.promotion.when == "never":
        return "keep"
    return "promote" if recipe.promotion.when == "gate" else "ask"


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
        if _number_in_production(store, version.name) == version.number or unless():
            return False
        _put(store, version, "promoted", by, why)
        return True


def reject(store: Store, version: Version, by: str, why: str) -> None:
    """Note that a version shall not be used.

    Raises:
        RecipeError: it is in production.
    """
    with _locked(store, version.name):
        if _number_in_production(store, version.name) == version.number:
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
    write_json(place / ".intent.json", asdict(entry))
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
    intent = _intent(store, name)
    if intent and intent not in written(place / "history.jsonl"):
        write_line(place / "history.jsonl", intent)
    (place / ".intent.json").unlink(missing_ok=True)


def _intent(store: Store, name: str) -> Entry | None:
    """What was to be done, if it was done."""
    try:
        intent = Entry(**json.loads((home(store, name) / ".intent.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return intent if _number_in_production(store, name) == intent.version else None


def _number_in_production(store: Store, name: str) -> int | None:
    try:
        return int(Path(os.readlink(home(store, name) / "production")).name)
    except (FileNotFoundError, ValueError):
        return None


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
