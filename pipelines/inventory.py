"""What lies in a store: every artifact, attempt, damaged artifact and tokenized file with its size and last use, and why it is kept.

Kept are, of each model in the registry, the version in production, the one that was in production before it (for `xtuner rollback`) and
the newest one; what is pinned; what a run uses now (the kernel knows: it holds a lock); attempts that can be resumed; and everything these
were made from. What an artifact's links lead to is kept with it, or it would not be whole.

STORE/pins/<stage>-<key>.json      a pinned artifact: since when, and why
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Literal

from pipelines import model_registry, promotion
from pipelines.artifacts import ATTEMPT, USED, Damaged, Store
from xtuner_core.durable import remove, write_json
from xtuner_core.errors import RecipeError

DAY = 86400.0
RESUMABLE_DAYS = 30
"""An attempt with checkpoints waits so long to be resumed; another one, which would start afresh, is only kept for its log."""
FRESH_ATTEMPT_DAYS = 1
Kind = Literal["artifact", "attempt", "damaged", "shard"]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in the store that can be removed by itself."""

    kind: Kind
    path: Path
    name: str
    """`stage/key`; of a tokenized file `shards/key`."""
    recipe: str = ""
    created: float = 0.0
    used: float = 0.0
    """When it was used last, in seconds since 1970."""
    inputs: tuple[str, ...] = ()
    """Names of the artifacts it was made from."""
    links: tuple[str, ...] = ()
    """Names of the artifacts that links in it lead to."""
    files: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Its files (device, inode) → bytes on disk; tokenized files and prepared data share theirs."""
    resumable: bool = False
    """An attempt with checkpoints."""

    @property
    def size(self) -> int:
        """Bytes on disk, shared ones included."""
        return sum(self.files.values())


def inventory(store: Store) -> list[Item]:
    """Everything in the store, in no order."""
    return [*_artifacts(store), *_set_aside(store), *_attempts(store), *_shards(store)]


def total(items: Iterable[Item]) -> int:
    """Bytes on disk of all of them; what several share counts once."""
    return sum({inode: size for item in items for inode, size in item.files.items()}.values())


def _artifacts(store: Store) -> Iterator[Item]:
    for folder in sorted(path for path in store.root.glob("[!.]*/*") if path.parent != store.cache and is_key(path.name)):
        manifest = _json(folder / "manifest.json")
        files, newest = _files(folder)
        created = _seconds(manifest.get("created")) or newest
        yield Item(
            kind="artifact",
            path=folder,
            name=f"{folder.parent.name}/{folder.name}",
            recipe=str(manifest.get("recipe", "")),
            created=created,
            used=max(created, modified(folder / USED)),
            inputs=_inputs(manifest),
            links=tuple(sorted(set(_links(store, folder)))),
            files=files,
        )


def _attempts(store: Store) -> Iterator[Item]:
    for folder in _named_folders(store, ".work"):
        told = _json(folder / ATTEMPT)
        files, newest = _files(folder)
        yield Item(
            kind="attempt",
            path=folder,
            name=_name(folder.name),
            recipe=str(told.get("recipe", "")),
            created=newest,
            used=newest,
            inputs=_inputs(told),
            files=files,
            resumable=bool(glob("*/checkpoint.json", root_dir=folder / "scratch" / "checkpoints")),
        )


def _set_aside(store: Store) -> Iterator[Item]:
    for folder in _named_folders(store, ".damaged"):
        files, _ = _files(folder)
        used = modified(folder)
        yield Item("damaged", folder, _name(folder.name), str(_json(folder / "manifest.json").get("recipe", "")), used, used, files=files)


def _shards(store: Store) -> Iterator[Item]:
    for folder in sorted(path for path in store.cache.glob("[!.]*") if is_key(path.name)):
        files, _ = _files(folder)
        used = modified(folder)
        yield Item("shard", folder, f"shards/{folder.name}", "", used, used, files=files)


def is_key(name: str) -> bool:
    """What has another name is none of ours, and stays."""
    return re.fullmatch("[0-9a-f]{16}", name) is not None


def _named_folders(store: Store, place: str) -> list[Path]:
    return sorted(path for path in (store.root / place).glob("*-*") if is_key(path.name.rpartition("-")[2]))


def _name(folder: str) -> str:
    stage, _, key = folder.rpartition("-")
    return f"{stage}/{key}"


def _inputs(told: Mapping[str, Any]) -> tuple[str, ...]:
    inputs = told.get("inputs")
    return tuple(f"{one['stage']}/{one['key']}" for one in inputs.values()) if isinstance(inputs, dict) else ()


def _files(root: Path) -> tuple[dict[tuple[int, int], int], float]:
    """Inodes with their bytes on disk, links not followed; and the newest modification."""
    found, newest = {}, modified(root)
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):  # a run works here
                status = os.lstat(os.path.join(folder, name))
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
                newest = max(newest, status.st_mtime)
    return found, newest


def _links(store: Store, folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder / "payload"):
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink() and (target := path.resolve()).is_relative_to(store.root):
                stage, key, *_ = (*target.relative_to(store.root).parts, "", "")
                yield f"{stage}/{key}"


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def modified(path: Path) -> float:
    """In seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _seconds(created: Any) -> float:
    try:
        return datetime.fromisoformat(created).timestamp()
    except (TypeError, ValueError):
        return 0.0


# Why it is kept ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What must stay: name → why."""

    roots: tuple[tuple[str, str], ...]
    """What is kept for itself, the most telling reason first."""
    items: tuple[Item, ...]

    @cached_property
    def why(self) -> dict[str, str]:
        """The roots and all that they were made from and lead to."""
        known: dict[str, list[Item]] = {}
        for item in self.items:
            if item.kind in ("artifact", "attempt"):
                known.setdefault(item.name, []).append(item)
        reasons: dict[str, str] = {}
        for name, why in self.roots:
            _follow(name, why, known, reasons, ("inputs",))
        for name, why in list(reasons.items()):
            for item in known.get(name, []):
                for link in item.links:
                    _follow(link, why, known, reasons, ("links",))
        return reasons


def _follow(name: str, why: str, known: Mapping[str, Sequence[Item]], reasons: dict[str, str], ways: tuple[str, ...]) -> None:
    todo = [name]
    while todo:
        if (name := todo.pop()) not in reasons:
            reasons[name] = why
            todo += [further for item in known.get(name, ()) for way in ways for further in getattr(item, way)]


def kept(store: Store, items: Sequence[Item], now: float) -> Kept:
    """What must stay of these.

    Raises:
        DataError: the registry cannot be read, so that nobody can tell what is in production.
    """
    return Kept((*registered(store), *pinned(store), *_busy(store, items), *_resumable(items, now)), tuple(items))


def registered(store: Store) -> Iterator[tuple[str, str]]:
    """The artifacts of the versions that the registry needs; DataError if it cannot be read."""
    for name in model_registry.names(store):
        order = promotion.succession(model_registry.history(store, name))
        known = model_registry.versions(store, name)
        in_use = model_registry.production(store, name)
        reasons = {known[-1].number: "newest version"} if known else {}
        reasons |= dict.fromkeys(order[-2:-1], "in production before")
        reasons |= {in_use.number: "in production"} if in_use else {}
        for version in sorted((one for one in known if one.number in reasons), key=lambda one: reasons[one.number] != "in production"):
            for made in version.artifacts.values():
                yield f"{made['stage']}/{made['key']}", f"{version.title}, {reasons[version.number]}"


def pins(store: Store) -> dict[str, dict[str, str]]:
    """Pinned artifacts: name → `why` and `at`."""
    return {_name(file.stem): _json(file) for file in sorted((store.root / "pins").glob("*-*.json"))}


def pinned(store: Store) -> Iterator[tuple[str, str]]:
    """What is pinned, and why."""
    for name, told in pins(store).items():
        yield name, f"pinned{': ' if told.get('why') else ''}{told.get('why', '')}"


def _busy(store: Store, items: Sequence[Item]) -> Iterator[tuple[str, str]]:
    for item in items:
        if item.kind in ("artifact", "attempt") and is_busy(store, item):
            yield item.name, "in use"


def _resumable(items: Sequence[Item], now: float) -> Iterator[tuple[str, str]]:
    for item in items:
        if item.kind == "attempt" and now - item.used < DAY * (RESUMABLE_DAYS if item.resumable else FRESH_ATTEMPT_DAYS):
            yield item.name, "can be resumed" if item.resumable else "log of a recent attempt"


def lock_of(store: Store, item: Item) -> Path:
    """The file that whoever makes this locks."""
    if item.kind == "shard":
        return store.cache / ".locks" / item.path.name
    return store.root / ".locks" / f"{item.name.replace('/', '-')}.lock"


def is_busy(store: Store, item: Item) -> bool:
    """Whether a run makes, looks up or uses it at this moment."""
    return _is_locked(lock_of(store, item)) or (item.kind == "artifact" and _is_locked(item.path / USED))


def _is_locked(file: Path) -> bool:
    try:
        mark = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(mark)


# Pins and checks --------------------------------------------------------------------------------------------------------------------


def named(store: Store, text: str) -> str:
    """The artifact that a key, the beginning of one, `stage/key` or a path means.

    Raises:
        RecipeError: none or several do.
    """
    *above, key = Path(text).parts or ("",)
    found = [
        f"{path.parent.name}/{path.name}"
        for path in store.folders()
        if path.name.startswith(key) and above[-1:] in ([], [path.parent.name])
    ]
    if key and len(found) == 1:
        return found[0]
    what = f"several artifacts: {', '.join(found)}" if key and found else "no artifact"
    raise RecipeError(f"{text}: {what} in {store.root}; `xtuner cache ls` lists stages and keys.")


def pin(store: Store, name: str, why: str) -> None:
    """Keep an artifact, and all it was made from, until `unpin`."""
    with store.locked(name.replace("/", "-"), lambda line: None):
        (store.root / "pins").mkdir(exist_ok=True)
        write_json(_pin_file(store, name), {"why": why, "at": datetime.now(UTC).isoformat(timespec="seconds")})


def unpin(store: Store, text: str) -> str:
    """Take a pin away; returns the artifact's name.

    Raises:
        RecipeError: no such pin, or several.
    """
    found = [name for name in pins(store) if Path(name).name.startswith(Path(text).name or "/")]
    if len(found) != 1:
        raise RecipeError(f"{text}: {'several pins' if found else 'not pinned'}; pinned are: {', '.join(pins(store)) or 'none'}.")
    remove(_pin_file(store, found[0]))
    return found[0]


def _pin_file(store: Store, name: str) -> Path:
    return store.root / "pins" / f"{name.replace('/', '-')}.json"


def check(store: Store, folders: Iterable[Path]) -> Iterator[tuple[Path, str | None]]:
    """Hash artifacts again; each with what is wrong with it, or None. A damaged one loses its stamps, so that the next run that needs it
    sees the damage too, although sizes and times are as they were.
    """
    for folder in folders:
        try:
            store.find(folder.parent.name, folder.name, full=True)
            yield folder, None
        except Damaged as damage:
            remove(folder / "stamps.json")
            yield folder, str(damage)
