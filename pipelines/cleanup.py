"""Cleaning up a store: what is not kept (pipelines/inventory.py) goes, what was used longest ago first, until the store fits its budget.

Safe beside runs that start at the same moment: a thing is removed under its maker's lock, after another look at why it might be kept, and
leaves its place by one rename into STORE/.trash; a run that needs it then makes it again. Killing a clean-up leaves a good store, and the
next one empties the trash. Of an artifact the manifest stays, in STORE/.removed, for lineage, forecasts and `xtuner plan --why`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from pipelines.artifacts import ATTEMPT, USED, Store, is_sealed, sealed
from pipelines.forecast import size
from pipelines.inventory import DAY, Item, Kept, inventory, is_key, kept, lock_of, modified, pinned, registered, total
from xtuner_core.data.shards import sweep
from xtuner_core.durable import remove, sync_directory, write_json
from xtuner_core.errors import Interrupted, RecipeError

DAMAGED_DAYS = 7
"""Damaged artifacts wait so long for whoever wants to look at them."""
LEFT_FILES_DAYS = 1
TRASH, REMOVED = ".trash", ".removed"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SPANS = {"h": 3600.0, "d": DAY, "w": 7 * DAY}


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that goes, or went."""

    kind: str
    name: str
    recipe: str
    size: int
    """Bytes on disk, those included that something else has a name for too."""
    used: float
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a clean-up did, or with `dry_run` would do."""

    removed: tuple[Removal, ...]
    before: int
    """Bytes on disk."""
    after: int
    budget: int | None
    kept: Mapping[str, str]
    """Name → why it stays."""


def parse_size(text: str) -> int:
    """`200GB`, `1.5TB`, `512 MiB` in bytes.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise RecipeError(f"{text!r} is no size; write 200GB, 1.5TB or 512MiB.")
    number, unit, binary = found.groups()
    unit = "k" if unit in "kK" and unit else unit.upper()
    return round(float(number) * (2 ** (10 * " kMGT".index(unit)) if binary and unit else _UNITS[unit]))


def parse_age(text: str) -> float:
    """`12h`, `30d`, `2w` in seconds.

    Raises:
        RecipeError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([hdw])\s*", text)
    if not found:
        raise RecipeError(f"{text!r} is no age; write 12h, 30d or 2w.")
    return float(found[1]) * _SPANS[found[2]]


def told(outcome: Outcome, dry_run: bool = False) -> str:
    """What a clean-up did, in a line."""
    did = "would be removed" if dry_run else "removed"
    line = f"{len(outcome.removed)} things {did}, {size(outcome.before)} → {size(outcome.after)}"
    if outcome.budget is None or outcome.after <= outcome.budget:
        return line
    return f"{line}: over the budget of {size(outcome.budget)}, and all that is left is needed (xtuner cache ls says by whom)"


def clean(
    store: Store,
    budget: int | None,
    older_than: float | None,
    say: Callable[[str], None],
    dry_run: bool = False,
    now: float | None = None,
) -> Outcome:
    """Remove leavings, what is older than `older_than` seconds, and what was used longest ago until the store fits `budget` bytes.

    Raises:
        DataError: the registry cannot be read; nothing was removed.
        Interrupted: another clean-up is at it.
    """
    now = time.time() if now is None else now
    if not store.root.is_dir():
        return Outcome((), 0, 0, budget, {})
    with _alone(store):
        items = inventory(store)
        stays = kept(store, items, now)
        chosen = choose(items, stays.why, budget, older_than, now)
        if not dry_run:
            remove(store.root / TRASH)
            chosen = list(_remove(store, stays, chosen, now, say))
            _tidy(store, now)
    gone = {item.path for item, _ in chosen}
    after = total(item for item in items if item.path not in gone)
    removed = tuple(Removal(item.kind, item.name, item.recipe, item.size, item.used, why) for item, why in chosen)
    return Outcome(removed, total(items), after, budget, stays.why)


# What goes --------------------------------------------------------------------------------------------------------------------------

Choice = tuple[Item, str]
"""What goes, and why."""


def choose(items: Sequence[Item], stays: Mapping[str, str], budget: int | None, older_than: float | None, now: float) -> list[Choice]:
    """What goes, in this order: what nobody needs any more or is too old, then what was used longest ago; of what was used together
    results come before what they were made from.
    """
    used, depth = _used_with_dependents(items), _depths(items)
    free = [item for item in items if item.kind in ("damaged", "shard") or item.name not in stays]
    free.sort(key=lambda item: (used[item.path], -depth[item.path], item.name))
    chosen = [(item, why) for item in free if (why := _expired(item, now - used[item.path], older_than))]
    if budget is not None:
        gone = {item.path for item, _ in chosen}
        rest = [item for item in free if item.path not in gone]
        chosen += [(item, f"over the budget of {size(budget)}") for item in _over(budget, items, gone, rest)]
    return chosen


def _expired(item: Item, age: float, older_than: float | None) -> str:
    """Why it goes whatever the budget is; empty if it does not."""
    if item.kind == "attempt":
        return f"an attempt that nobody has resumed for {_days(age)}"
    if item.kind == "damaged" and age >= DAMAGED_DAYS * DAY:
        return f"damaged, and not made again for {_days(age)}"
    return f"not used for {_days(age)}" if older_than is not None and age >= older_than else ""


def _days(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days" if seconds >= 2 * DAY else f"{seconds / 3600:.0f} hours"


def _over(budget: int, items: Sequence[Item], gone: Set[Path], rest: Sequence[Item]) -> Iterator[Item]:
    """Of `rest`, in its order, as much as must go; bytes are free when the last name that they have is gone."""
    here = [item for item in items if item.path not in gone]
    names = Counter(inode for item in here for inode in item.files)
    left, waiting = total(here), list(rest)
    while left > budget and (item := _next(waiting, names)):
        waiting.remove(item)
        left -= sum(room for inode, room in item.files.items() if names[inode] == 1)
        names.subtract(item.files.keys())
        yield item


def _next(waiting: Sequence[Item], names: Mapping[tuple[int, int], int]) -> Item | None:
    """The first that frees bytes; if none does, the first that shares bytes only with others that may go."""
    ours = Counter(inode for item in waiting for inode in item.files)
    frees = (item for item in waiting if any(names[inode] == 1 for inode in item.files))
    helps = (item for item in waiting if any(names[inode] == ours[inode] for inode in item.files))
    return next(frees, None) or next(helps, None)


def _used_with_dependents(items: Sequence[Item]) -> dict[Path, float]:
    """Last use of each, or of the last used thing that was made from it: who finds a result cached looks at all above it."""
    used = {item.path: item.used for item in items}
    artifacts = {item.name: item for item in items if item.kind == "artifact"}
    for item in sorted(items, key=lambda item: item.used, reverse=True):
        todo = [item]
        while todo:
            for above in (artifacts[name] for name in todo.pop().inputs if name in artifacts):
                if used[above.path] < used[item.path]:
                    used[above.path] = used[item.path]
                    todo.append(above)
    return used


def _depths(items: Sequence[Item]) -> dict[Path, int]:
    """How many artifacts lie above each, on the longest way."""
    artifacts = {item.name: item for item in items if item.kind == "artifact"}
    known: dict[str, int] = {}

    def depth(item: Item, below: frozenset[str] = frozenset()) -> int:
        if item.name not in known:
            above = [artifacts[name] for name in item.inputs if name in artifacts and name not in below]
            known[item.name] = max((1 + depth(one, below | {item.name}) for one in above), default=0)
        return known[item.name]

    return {item.path: depth(item) if item.kind == "artifact" else 0 for item in items}


# Removing ---------------------------------------------------------------------------------------------------------------------------


def _remove(store: Store, stays: Kept, chosen: Sequence[Choice], now: float, say: Callable[[str], None]) -> Iterator[Choice]:
    """Those that could be removed."""
    for item, why in chosen:
        with _exclusively(store, item) as ours:
            if not ours or not item.path.is_dir() or _used_since(item) or (item.kind == "artifact" and _is_kept_now(store, stays, item)):
                continue
            trash = _to_trash(store, item, why)
        remove(trash)
        say(f"removed {item.kind} {item.name} ({size(item.size)}): {why}")
        yield item, why


def _is_kept_now(store: Store, stays: Kept, item: Item) -> bool:
    """A pin or a version may have come since the clean-up began to look."""
    roots = (*registered(store), *pinned(store))
    return item.name in Kept(roots, stays.items).why


def _used_since(item: Item) -> bool:
    return modified(item.path / (USED if item.kind == "artifact" else ATTEMPT)) > item.used


def _to_trash(store: Store, item: Item, why: str) -> Path:
    if item.kind == "artifact":
        with suppress(OSError, ValueError, TypeError, AttributeError):  # of a damaged one there is nothing to keep
            content = (item.path / "manifest.json").read_bytes()
            manifest = {**json.loads(content), "removed": why}
            (store.root / REMOVED).mkdir(exist_ok=True)
            write_json(store.root / REMOVED / f"{item.name.replace('/', '-')}.json", sealed(manifest) if is_sealed(content) else manifest)
    trash = store.root / TRASH / f"{item.path.name}-{uuid4().hex[:8]}"
    trash.parent.mkdir(exist_ok=True)
    os.rename(item.path, trash)
    sync_directory(item.path.parent)
    return trash


@contextmanager
def _exclusively(store: Store, item: Item) -> Iterator[bool]:
    """Nobody makes, looks up or uses the thing, nor begins to; False if somebody does."""
    with ExitStack() as stack:
        try:
            lock_of(store, item).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock_of(store, item)).acquire(timeout=0))
            in_use = store.cache if item.kind == "shard" else item.path / USED if item.kind == "artifact" else None
            if in_use is not None and in_use.exists():
                handle = os.open(in_use, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (Timeout, BlockingIOError):
            yield False
        else:
            yield True


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    locks = store.root / ".locks"
    locks.mkdir(exist_ok=True)
    try:
        with FileLock(locks / "cleanup.lock").acquire(timeout=0):
            yield
    except Timeout:
        raise Interrupted(f"{store.root}: another clean-up is at work there; try again when it is done.") from None


# What lies about --------------------------------------------------------------------------------------------------------------------


def _tidy(store: Store, now: float) -> None:
    """Half-written files of dead processes, locks of what is gone, and what was known about files that are gone."""
    sweep(store.cache)
    # (Path.glob fails where a folder goes meanwhile.)
    for name in (*glob(".*.tmp", root_dir=store.root), *glob("*/*/.*.tmp", root_dir=store.root)):
        file = store.root / name
        if now - modified(file) > LEFT_FILES_DAYS * DAY:
            remove(file)
    for lock in (store.root / ".locks").glob("*-*.lock"):
        stage, _, key = lock.stem.rpartition("-")
        if is_key(key):
            _drop_lock(lock, [store.root / stage / key, store.root / ".work" / lock.stem])
    for lock in (store.cache / ".locks").glob("*"):
        _drop_lock(lock, [store.cache / lock.name])
    _forget(store)


def _drop_lock(lock: Path, of: Sequence[Path]) -> None:
    """Who waits for a lock whose file is gone takes the new one (filelock looks for that)."""
    with suppress(Timeout), FileLock(lock).acquire(timeout=0):
        if not any(path.exists() for path in of):
            lock.unlink()


def _forget(store: Store) -> None:
    """Digests of files that are not there any more. Runs write the same file: at worst one is computed again."""
    file = store.root / ".digests.json"
    with suppress(OSError, ValueError, AttributeError):
        known = json.loads(file.read_text(encoding="utf-8"))
        there = {path: told for path, told in known.items() if Path(path).exists()}
        if len(there) < len(known):
            write_json(file, there)
