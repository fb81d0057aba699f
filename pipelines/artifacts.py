"""The artifact store: directories named by the hash of everything that decides their bytes, whole or absent.

STORE/<stage>/<key>/payload/       the result; its digest is part of the keys of later stages
                   /record/        logs, pictures, timings
                   /manifest.json  inputs, settings, environment, every file's size and sha256
                   /stamps.json    modification times seen at the last full check
                   /used           modified when the artifact was used last, and locked (shared, by the kernel) while a run needs it
STORE/shards/<key>/                a tokenized input file: a cache of the prepare stage (xtuner_core/data/shards.py)
STORE/.work/<stage>-<key>/         an attempt that is running or was interrupted; attempt.json says what it was made from
STORE/.damaged/<stage>-<key>/      a published artifact that failed its check, until it is rebuilt
STORE/.removed/<stage>-<key>.json  the manifest of one that was cleaned up (pipelines/cleanup.py)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipelines.peak_memory import peak_memory
from pipelines.recipe import PROJECT, Recipe
from pipelines.stage import Log, Metrics, Progress, Stage, Work, untold
from xtuner_core.digest import key_of, library_version, sha256
from xtuner_core.durable import json_bytes, publish, remove, write_json
from xtuner_core.errors import DataError

SCHEMA = 1
USED = "used"
ATTEMPT = "attempt.json"
RECENT = 24
"""Artifacts of a stage that are looked at to learn from, or to tell what changed."""
_ENVIRONMENT = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "prefect")


class Damaged(Exception):
    """A published artifact is not what its manifest says; the message names the file and what is wrong."""


class Hold:
    """The artifact is in use, and so not cleaned up, for as long as this object lives; the kernel ends it with the process.

    `use`: this counts as its last use.
    """

    _mark = -1

    def __init__(self, artifact: Path, use: bool = True) -> None:
        self._mark = os.open(artifact / USED, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._mark, fcntl.LOCK_SH)
        if use:
            os.utime(self._mark)

    def __del__(self) -> None:
        if self._mark >= 0:
            os.close(self._mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy in another process holds nothing


@dataclass(frozen=True)
class Artifact:
    """A published artifact."""

    path: Path
    hold: Hold | None = field(default=None, compare=False, repr=False)

    @property
    def payload(self) -> Path:
        return self.path / "payload"

    @property
    def record(self) -> Path:
        return self.path / "record"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    @property
    def metrics(self) -> Metrics:
        return self.manifest["metrics"]

    @property
    def digest(self) -> str:
        return self.manifest["payload_digest"]

    @property
    def reference(self) -> dict[str, str]:
        """How other manifests name this artifact."""
        return {"stage": self.manifest["stage"], "key": self.manifest["key"], "payload_digest": self.digest}


@dataclass(frozen=True, slots=True)
class Result:
    """What `Store.produce` did."""

    artifact: Artifact
    cached: bool
    seconds: float
    """Wall time now; the artifact's manifest has the time of the run that made it."""


class Store:
    """A directory of artifacts; `full`: what is found in it is hashed again, whatever its time stamps say."""

    def __init__(self, root: Path, full: bool = False) -> None:
        self.root = root.resolve()
        self.full = full
        self.cache = self.root / "shards"

    def ingredients(self, stage: Stage, recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Everything that decides the bytes of the stage's payload, and nothing else (no path, time or host)."""
        return {
            "stage": stage.name,
            "version": stage.version,
            "settings": stage.settings(recipe),
            "inputs": {name: artifact.digest for name, artifact in inputs.items()},
            "files": self.file_digests(stage.files(recipe)),
            "libraries": {name: library_version(name) for name in stage.libraries},
        }

    def find(self, stage: str, key: str, full: bool = False) -> Artifact | None:
        """The artifact if it is there and whole, None if it is absent.

        Raises:
            Damaged: it is there but a file is missing, has another size, or (checked when its time stamp moved, or `full`) other bytes.
        """
        artifact = Artifact(self.root / stage / key)
        if not artifact.path.is_dir():
            return None
        _check(artifact, full)
        return artifact

    def known(self, stage: str, key: str) -> Artifact:
        """The artifact, whether it is there or not; of one that was cleaned up the manifest can still be read."""
        kept = self.root / ".removed" / f"{stage}-{key}.json"
        folder = self.root / stage / key
        return _removed(kept) if kept.is_file() and not folder.is_dir() else Artifact(folder)

    def folders(self) -> list[Path]:
        """Every published artifact."""
        return sorted(path.parent for path in self.root.glob("[!.]*/*/manifest.json"))

    def recent(self, stage: str) -> list[Artifact]:
        """The last `RECENT` artifacts of the stage with a readable manifest, newest first; those that were cleaned up come last."""
        found = sorted((self.root / stage).glob("*/manifest.json"), key=_modified, reverse=True)[:RECENT]
        removed = sorted((self.root / ".removed").glob(f"{stage}-*.json"), key=_modified, reverse=True)[: RECENT - len(found)]
        made = [Artifact(file.parent) for file in found] + [_removed(file) for file in removed]
        return [artifact for artifact in made if _is_readable(artifact)]

    def newest(self, stage: str, inputs: Mapping[str, str] | None = None) -> Artifact | None:
        """The artifact of this stage that was made last, if possible of these inputs (name → digest), to tell what changed since."""
        recent = self.recent(stage)
        of_inputs = (one for one in recent if inputs is not None and one.manifest["ingredients"]["inputs"] == inputs)
        return next(of_inputs, recent[0] if recent else None)

    def produce(
        self,
        stage: Stage,
        recipe: Recipe,
        inputs: Mapping[str, Artifact],
        log: Log,
        progress: Progress = untold,
        foretell: Callable[[], Mapping[str, Any]] = dict,
        making: Callable[[Stage], AbstractContextManager[None]] = nullcontext,
    ) -> Result:
        """Lock, look up, and if need be run the stage and publish its artifact; it is in use as long as the result lives.

        `foretell` says before the stage runs what it will take; the manifest keeps it. It runs inside of `making(stage)`.
        Two callers with one key: the second waits and then finds the first one's artifact. The lock is the kernel's (flock),
        so it ends with its holder, however that dies.
        """
        started = time.monotonic()
        ingredients = self.ingredients(stage, recipe, inputs)
        key = key_of(ingredients)
        with self.locked(f"{stage.name}-{key}", log):
            try:
                if found := self.find(stage.name, key, self.full):
                    return Result(replace(found, hold=Hold(found.path)), True, time.monotonic() - started)
            except Damaged as damage:
                log(f"{stage.name}: artifact {key} is damaged ({damage}); it is set aside and rebuilt")
                self._set_aside(stage.name, key)
            with making(stage):
                artifact = self._run(stage, recipe, inputs, key, ingredients, log, progress, foretell())
            remove(self.root / ".damaged" / f"{stage.name}-{key}")
            return Result(artifact, False, time.monotonic() - started)

    def file_digest(self, path: Path) -> str:
        """sha256 of a file outside the store, remembered for as long as its size and time stamp stay."""
        return self.file_digests([path])[0]

    def file_digests(self, paths: Sequence[Path]) -> list[str]:
        """The same of many, written down once."""
        known = self._known_digests
        changed = False
        for path in paths:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            if known.get(str(path), [])[:2] != stamp:
                known[str(path)], changed = [*stamp, sha256(path)], True
        if changed:
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / ".digests.json", known)
        return [known[str(path)][2] for path in paths]

    @cached_property
    def _known_digests(self) -> dict[str, list[Any]]:
        try:
            return json.loads((self.root / ".digests.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @contextmanager
    def locked(self, name: str, log: Log) -> Iterator[None]:
        """Nobody else makes, looks up or cleans up the artifact `stage-key` meanwhile."""
        from filelock import FileLock, Timeout

        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{name}: another run is making this artifact; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _set_aside(self, stage: str, key: str) -> None:
        target = self.root / ".damaged" / f"{stage}-{key}"
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.root / stage / key, target)

    def _run(
        self,
        stage: Stage,
        recipe: Recipe,
        inputs: Mapping[str, Artifact],
        key: str,
        ingredients: dict[str, Any],
        log: Log,
        progress: Progress,
        forecast: Mapping[str, Any],
    ) -> Artifact:
        attempt = self.root / ".work" / f"{stage.name}-{key}"
        if not stage.resumable:
            remove(attempt)
        parts = {part: attempt / part for part in ("payload", "record", "scratch")}
        for folder in parts.values():
            folder.mkdir(parents=True, exist_ok=True)
        references = {name: item.reference for name, item in inputs.items()}
        write_json(attempt / ATTEMPT, {"stage": stage.name, "key": key, "recipe": recipe.name, "inputs": references})
        started = time.monotonic()
        work = Work({name: item.payload for name, item in inputs.items()}, **parts, cache=self.cache, log=log, progress=progress)
        with peak_memory() as peak:
            metrics = stage.run(recipe, work)
        self._require_unchanged(stage.files(recipe), ingredients["files"])
        remove(parts["scratch"])
        manifest = {
            "schema": SCHEMA,
            "stage": stage.name,
            "key": key,
            "recipe": recipe.name,
            "ingredients": ingredients,
            "inputs": references,
            "input_files": [{"path": str(path), "sha256": self.file_digest(path)} for path in stage.files(recipe)],
            "environment": environment(),
            "metrics": metrics,
            "seconds": round(time.monotonic() - started, 3),
            "peak_memory": peak(),
            "forecast": dict(forecast),
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **describe_files(attempt),
        }
        write_json(attempt / "manifest.json", sealed(manifest))
        write_json(attempt / "stamps.json", _stamps(attempt, manifest))
        remove(attempt / ATTEMPT)
        (attempt / USED).touch()
        hold = Hold(attempt)
        publish(attempt, self.root / stage.name / key)
        return Artifact(self.root / stage.name / key, hold)

    def _require_unchanged(self, files: list[Path], digests: list[str]) -> None:
        """The key was made from the files' old bytes: an artifact of their new ones must not get that name."""
        if self.file_digests(files) != digests:
            raise DataError(f"one of {', '.join(map(str, files[:5]))} changed while it was read. Run the same command again.")


def _modified(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # cleaned up meanwhile
        return 0


def _removed(file: Path) -> Artifact:
    """Known by its manifest only."""
    stage, _, key = file.stem.rpartition("-")
    artifact = Artifact(file.parents[1] / stage / key)
    with suppress(OSError, ValueError):
        artifact.__dict__["manifest"] = json.loads(file.read_text(encoding="utf-8"))
    return artifact


def _is_readable(artifact: Artifact) -> bool:
    try:
        return {"recipe", "created", "metrics", "seconds", "files"} <= artifact.manifest.keys() and "inputs" in artifact.manifest[
            "ingredients"
        ]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON knows it, with `seal`, the sha256 of all the rest, so that no field of it can be edited unseen."""
    rest = json_bytes({name: part for name, part in value.items() if name != "seal"})
    return {**json.loads(rest), "seal": hashlib.sha256(rest).hexdigest()}


def is_sealed(content: bytes) -> bool:
    """Whether the bytes of a JSON file are just those that were sealed."""
    value = json.loads(content)
    return json_bytes(sealed(value)) == content


def describe_files(root: Path) -> dict[str, Any]:
    """`files` (path, bytes, sha256; links are followed) and `payload_digest` of an attempt or artifact."""
    files = [
        {"path": str(path.relative_to(root)), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for part in ("payload", "record")
        for path in _walk(root / part)
    ]
    return {"files": files, "payload_digest": payload_digest(files)}


def payload_digest(files: list[dict[str, Any]]) -> str:
    """What later stages depend on: names and bytes of the payload's files."""
    lines = [f"{entry['path']}\0{entry['sha256']}\n" for entry in files if entry["path"].startswith("payload/")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _unlisted(artifact: Artifact, listed: Set[str]) -> list[str]:
    """Files in the payload that the manifest does not know: whoever loads the folder may read them."""
    return sorted({str(path.relative_to(artifact.path)) for path in _walk(artifact.payload)} - listed)


def _walk(root: Path) -> list[Path]:
    return sorted(Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)


def environment() -> dict[str, str | None]:
    """What an artifact was made with."""
    libraries = {name: library_version(name) for name in _ENVIRONMENT}
    return {"python": platform.python_version(), "machine": platform.machine(), **libraries, "code": code_digest()}


@cache
def code_digest() -> str:
    """Of all our code below the flows: whether two artifacts were made by the same."""
    files = sorted(file for floor in ("pipelines", "xtuner_core") for file in (PROJECT / floor).rglob("*.py"))
    return hashlib.sha256("".join(f"{file.relative_to(PROJECT)}\0{sha256(file)}\n" for file in files).encode()).hexdigest()


def _stamps(root: Path, manifest: dict[str, Any]) -> dict[str, int]:
    return {entry["path"]: (root / entry["path"]).stat().st_mtime_ns for entry in manifest["files"]}


def _check(artifact: Artifact, full: bool) -> None:
    try:
        manifest = artifact.manifest
        is_ours = manifest["schema"] == SCHEMA and key_of(manifest["ingredients"]) == manifest["key"] == artifact.path.name
        files = [(entry["path"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
        digest = payload_digest(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"manifest.json: not readable ({error!r})") from None
    if not is_ours:
        raise Damaged("manifest.json: of another artifact or schema")
    if digest != manifest.get("payload_digest"):
        raise Damaged("manifest.json: its digest is not that of its files")
    if full and "seal" not in manifest:
        raise Damaged(
            "manifest.json: without a seal; an earlier version made it, or it was edited. Remove the folder to have it made again"
        )
    if full and (more := _unlisted(artifact, {name for name, _, _ in files})):
        raise Damaged(f"{more[0]}: not one of its files; it was added")
    try:
        seen = json.loads((artifact.path / "stamps.json").read_text(encoding="utf-8"))
        seen = dict(seen)
    except (OSError, ValueError, TypeError):
        seen = {}
    if (full or not seen) and "seal" in manifest and not is_sealed((artifact.path / "manifest.json").read_bytes()):
        raise Damaged("manifest.json: not the bytes that were written; it was edited")
    moved = full
    for name, size, bytes_digest in files:
        path = artifact.path / name
        try:
            status = path.stat()
        except OSError:
            raise Damaged(f"{name}: missing") from None
        if status.st_size != size:
            raise Damaged(f"{name}: {status.st_size} bytes instead of {size}")
        if full or seen.get(name) != status.st_mtime_ns:
            moved = True
            if sha256(path) != bytes_digest:
                raise Damaged(f"{name}: its bytes changed")
    if moved and seen != (stamps := _stamps(artifact.path, manifest)):
        write_json(artifact.path / "stamps.json", stamps)
