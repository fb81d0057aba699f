"""What changed between two artifacts of a stage, or since the last run of a recipe: which field, file, library, or input.

A file that was only moved is no change: its bytes decide, not its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import Artifact

SHOWN = 12
"""Digits of a digest that are shown."""


@dataclass(frozen=True, slots=True)
class Change:
    """One reason for another key."""

    kind: Literal["setting", "file", "library", "stage", "input"]
    what: str
    """The field, the file's path, the library, or the input's name."""
    before: str | None
    now: str | None
    """None: it is not there."""

    def told(self) -> str:
        """`data.pack_length: 1024 → 2048`, `train.jsonl: changed (00ab98afab15 → 5d41402abc4b)`."""
        if self.kind == "file" and self.before and self.now:
            return f"{self.what}: changed ({self.before} → {self.now})"
        if self.before is None:
            return f"{self.what}: added ({self.now})"
        return f"{self.what}: removed ({self.before})" if self.now is None else f"{self.what}: {self.before} → {self.now}"


@dataclass(frozen=True, slots=True)
class Origin:
    """What an artifact is, or would be, made from."""

    ingredients: Mapping[str, Any]
    files: Sequence[tuple[str, str]]
    """Path and sha256, in the order of the ingredients."""
    inputs: Mapping[str, str]
    """Name → `stage/key`, or another description of what it is."""


def origin_of(manifest: Mapping[str, Any]) -> Origin:
    """Of an artifact that was made."""
    return Origin(
        manifest["ingredients"],
        [(file["path"], file["sha256"]) for file in manifest.get("input_files", ())],
        {name: f"{one['stage']}/{one['key']}" for name, one in manifest.get("inputs", {}).items()},
    )


def origin(ingredients: Mapping[str, Any], files: Sequence[Path], inputs: Mapping[str, Artifact]) -> Origin:
    """Of an artifact that would be made."""
    named = {name: f"{artifact.path.parent.name}/{artifact.path.name}" for name, artifact in inputs.items()}
    return Origin(ingredients, list(zip(map(str, files), ingredients["files"], strict=True)), named)


def changes(before: Origin, now: Origin) -> list[Change]:
    """Every difference that decides the key: inputs, then files, settings, libraries and the stage itself."""
    return [
        *_inputs(before, now),
        *_files(before.files, now.files),
        *_settings(before.ingredients["settings"], now.ingredients["settings"], ""),
        *_values("library", before.ingredients["libraries"], now.ingredients["libraries"]),
        *_values("stage", _stage(before), _stage(now)),
    ]


def _stage(one: Origin) -> dict[str, Any]:
    return {"stage": one.ingredients["stage"], "version of the stage's code": one.ingredients["version"]}


def _inputs(before: Origin, now: Origin) -> Iterator[Change]:
    was, is_ = before.ingredients["inputs"], now.ingredients["inputs"]
    for name in sorted(was | is_):
        if was.get(name) != is_.get(name):
            yield Change("input", name, before.inputs.get(name, _short(was.get(name))), now.inputs.get(name, _short(is_.get(name))))


def _files(before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> Iterator[Change]:
    same = Counter(digest for _, digest in before) & Counter(digest for _, digest in now)
    gone, come = dict(_without(before, same)), dict(_without(now, same))
    for path in sorted(gone | come):
        yield Change("file", _near(path), _short(gone.get(path)), _short(come.get(path)))
    if not gone and not come and [digest for _, digest in before] != [digest for _, digest in now]:
        yield Change("file", "order of the files", _names(before), _names(now))


def _without(files: Sequence[tuple[str, str]], same: Counter[str]) -> Iterator[tuple[str, str]]:
    left = same.copy()
    for path, digest in files:
        if left[digest]:
            left[digest] -= 1
        else:
            yield path, digest


def _names(files: Sequence[tuple[str, str]]) -> str:
    return ", ".join(Path(path).name for path, _ in files)


def _near(path: str) -> str:
    """Relative, if it is below the working directory."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _settings(before: Any, now: Any, field: str) -> Iterator[Change]:
    """Field by field; of lists what was added and removed, of named things by their names."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before | now):
            yield from _settings(before.get(name), now.get(name), f"{field}.{name}" if field else str(name))
    elif isinstance(before, list) and isinstance(now, list) and (names := _by_name(before, now)):
        yield from _settings(*names, field)
    elif isinstance(before, list) and isinstance(now, list) and sorted(map(repr, before)) != sorted(map(repr, now)):
        was, is_ = Counter(map(_shown, before)), Counter(map(_shown, now))
        yield from (Change("setting", field, value, None) for value in (was - is_).elements())
        yield from (Change("setting", field, None, value) for value in (is_ - was).elements())
    else:
        yield Change("setting", field, _shown(before), _shown(now))


def _by_name(before: list[Any], now: list[Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if not all(isinstance(one, dict) and "name" in one for one in (*before, *now)):
        return None
    was, is_ = ({one["name"]: one for one in many} for many in (before, now))
    return (was, is_) if was != is_ else None


def _values(kind: Literal["library", "stage"], before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield Change(kind, name, _shown(before.get(name)), _shown(now.get(name)))


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:SHOWN]
    return text if len(text) <= 100 else f"{text[:100]}…"


def _short(digest: str | None) -> str | None:
    return digest[:SHOWN] if digest else None
