"""`xtuner cache`: what lies in the store, whether it is whole, and how it is cleaned up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pipelines.commands.recipe_options import DEFAULT_STORE, StoreDir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.artifacts import Store
    from pipelines.inventory import Item

app = App(name="cache", help="The artifact store: what is in it, whether it is whole, and cleaning it up.")
Key = Annotated[str, Parameter(help="An artifact: its key or the beginning of it, stage/key, or its folder.")]
Flag = Parameter(negative=())


@app.command
def ls(*, store: StoreDir = DEFAULT_STORE, json: Annotated[bool, Flag] = False) -> None:
    """List what is in the store: how large it is, when it was made and used last, and why it is kept; `-` may be cleaned up.

    Parameters
    ----------
    json
        As JSON, with every field.
    """
    import time

    from pipelines.artifacts import Store
    from pipelines.commands.columns import age, columns
    from pipelines.forecast import size
    from pipelines.inventory import inventory, kept, total

    home, now = Store(store), time.time()
    items = sorted(inventory(home), key=lambda item: item.used, reverse=True)
    why = kept(home, items, now).why
    if json:
        _print_json(items, why)
        return
    rows = [
        (item.kind, item.name, size(item.size), age(now - item.created), age(now - item.used), item.recipe, why.get(item.name, "-"))
        for item in items
    ]
    print(*columns(("what", "stage/key", "size", "age", "used", "recipe", "kept because"), rows), sep="\n")
    print(f"{len(items)} things, {size(total(items))} on disk")


def _print_json(items: Sequence[Item], why: dict[str, str]) -> None:
    from json import dumps

    shown = ("kind", "name", "recipe", "size", "created", "used", "inputs", "resumable")
    rows = [{name: getattr(item, name) for name in shown} | {"kept": why.get(item.name)} for item in items]
    print(dumps(rows, indent=2, ensure_ascii=False))


@app.command
def verify(key: Key | None = None, *, store: StoreDir = DEFAULT_STORE) -> None:
    """Hash every artifact again, or one; exit code 65 if one is damaged, and the next run that needs it rebuilds it."""
    from pipelines.artifacts import Store
    from pipelines.inventory import named

    home = Store(store)
    verify_all(home, [home.root / named(home, key)] if key else home.folders())


def verify_all(store: Store, folders: Sequence[Path]) -> None:
    """What `xtuner verify` does without a model.

    Raises:
        DataError: names what is damaged.
    """
    from pipelines.inventory import check
    from xtuner_core.errors import DataError

    results = list(check(store, folders))
    damaged = [f"{folder}: {damage}" for folder, damage in results if damage]
    print(f"{len(results) - len(damaged)} artifacts are whole")
    if damaged:
        raise DataError("\n".join(damaged) + "\nThe next run that needs them rebuilds them, but for what only lacks its seal.")


@app.command
def gc(
    *,
    budget: str | None = None,
    older_than: str | None = None,
    dry_run: Annotated[bool, Flag] = False,
    store: StoreDir = DEFAULT_STORE,
) -> None:
    """Clean up: leavings of interrupted runs, and what was used longest ago.

    Never removed: of each model the version in production, the one before it and the newest one, what is pinned, what a run uses, and all
    that these were made from.

    Parameters
    ----------
    budget
        Remove what was used longest ago until the store takes no more than this, such as 200GB.
    older_than
        Remove what was not used for so long, such as 30d.
    dry_run
        Only say what would go.
    """
    from pipelines.artifacts import Store
    from pipelines.cleanup import clean, parse_age, parse_size, told

    limit, age = parse_size(budget) if budget else None, parse_age(older_than) if older_than else None
    outcome = clean(Store(store), limit, age, print, dry_run)
    for one in outcome.removed if dry_run else ():
        print(f"would remove {one.kind} {one.name}: {one.why}")
    print(told(outcome, dry_run))


@app.command
def pin(key: Key, *, why: str = "", store: StoreDir = DEFAULT_STORE) -> None:
    """Keep an artifact, and all it was made from, until it is unpinned.

    Parameters
    ----------
    why
        Shown by `xtuner cache ls`.
    """
    from pipelines.artifacts import Store
    from pipelines.inventory import named
    from pipelines.inventory import pin as keep

    home = Store(store)
    name = named(home, key)
    keep(home, name, why)
    print(f"{name} is pinned")


@app.command
def unpin(key: Key, *, store: StoreDir = DEFAULT_STORE) -> None:
    """Let an artifact be cleaned up again."""
    from pipelines.artifacts import Store
    from pipelines.inventory import unpin as let_go

    print(f"{let_go(Store(store), key)} is not pinned any more")


@app.command
def why(key_a: Key, key_b: Key, *, store: StoreDir = DEFAULT_STORE) -> None:
    """Name everything that makes two artifacts of a stage differ, and whether their bytes do."""
    from pipelines.artifacts import Artifact, Store
    from pipelines.changes import changes, origin_of
    from pipelines.inventory import named

    home = Store(store)
    one, other = (Artifact(home.root / named(home, key)) for key in (key_a, key_b))
    for change in changes(origin_of(one.manifest), origin_of(other.manifest)):
        print(f"{change.kind:<8} {change.told()}")
    print("their payloads are the same to the byte" if one.digest == other.digest else "their payloads differ")


@app.command
def backup(folder: Path, *, home: Path | None = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Copy what is new in the store to FOLDER/store, which is a store itself, and the service's database to FOLDER/prefect.db.

    Parameters
    ----------
    home
        The service's home, if not the project's.
    """
    from pipelines.artifacts import Store
    from pipelines.backup import back_up
    from pipelines.recipe import PROJECT

    back_up(Store(store), home or PROJECT / ".service", folder, print)
