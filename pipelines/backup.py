"""A copy of a store, and of the service's database, that is whole although runs go on; the copy is a store itself.

The order makes it so: the registry and the pins first, then the artifacts, so that every artifact a copied version speaks of is copied too
(a registry that is copied last may speak of one that came too late). A further backup to the same place copies only what is new or was
made again, as a damaged one is; an artifact is held while it is copied, and so not cleaned up. Half-done attempts and tokenized files are
left out: the one is a run's own, the other is made again.

DIR/store/         a store: `xtuner verify --store DIR/store`; to restore, copy it where the store was
DIR/prefect.db     the server's database at one moment (SQLite's online backup); of PostgreSQL, pg_dump makes that
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from pipelines import model_registry, promotion
from pipelines.artifacts import Hold, Store
from pipelines.lineage import read_manifest
from xtuner_core.durable import publish, remove
from xtuner_core.errors import DataError

DATABASE = Path("prefect") / "prefect.db"
"""In the service's home."""


def back_up(store: Store, home: Path | None, target: Path, say: Callable[[str], None]) -> int:
    """Copy what is new in the store, and the database in the service's `home` if there is one; returns how many artifacts were copied.

    Raises:
        DataError: the store to copy is inside the place to copy to, or the other way round; or it is not there, or has no registry any
            more, and the copy of it would be lost.
    """
    if store.root.is_relative_to(target.resolve()) or target.resolve().is_relative_to(store.root):
        raise DataError(f"{target}: a backup lies outside of the store {store.root}.")
    copy = Store(target / "store")
    _require_there(store, copy)
    with promotion.at_rest(store):
        for part in ("models", "pins", ".removed"):
            _replace(store.root / part, copy.root / part)
    copied = sum(_copy(folder, copy.root / folder.relative_to(store.root)) for folder in store.folders())
    say(f"{copied} artifacts are new in {copy.root}, which has {len(copy.folders())}")
    if home and (home / DATABASE).is_file():
        _copy_database(home / DATABASE, target / DATABASE.name)
        say(f"the server's database is in {target / DATABASE.name}")
    return copied


def _require_there(store: Store, copy: Store) -> None:
    """What is not mounted, or was lost, must not take the place of the copy that was made for that day."""
    lost = [part for part in ("", "models") if not (store.root / part).is_dir() and model_registry.names(copy)]
    if lost or not store.root.is_dir():
        place = store.root / "".join(lost)
        raise DataError(f"{place}: no such folder, so the backup in {copy.root} is left as it is. Is the disk mounted, and --store right?")


def _replace(source: Path, target: Path) -> None:
    """Small, and changed in place: copied as a whole each time; the copy before stays, last under another name, until this one is there."""
    draft, before = (target.with_name(f".{target.name}.{what}") for what in ("draft", "before"))
    remove(draft)
    draft.mkdir(parents=True)
    if source.is_dir():
        shutil.copytree(source, draft, symlinks=True, dirs_exist_ok=True)
    _exchange(draft, target, before)


def _exchange(draft: Path, target: Path, before: Path) -> None:
    remove(before)
    if target.exists():
        target.rename(before)
    publish(draft, target)
    remove(before)


def _copy(source: Path, target: Path) -> bool:
    """Whole or absent; False if it is there already, or was removed from the store meanwhile."""
    draft, before = (target.with_name(f".{target.name}.{what}") for what in ("draft", "before"))
    remove(draft)
    try:
        hold = Hold(source, use=False)
        if target.exists() and not _was_made_again(source, target):
            return False
        shutil.copytree(source, draft, symlinks=True)
        del hold
    except FileNotFoundError:
        remove(draft)
        return False
    _exchange(draft, target, before)
    return True


def _was_made_again(source: Path, target: Path) -> bool:
    """By its manifest, which tells when it was made; one that is damaged itself takes no copy's place."""
    now = read_manifest(source / "manifest.json")
    return bool(now) and now != read_manifest(target / "manifest.json")


def _copy_database(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}.draft")
    remove(draft)
    with closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as live, closing(sqlite3.connect(draft)) as copy:
        live.backup(copy)
    draft.replace(target)
