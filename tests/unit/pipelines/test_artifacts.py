"""The artifact store: what decides a key, what counts as whole, and that an attempt is published once and whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Artifact, Damaged, Result, Store, key_of
from pipelines.inventory import check
from pipelines.recipe import load_recipe
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.durable import json_bytes
from xtuner_core.errors import DataError, from_os_error

RECIPE = load_recipe("qwen3_tiny_full_openai")


def write_payload(recipe: Any, work: Work) -> Metrics:
    (work.payload / "model").mkdir()
    (work.payload / "model" / "weights.bin").write_bytes(bytes(range(256)))
    (work.record / "log.txt").write_text("made")
    return {"loss": 0.5}


STAGE = Stage(name="make", version=1, run=write_payload, settings=lambda recipe: {"seed": recipe.seed})


def produce(store: Store, stage: Stage = STAGE, inputs: Mapping[str, Artifact] | None = None, log: Callable[[str], None] = print) -> Result:
    return store.produce(stage, RECIPE, inputs or {}, log)


def key(store: Store, stage: Stage, inputs: Mapping[str, Artifact] | None = None) -> str:
    return key_of(store.ingredients(stage, RECIPE, inputs or {}))


def published(store: Store) -> list[str]:
    return [str(folder.relative_to(store.root)) for folder in store.folders()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_made_once_then_cached(store: Store) -> None:
    first, second = produce(store), produce(store)
    assert (first.cached, second.cached) == (False, True)
    assert first.artifact == second.artifact
    assert first.artifact.path == store.root / "make" / key(store, STAGE)
    assert second.artifact.metrics == {"loss": 0.5}
    assert not list((store.root / ".work").iterdir())


def test_the_manifest_tells_how_it_was_made(store: Store, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    above = produce(store).artifact
    stage = replace(STAGE, name="next", files=lambda recipe: [data], libraries=("pydantic",))
    manifest = produce(store, stage, {"above": above}).artifact.manifest
    assert manifest["inputs"] == {"above": {"stage": "make", "key": above.path.name, "payload_digest": above.digest}}
    assert manifest["input_files"] == [{"path": str(data), "sha256": manifest["ingredients"]["files"][0]}]
    assert [(file["path"], file["bytes"]) for file in manifest["files"]] == [("payload/model/weights.bin", 256), ("record/log.txt", 4)]
    assert (manifest["stage"], manifest["recipe"], manifest["metrics"]) == ("next", RECIPE.name, {"loss": 0.5})
    assert manifest["environment"]["torch"]
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["environment"]["code"])
    assert manifest["created"].endswith("+00:00")


# The key ----------------------------------------------------------------------------------------------------------------------------


def test_settings_version_name_and_inputs_change_the_key(store: Store) -> None:
    above, other = produce(store).artifact, produce(store, replace(STAGE, run=_other_payload, version=9)).artifact
    variants = [
        (STAGE, {}),
        (replace(STAGE, name="other"), {}),
        (replace(STAGE, version=2), {}),
        (replace(STAGE, settings=lambda recipe: {"seed": 1}), {}),
        (STAGE, {"above": above}),
        (STAGE, {"above": other}),
        (STAGE, {"below": above}),
    ]
    assert len({key(store, stage, inputs) for stage, inputs in variants}) == len(variants)


def _other_payload(recipe: Any, work: Work) -> Metrics:
    (work.payload / "weights.bin").write_bytes(b"other")
    return {}


def test_bytes_of_a_file_change_the_key_but_neither_its_path_nor_its_time(store: Store, tmp_path: Path) -> None:
    def of(path: Path) -> str:
        return key(Store(store.root), replace(STAGE, files=lambda recipe: [path]))

    data, moved = tmp_path / "data.jsonl", tmp_path / "moved" / "renamed.jsonl"
    data.write_text("one")
    before = of(data)
    os.utime(data, ns=(1, 1))
    assert of(data) == before
    moved.parent.mkdir()
    shutil.copy(data, moved)
    assert of(moved) == before
    data.write_text("two")
    assert of(data) != before
    data.write_text("one")
    assert of(data) == before


def test_a_library_s_version_changes_the_key(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(version: str) -> str:
        info = tmp_path / version / "somelibrary.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: somelibrary\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(info.parent))
        return key(store, replace(STAGE, libraries=("somelibrary",)))

    absent = key(store, replace(STAGE, libraries=("somelibrary",)))
    assert len({absent, install("1.0"), install("1.1")}) == 3


def test_where_the_store_lies_does_not_change_keys_or_digests(store: Store, tmp_path: Path) -> None:
    here, there = produce(store), produce(Store(tmp_path / "other" / "place"))
    assert here.artifact.reference == there.artifact.reference
    shutil.copytree(store.root, tmp_path / "moved")
    assert produce(Store(tmp_path / "moved")).cached


def test_equal_bytes_above_leave_what_is_below_cached(store: Store) -> None:
    """Early cut-off: another record, another key, the same payload."""

    def run(recipe: Any, work: Work) -> Metrics:
        write_payload(recipe, work)
        (work.record / "log.txt").write_text("made in another way")
        return {"loss": 0.4}

    below = replace(STAGE, name="below")
    produce(store, below, {"above": produce(store).artifact})
    rebuilt = produce(store, replace(STAGE, version=2, run=run))
    assert not rebuilt.cached
    assert produce(store, below, {"above": rebuilt.artifact}).cached


def test_a_file_that_changes_while_it_is_read_is_not_published_under_its_old_key(store: Store, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("old")

    def run(recipe: Any, work: Work) -> Metrics:
        data.write_text("newer")
        return write_payload(recipe, work)

    with pytest.raises(DataError, match=r"data\.jsonl changed while it was read"):
        produce(store, replace(STAGE, run=run, files=lambda recipe: [data]))
    assert published(store) == []


# What is whole ----------------------------------------------------------------------------------------------------------------------


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "manifest.json"
        changed = change(json.loads(file.read_text()))
        file.write_text(json.dumps(changed))

    return damage


def _flip(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted file": lambda folder: (folder / "payload/model/weights.bin").unlink(),
    "deleted record": lambda folder: (folder / "record/log.txt").unlink(),
    "deleted folder": lambda folder: shutil.rmtree(folder / "payload"),
    "flipped bit": _flip("payload/model/weights.bin"),
    "truncated": lambda folder: os.truncate(folder / "payload/model/weights.bin", 255),
    "grown": lambda folder: os.truncate(folder / "payload/model/weights.bin", 257),
    "emptied": lambda folder: os.truncate(folder / "payload/model/weights.bin", 0),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest a folder": lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()),
    "manifest a list": _manifest(lambda manifest: []),
    "manifest null": _manifest(lambda manifest: None),
    "manifest without files": _manifest(lambda manifest: manifest | {"files": None}),
    "manifest's files without size": _manifest(lambda manifest: manifest | {"files": [{"path": "a", "sha256": "b"}]}),
    "manifest of another key": _manifest(lambda manifest: manifest | {"key": "0" * 16}),
    "manifest of another schema": _manifest(lambda manifest: manifest | {"schema": 99}),
    "manifest of other settings": _manifest(lambda manifest: manifest | {"ingredients": {**manifest["ingredients"], "settings": 1}}),
    "manifest lists a file less": _manifest(lambda manifest: manifest | {"files": manifest["files"][1:]}),
    "manifest with another digest": _manifest(lambda manifest: manifest | {"payload_digest": "0" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_set_aside_rebuilt_and_cleared_away(store: Store, damage: Callable[[Path], object]) -> None:
    first = produce(store).artifact
    name = f"make-{first.path.name}"
    damage(first.path)
    told, aside = [], []

    def run(recipe: Any, work: Work) -> Metrics:
        aside.extend(path.name for path in (store.root / ".damaged").iterdir())
        return write_payload(recipe, work)

    again = Store(store.root).produce(replace(STAGE, run=run), RECIPE, {}, told.append)
    assert not again.cached
    assert aside == [name], "the damaged one must stay until the rebuild is done"
    assert not list((store.root / ".damaged").iterdir())
    assert len(told) == 1
    assert "is damaged" in told[0]
    assert again.artifact.reference == Artifact(first.path).reference
    assert produce(store).cached


def test_a_failed_rebuild_leaves_the_damaged_one_aside(store: Store) -> None:
    first = produce(store).artifact
    (first.payload / "model" / "weights.bin").unlink()
    with pytest.raises(ZeroDivisionError):
        produce(store, replace(STAGE, run=lambda recipe, work: {"x": 1 / 0}))
    assert (store.root / ".damaged" / f"make-{first.path.name}" / "record" / "log.txt").is_file()
    assert not produce(store).cached
    assert not list((store.root / ".damaged").iterdir())


@pytest.mark.parametrize(
    "touch",
    [
        lambda folder: os.utime(folder / "payload/model/weights.bin", ns=(1, 1)),
        lambda folder: (folder / "payload/model/weights.bin").write_bytes(bytes(range(256))),
        lambda folder: (folder / "stamps.json").unlink(),
        lambda folder: (folder / "stamps.json").write_text("{"),
        lambda folder: (folder / "stamps.json").write_text("[1]"),
    ],
    ids=["touched", "written again", "no stamps", "half stamps", "wrong stamps"],
)
def test_equal_bytes_are_accepted_whatever_their_time(store: Store, touch: Callable[[Path], object]) -> None:
    touch(produce(store).artifact.path)
    assert produce(store).cached
    stamps = json.loads((store.root / "make" / key(store, STAGE) / "stamps.json").read_text())
    assert stamps["payload/model/weights.bin"] == (store.root / "make" / key(store, STAGE) / "payload/model/weights.bin").stat().st_mtime_ns


def test_a_flip_under_an_old_time_stamp_is_found_by_the_full_check(store: Store) -> None:
    artifact = produce(store).artifact
    file = artifact.payload / "model" / "weights.bin"
    stamp = file.stat().st_mtime_ns
    _flip("payload/model/weights.bin")(artifact.path)
    os.utime(file, ns=(stamp, stamp))
    with pytest.raises(Damaged, match=r"payload/model/weights\.bin: its bytes changed"):
        store.find("make", artifact.path.name, full=True)


def _edited(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"loss": 0.5', '"loss": 0.4'))


def _unsealed(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if '"seal"' not in line))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (_edited, "manifest.json: not the bytes that were written"),
        (_unsealed, "manifest.json: without a seal"),
        (lambda folder: (folder / "payload/model/code.py").write_text("hello"), "payload/model/code.py: not one of its files"),
    ],
    ids=["a figure in the manifest", "the manifest's seal", "a file more"],
)
def test_what_only_a_full_check_sees(store: Store, tamper: Callable[[Path], object], told: str) -> None:
    artifact = store.find("make", produce(store).artifact.path.name, full=True)
    assert artifact
    tamper(artifact.path)
    with pytest.raises(Damaged, match=told):
        store.find("make", artifact.path.name, full=True)


def test_what_a_link_points_to_counts(store: Store, tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")

    def run(recipe: Any, work: Work) -> Metrics:
        (work.payload / "weights.bin").symlink_to(weights)
        return {}

    stage = replace(STAGE, run=run)
    first = produce(store, stage).artifact.digest
    assert produce(store, stage).cached
    weights.write_bytes(b"two")
    second = produce(store, stage)
    assert not second.cached
    assert second.artifact.digest != first


def test_absent_is_not_damaged(store: Store) -> None:
    assert store.find("make", "0" * 16) is None
    assert store.folders() == []
    assert store.newest("make") is None


def test_newest_passes_over_what_is_broken(store: Store) -> None:
    first = produce(store).artifact
    second = produce(store, replace(STAGE, version=2)).artifact
    assert store.newest("make") == second
    (second.path / "manifest.json").write_text("{")
    assert Store(store.root).newest("make") == first


# Attempts ---------------------------------------------------------------------------------------------------------------------------


def _interrupted(recipe: Any, work: Work) -> Metrics:
    for folder in (work.payload, work.record, work.scratch):
        (folder / "half").write_text("done")
    raise KeyboardInterrupt


def test_an_interrupted_attempt_starts_clean(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        produce(store, replace(STAGE, run=_interrupted))
    assert published(store) == []
    artifact = produce(store).artifact
    assert sorted(path.name for path in artifact.path.rglob("*") if path.is_file()) == [
        "log.txt", "manifest.json", "stamps.json", "used", "weights.bin",
    ]  # fmt: skip


def test_a_resumable_stage_finds_its_scratch_which_is_not_published(store: Store) -> None:
    def resume(recipe: Any, work: Work) -> Metrics:
        (work.payload / "half").unlink()
        return {"found": (work.scratch / "half").read_text()} | write_payload(recipe, work)

    stage = replace(STAGE, resumable=True)
    with pytest.raises(KeyboardInterrupt):
        produce(store, replace(stage, run=_interrupted))
    artifact = produce(store, replace(stage, run=resume)).artifact
    assert artifact.metrics["found"] == "done"
    assert not (artifact.path / "scratch").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), RuntimeError("bug")])
def test_a_failing_stage_publishes_nothing_and_keeps_what_is_there(store: Store, failure: Exception) -> None:
    def run(recipe: Any, work: Work) -> Metrics:
        write_payload(recipe, work)
        raise failure

    whole = produce(store).artifact
    with pytest.raises(type(failure)):
        produce(store, replace(STAGE, name="next", run=run), {"above": whole})
    assert published(store) == [f"make/{whole.path.name}"]
    assert store.find("make", whole.path.name, full=True) == whole


def test_a_full_disk_is_told_as_such(store: Store) -> None:
    def run(recipe: Any, work: Work) -> Metrics:
        with open("/dev/full", "w") as disk:  # the kernel's own ENOSPC
            disk.write("x" * 100_000)
        return {}

    with pytest.raises(OSError, match="No space left") as caught:
        produce(store, replace(STAGE, run=run))
    told = from_os_error(caught.value)
    assert (told.exit_code, published(store)) == (74, [])
    assert "no space left on the disk" in str(told)


@pytest.mark.parametrize("blocked", ["", ".locks", ".work", "make"], ids=["store", "locks", "work", "stage"])
def test_a_file_where_a_folder_must_be_is_a_storage_error(store: Store, blocked: str) -> None:
    (store.root / blocked).parent.mkdir(parents=True, exist_ok=True)
    (store.root / blocked).write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory|File exists") as caught:
        produce(store)
    assert from_os_error(caught.value).exit_code == 74
    assert str(store.root) in str(from_os_error(caught.value))
    assert (store.root / blocked).read_text() == "in the way"


def test_metrics_that_are_no_json_are_refused_before_publishing(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        produce(store, replace(STAGE, run=lambda recipe, work: {"loss": float("nan")}))
    assert published(store) == []


def test_what_was_verified_as_edited_is_rebuilt_and_what_an_earlier_version_made_is_used(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    stage = Stage("base", 1, lambda recipe, work: {"loss": 2.0}, lambda recipe: "x")
    made = store.produce(stage, RECIPE, {}, print).artifact
    file = made.path / "manifest.json"
    file.write_text(file.read_text().replace("2.0", "1.0"))
    assert [damage for _, damage in check(store, [made.path])] == ["manifest.json: not the bytes that were written; it was edited"]
    assert not store.produce(stage, RECIPE, {}, print).cached
    file.write_bytes(json_bytes({name: value for name, value in json.loads(file.read_text()).items() if name != "seal"}))
    assert "without a seal" in str([damage for _, damage in check(store, [made.path])])
    assert store.produce(stage, RECIPE, {}, print).cached
