"""A backup is a store: whole although a run goes on, and where it is restored the next run finds everything cached."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import model_registry, promotion
from pipelines.artifacts import Store
from pipelines.backup import DATABASE, back_up
from pipelines.inventory import check, pins
from pipelines.pipeline import plan
from pipelines.recipe import PROJECT, load_recipe
from pipelines.runner import run_until
from tests.unit.pipelines.registry import in_use, registered, result
from xtuner_core.errors import DataError

TINY = "qwen3_tiny_full_openai"
DATA = "data.train=data/openai_chats/heldout.jsonl"
RUNNING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_cleanup import register, run
from pipelines.artifacts import Store

store = Store(Path(sys.argv[1]))
for seed in range(6):
    register(store, run(store, seed))
    print(seed, flush=True)
"""


def whole(store: Store) -> bool:
    return bool(store.folders()) and not [damage for _, damage in check(store, store.folders()) if damage]


def test_what_was_restored_elsewhere_is_whole_and_cached(prepared_store: Store, tmp_path: Path) -> None:
    used = [(folder / "used").stat().st_mtime_ns for folder in prepared_store.folders()]
    assert back_up(prepared_store, None, tmp_path / "copy", print) == 2
    assert [(folder / "used").stat().st_mtime_ns for folder in prepared_store.folders()] == used, "a backup is no use"
    assert back_up(prepared_store, None, tmp_path / "copy", print) == 0
    shutil.rmtree(prepared_store.root)
    restored = Store(shutil.copytree(tmp_path / "copy" / "store", tmp_path / "restored", symlinks=True))
    stamps = {folder: (folder / "stamps.json").stat().st_mtime_ns for folder in restored.folders()}
    recipe = load_recipe(TINY, [DATA])
    assert [step.state for step in plan(recipe, restored)][:2] == ["cached", "cached"]
    assert run_until("prepare", recipe, restored, print).cached
    assert {folder: (folder / "stamps.json").stat().st_mtime_ns for folder in restored.folders()} == stamps, (
        "times were kept: no file was hashed"
    )
    assert whole(restored)


def test_while_runs_go_on_every_version_in_the_copy_has_its_artifacts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    command = [sys.executable, "-c", RUNNING, str(store.root), str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        running.stdout.readline()
        number = 0
        while running.poll() is None and number < 5:
            copy = Store(tmp_path / f"copy{number}" / "store")
            back_up(store, None, copy.root.parent, print)
            assert whole(copy)
            for version in model_registry.versions(copy, TINY):
                promotion.require_whole(copy, version)
                assert all((copy.root / made["stage"] / made["key"]).is_dir() for made in version.artifacts.values())
            number += 1
        running.communicate()
    assert running.returncode == 0
    assert number
    back_up(store, None, tmp_path / "copy0", print)
    assert len(model_registry.versions(Store(tmp_path / "copy0" / "store"), TINY)) == 6


def test_the_database_is_copied_while_it_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home 100%3F#?"
    (tmp_path / "store").mkdir()
    (home / DATABASE).parent.mkdir(parents=True)
    with sqlite3.connect(home / DATABASE) as live:
        live.execute("PRAGMA journal_mode=WAL")
        live.execute("CREATE TABLE runs (name TEXT)")
        live.execute("INSERT INTO runs VALUES ('one')")
        live.commit()
        live.execute("INSERT INTO runs VALUES ('not committed')")
        back_up(Store(tmp_path / "store"), home, tmp_path / "copy", print)
    copy = sqlite3.connect(tmp_path / "copy" / "prefect.db")
    assert copy.execute("SELECT name FROM runs").fetchall() == [("one",)]
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_pin_and_what_was_half_copied(prepared_store: Store, tmp_path: Path) -> None:
    base = next((prepared_store.root / "base").iterdir())
    half = tmp_path / "copy" / "store" / "base" / f".{base.name}.draft"
    half.mkdir(parents=True)
    (prepared_store.root / "pins").mkdir()
    (prepared_store.root / "pins" / f"base-{base.name}.json").write_text("{}")
    back_up(prepared_store, None, tmp_path / "copy", print)
    assert not half.exists()
    assert set(pins(Store(tmp_path / "copy" / "store"))) == {f"base/{base.name}"}
    assert not os.path.exists(tmp_path / "copy" / "store" / "shards")
    with pytest.raises(DataError, match="outside of the store"):
        back_up(prepared_store, None, prepared_store.root / "backup", print)


def test_a_store_that_is_not_there_takes_nothing_from_its_backup(tmp_path: Path) -> None:
    store, copy = Store(tmp_path / "store"), Store(tmp_path / "copy" / "store")
    with pytest.raises(DataError, match="store: no such folder"):
        back_up(store, None, copy.root.parent, print)
    promotion.promote(store, registered(store, "one"), "Ada", "better")
    back_up(store, None, copy.root.parent, print)
    store.root.rename(tmp_path / "lost")
    with pytest.raises(DataError, match="Is the disk mounted"):
        back_up(store, None, copy.root.parent, print)
    store.root.mkdir()  # where it would be mounted
    with pytest.raises(DataError, match="store/models: no such folder"):
        back_up(store, None, copy.root.parent, print)
    assert in_use(copy) == "convert of one"


def test_what_was_damaged_when_it_was_copied_is_copied_again_when_it_was_made_again(tmp_path: Path) -> None:
    store, copy = Store(tmp_path / "store"), Store(tmp_path / "copy" / "store")
    made = result(store, "one")["convert"]
    (made.payload / "model" / "weights").write_text("spoilt")
    assert back_up(store, None, copy.root.parent, print) == 5
    assert not whole(copy)
    result(store, "one")
    assert back_up(store, None, copy.root.parent, print) == 1
    assert whole(copy) and back_up(store, None, copy.root.parent, print) == 0
    manifest = store.folders()[0] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert back_up(store, None, copy.root.parent, print) == 0
    assert whole(copy) and not list(copy.root.rglob(".*.before"))
