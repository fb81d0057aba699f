"""Cleaning up: nothing that is kept is removed, and the budget is met if it can be, whatever was done before and whoever works beside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import model_registry, promotion
from pipelines.artifacts import Artifact, Store
from pipelines.cleanup import choose, clean, parse_age, parse_size
from pipelines.inventory import DAY, RESUMABLE_DAYS, Item, Kept, check, inventory, kept, named, pin, total, unpin
from pipelines.recipe import PROJECT, load_recipe
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.errors import DataError, Interrupted, RecipeError

RECIPE = load_recipe("qwen3_tiny_full_openai")
CHAIN = {
    "base": (),
    "prepare": ("base",),
    "train": ("base", "prepare"),
    "convert": ("train",),
    "verdict": ("convert",),
    "chat": ("convert",),
}
"""A run in small: stage → what it is made from."""


def _write(recipe: Any, work: Work) -> Metrics:
    (work.payload / "model").mkdir()
    seen = b"".join((folder / "model" / "weights.bin").read_bytes()[:16] for folder in work.inputs.values())
    (work.payload / "model" / "weights.bin").write_bytes(seen + bytes([recipe.seed]) * 20_000)
    return {"sources": []}


def stage(name: str) -> Stage:
    return Stage(name, 1, _write, lambda recipe: {"seed": recipe.seed})


def run(store: Store, seed: int) -> dict[str, Artifact]:
    """A whole run; its artifacts are in use as long as they are referred to."""
    made: dict[str, Artifact] = {}
    recipe = RECIPE.model_copy(update={"seed": seed})
    for name, inputs in CHAIN.items():
        made[name] = store.produce(stage(name), recipe, {one: made[one] for one in inputs}, lambda line: None).artifact
    return made


def names(made: Mapping[str, Artifact]) -> set[str]:
    return {f"{artifact.path.parent.name}/{artifact.path.name}" for artifact in made.values()}


def there(store: Store) -> set[str]:
    return {f"{folder.parent.name}/{folder.name}" for folder in store.folders()}


def register(store: Store, made: Mapping[str, Artifact], gate: bool = True) -> model_registry.Version:
    return promotion.register(store, RECIPE, made, gate, "", {})


def tidy(store: Store, budget: int | None = 0, older_than: float | None = None, **more: Any) -> set[str]:
    """What a clean-up removes."""
    return {one.name for one in clean(store, budget, older_than, lambda line: None, **more).removed}


def age(store: Store, made: set[str], days: float) -> None:
    for name in made:
        os.utime(store.root / name / "used", times=(time.time() - days * DAY,) * 2)


def all_are_whole(store: Store) -> bool:
    return not [damage for _, damage in check(store, store.folders()) if damage]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# What is kept -----------------------------------------------------------------------------------------------------------------------


def test_a_budget_of_nothing_removes_everything_that_nobody_needs(store: Store) -> None:
    made = names(run(store, 1))
    outcome = clean(store, 0, None, lambda line: None)
    assert ({one.name for one in outcome.removed}, there(store), outcome.after) == (made, set(), 0)
    assert not list((store.root / ".trash").iterdir())
    assert [artifact.manifest["removed"] for artifact in store.recent("train")] == ["over the budget of 0 B"], "its manifest stays"
    assert names(run(store, 1)) == made


def test_what_a_run_uses_stays_until_it_ends(store: Store) -> None:
    made = run(store, 1)
    assert tidy(store) == set()
    held = made["convert"]
    mine = names(made)
    del made
    assert tidy(store) == {name for name in mine if name.split("/")[0] in ("verdict", "chat")}, "the model, and what it was made from"
    del held
    mine = there(store)
    assert tidy(store) == mine


def test_production_the_one_before_and_the_newest_stay_with_all_they_were_made_from(store: Store) -> None:
    runs = [names(run(store, seed)) for seed in range(5)]
    versions = [register(store, run(store, seed)) for seed in range(5)]
    for number in (0, 1, 2):
        promotion.promote(store, versions[number], "me", "better")
    assert tidy(store) == runs[0] | runs[3]
    assert there(store) == runs[1] | runs[2] | runs[4]
    why = kept(store, inventory(store), time.time()).why
    assert {why[name] for name in runs[2]} == {f"{RECIPE.name}@3, in production"}
    assert {why[name] for name in runs[1]} == {f"{RECIPE.name}@2, in production before"}
    assert {why[name] for name in runs[4]} == {f"{RECIPE.name}@5, newest version"}
    assert promotion.rollback(store, RECIPE.name, "me", "worse") == versions[1]
    assert all_are_whole(store)


def test_a_registry_that_cannot_be_read_stops_the_clean_up(store: Store) -> None:
    made = names(run(store, 1))
    version = register(store, run(store, 1))
    (model_registry.folder(store, version) / "version.json").write_text("{")
    with pytest.raises(DataError, match=r"version\.json"):
        tidy(store)
    assert there(store) == made


def test_a_pin_keeps_an_artifact_and_what_it_was_made_from(store: Store) -> None:
    made = run(store, 1)
    key = made["train"].path.name
    assert named(store, key[:8]) == named(store, f"train/{key}") == named(store, str(made["train"].path)) == f"train/{key}"
    pin(store, named(store, key), "for the paper")
    del made
    assert {name.split("/")[0] for name in tidy(store)} == {"convert", "verdict", "chat"}
    assert kept(store, inventory(store), time.time()).why[f"train/{key}"] == "pinned: for the paper"
    assert unpin(store, key[:5]) == f"train/{key}"
    assert {name.split("/")[0] for name in tidy(store)} == {"base", "prepare", "train"}
    for wrong in ("", "0" * 16, "nobody/" + key):
        with pytest.raises(RecipeError, match="no artifact"):
            named(store, wrong)
    with pytest.raises(RecipeError, match="not pinned"):
        unpin(store, key)


def test_what_links_lead_to_stays_with_what_links_there_but_not_what_that_was_made_from(store: Store) -> None:
    target = run(store, 1)["convert"].path

    def link(recipe: Any, work: Work) -> Metrics:
        (work.payload / "model").mkdir()
        (work.payload / "model" / "weights.bin").symlink_to(target / "payload" / "model" / "weights.bin")
        return {}

    key = store.produce(replace(stage("production"), run=link), RECIPE, {}, print).artifact.path.name
    pin(store, f"production/{key}", "")
    tidy(store)
    assert there(store) == {f"production/{key}", f"convert/{target.name}"}
    assert all_are_whole(store)


# The order --------------------------------------------------------------------------------------------------------------------------


def test_the_run_that_was_used_longest_ago_goes_first_its_results_before_what_they_were_made_from(store: Store) -> None:
    old, new = names(run(store, 1)), names(run(store, 2))
    age(store, new, 10)
    age(store, old, 2)
    chat = next(name for name in new if name.startswith("chat"))
    age(store, {chat}, 1)
    half = total(inventory(store)) // 2
    assert tidy(store, half + 50_000) < old, "the base of the new one was found longer ago, but is needed for what was used last"
    run(store, 1)
    assert tidy(store, half) == new
    assert there(store) == old


def test_older_than(store: Store) -> None:
    old, new = names(run(store, 1)), names(run(store, 2))
    age(store, old, 31)
    age(store, new, 29)
    for name in old | new:
        manifest = store.root / name / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"created": "20', '"created": "19'))
    assert tidy(store, None, 30 * DAY, dry_run=True) == old
    assert there(store) == old | new
    assert tidy(store, None, 30 * DAY) == old


def test_shared_bytes_are_free_when_their_last_name_is_gone(store: Store) -> None:
    made = run(store, 1)["prepare"].path
    shard = store.cache / ("a" * 16)
    shard.mkdir(parents=True)
    os.link(made / "payload" / "model" / "weights.bin", shard / "ids.bin")
    items = inventory(store)
    assert total(items) == sum(item.size for item in items) - shard.joinpath("ids.bin").stat().st_blocks * 512
    now = time.time()
    os.utime(shard, (0, 0))
    assert choose(items, {}, total(items) - 1, None, now)[0][0].name.startswith(("verdict", "chat"))
    mine = there(store)
    assert tidy(store) == mine | {f"shards/{'a' * 16}"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 200e9), ("1.5 TB", 1.5e12), ("512MiB", 512 * 2**20), ("7", 7), ("3k", 3000), ("2KiB", 2048), ("0", 0), ("5gb", 5e9)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "ten", "1 2GB"])
def test_what_is_no_size_or_age(text: str) -> None:
    for parse in (parse_size, parse_age):
        with pytest.raises(RecipeError, match="write"):
            parse(text)


def test_ages() -> None:
    assert [parse_age(text) for text in ("12h", "30d", "1.5w")] == [12 * 3600, 30 * DAY, 10.5 * DAY]


# Leavings ---------------------------------------------------------------------------------------------------------------------------


def attempt(store: Store, resumable: bool, days: float) -> Path:
    """What a killed run leaves."""
    made = {name: artifact for name, artifact in run(store, 7).items() if name in CHAIN["train"]}

    def interrupted(recipe: Any, work: Work) -> Metrics:
        if resumable:
            (work.scratch / "checkpoints" / "step-4").mkdir(parents=True)
            (work.scratch / "checkpoints" / "step-4" / "checkpoint.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.produce(replace(stage("train"), run=interrupted, version=2, resumable=True), RECIPE, made, print)
    [folder] = (store.root / ".work").iterdir()
    for path in (folder, *folder.rglob("*")):
        os.utime(path, times=(time.time() - days * DAY,) * 2)
    return folder


@pytest.mark.parametrize(
    ("resumable", "days", "stays"),
    [(True, RESUMABLE_DAYS - 1, True), (True, RESUMABLE_DAYS + 1, False), (False, 0.5, True), (False, 2, False)],
)
def test_an_attempt_stays_as_long_as_it_may_be_resumed_and_so_does_what_it_needs(
    store: Store, resumable: bool, days: float, stays: bool
) -> None:
    folder = attempt(store, resumable, days)
    tidy(store)
    assert folder.exists() == stays
    assert {name.split("/")[0] for name in there(store)} == ({"base", "prepare"} if stays else set())


def test_damaged_ones_locks_drafts_and_known_digests_are_cleared_away(store: Store, tmp_path: Path) -> None:
    gone, here = tmp_path / "gone.jsonl", tmp_path / "here.jsonl"
    for file in (gone, here):
        file.write_text("{}")
    store.file_digests([gone, here])
    gone.unlink()
    made = names(run(store, 1))
    damaged = store.root / ".damaged" / f"train-{'b' * 16}"
    for folder, days in ((damaged, 8), (damaged.with_name(f"train-{'c' * 16}"), 6)):
        folder.mkdir(parents=True)
        os.utime(folder, times=(time.time() - days * DAY,) * 2)
    draft, trash = store.root / ".digests.json.99999.tmp", store.root / ".trash" / "half"
    draft.touch()
    os.utime(draft, (0, 0))
    trash.mkdir(parents=True)
    locks = store.root / ".locks"
    (locks / f"train-{'d' * 16}.lock").touch()
    (locks / "models-mine.lock").touch()
    assert tidy(store, None) == {f"train/{'b' * 16}"}
    assert there(store) == made
    assert [path.name for path in damaged.parent.iterdir()] == [f"train-{'c' * 16}"]
    assert not draft.exists() and not trash.exists()
    assert {path.stem for path in locks.iterdir()} == {name.replace("/", "-") for name in made} | {"models-mine", "cleanup"}
    assert str(here) in (store.root / ".digests.json").read_text()
    assert str(gone) not in (store.root / ".digests.json").read_text()


def test_what_is_none_of_ours_stays(store: Store) -> None:
    run(store, 1)
    for path in (store.root / "notes" / "mine", store.root / "models" / "x", store.root / ".work" / "x-y"):
        path.mkdir(parents=True)
    tidy(store, 0, 0)
    assert all((store.root / path).is_dir() for path in ("notes/mine", "models/x", ".work/x-y"))


# Beside others ----------------------------------------------------------------------------------------------------------------------

RUNNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_cleanup import run
from pipelines.artifacts import Store

until, runs = time.monotonic() + 3, 0
while time.monotonic() < until:
    run(Store(Path(sys.argv[1])), runs % 3)
    runs += 1
print(runs)
"""


def test_runs_and_clean_ups_at_the_same_moment(store: Store) -> None:
    command = [sys.executable, "-c", RUNNER, str(store.root), str(Path(__file__).parent)]
    runners = [subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    removed = 0
    while any(runner.poll() is None for runner in runners):
        removed += len(tidy(store))
    for runner in runners:
        told, complaint = runner.communicate()
        assert runner.returncode == 0, complaint
        assert int(told) > 0
    assert removed
    assert all_are_whole(store)
    mine = there(store)
    assert tidy(store) == mine


def test_a_second_clean_up_is_told_to_come_back(store: Store) -> None:
    run(store, 1)
    said = []

    def say(line: str) -> None:
        said.append(line)
        with pytest.raises(Interrupted, match="another clean-up is at work"):
            tidy(store)

    clean(store, 0, None, say)
    assert len(said) == len(CHAIN)


def test_a_version_or_a_pin_that_comes_meanwhile_is_seen(store: Store) -> None:
    old, new = names(run(store, 1)), run(store, 2)
    mine = names(new)
    train = next(name for name in mine if name.startswith("train"))
    age(store, old | mine, 1)
    age(store, old, 3)
    del new

    def say(line: str) -> None:
        pin(store, train, "just now")

    clean(store, 0, None, say)
    assert {name.split("/")[0] for name in there(store)} == {"base", "prepare", "train"}
    assert train in there(store)


def _killed_at(store: Store, number: int) -> bool:
    """Clean up in a child that is killed before its operation on the disk of this number; False if it got through."""
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(operation: Any) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return operation(*arguments, **more)

            return call

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            tidy(store)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_operation_the_store_is_good_and_the_next_clean_up_finishes(store: Store) -> None:
    mine = names(run(store, 1))
    version = register(store, run(store, 2))
    promotion.promote(store, version, "me", "why")
    safe = there(store) - mine
    number = 0
    while _killed_at(store, number):
        assert all_are_whole(store)
        assert safe <= there(store)
        names(run(store, 1))
        number += 8
    assert number > 20
    tidy(store)
    assert there(store) == safe
    assert not list((store.root / ".trash").glob("*"))


# Any history ------------------------------------------------------------------------------------------------------------------------


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[Item], list[tuple[str, str]], int | None, float | None]:
    """Things of any age and size, made from earlier ones, sharing files, some of them kept."""
    count = draw(st.integers(0, 12))
    known: list[Item] = []
    for number in range(count):
        kind = draw(st.sampled_from(["artifact", "artifact", "artifact", "attempt", "damaged", "shard"]))
        above = [item.name for item in known if item.kind == "artifact"]
        some = st.lists(st.sampled_from(above), max_size=3, unique=True) if above else st.just([])
        files = {(1, 100 + number): draw(st.integers(1, 50))} if kind != "shard" else {}
        files |= {(1, inode): 7 * inode for inode in draw(st.lists(st.integers(1, 6), max_size=3))}
        used = draw(st.integers(0, 100)) * DAY
        known.append(Item(kind, Path(f"/{kind}/{number}"), f"{kind}/{number}", "", used, used, tuple(draw(some)), tuple(draw(some)), files))
    artifacts = [item.name for item in known if item.kind in ("artifact", "attempt")]
    roots = draw(st.lists(st.sampled_from(artifacts), max_size=3)) if artifacts else []
    return (
        known,
        [(name, "because") for name in roots],
        draw(st.none() | st.integers(0, 400)),
        draw(st.none() | st.integers(0, 120).map(lambda days: days * DAY)),
    )


def _needed(items: list[Item], roots: list[tuple[str, str]]) -> set[str]:
    """The same as `Kept.why`, by a fixed point."""
    known = {item.name: item for item in items}
    needed = {name for name, _ in roots}
    for ways in ("inputs", "links"):
        while more := {one for name in needed for one in getattr(known[name], ways)} - needed:
            needed |= more
    return needed


@settings(max_examples=150)
@given(stores())
def test_nothing_kept_goes_the_budget_is_met_if_it_can_be_and_no_more_goes(
    drawn: tuple[list[Item], list[tuple[str, str]], int | None, float | None],
) -> None:
    items, roots, budget, older_than = drawn
    now = 100 * DAY
    needed = _needed(items, roots)
    why = Kept(tuple(roots), tuple(items)).why
    assert set(why) == needed
    chosen = choose(items, why, budget, older_than, now)
    gone = {item.path for item, _ in chosen}
    assert len(gone) == len(chosen)
    assert not [item for item, _ in chosen if item.kind in ("artifact", "attempt") and item.name in needed]
    left = [item for item in items if item.path not in gone]
    if budget is not None:
        may_go = [item for item in left if item.kind in ("damaged", "shard") or item.name not in needed]
        assert total(left) <= budget or total(left) == total(item for item in left if item not in may_go)
        if chosen and "budget" in chosen[-1][1]:
            assert total([*left, chosen[-1][0]]) > budget, "one less would not do"
    if older_than is None and budget is None:
        assert all(item.kind in ("attempt", "damaged") for item, _ in chosen)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "version", "promote", "roll back", "pin", "unpin", "clean", "days pass", "damage"]),
        st.integers(0, 3),
    ),
    max_size=12,
)


def _histories(steps: list[tuple[str, int]], store: Store) -> Iterator[set[str]]:
    """After each clean-up what must be there."""
    known: list[model_registry.Version] = []
    for what, number in steps:
        if what == "run":
            run(store, number)
        elif what == "version":
            known.append(register(store, run(store, number)))
        elif what == "promote" and known:
            try:
                promotion.promote(store, known[number % len(known)], "me", "why")
            except DataError as error:
                assert "is not in" in str(error)  # cleaned up: it can be made again
        elif what == "roll back" and known:
            try:
                promotion.rollback(store, RECIPE.name, "me", "why")
            except (RecipeError, DataError) as error:
                assert "no version was in production before" in str(error) or "is not in" in str(error)
        elif what == "pin" and there(store):
            pin(store, sorted(there(store))[number % len(there(store))], "")
        elif what == "days pass":
            age(store, there(store), 10.0 * number)
        elif what == "clean":
            before = kept(store, inventory(store), time.time()).why
            must = {name for name in before if name in there(store)}
            clean(store, number * 100_000, None, lambda line: None)
            yield must


@settings(max_examples=6)
@given(STEPS)
def test_whatever_was_done_before(steps: list[tuple[str, int]]) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        store = Store(place)
        for must in _histories([*steps, ("clean", 0)], store):
            assert must <= there(store)
            assert all_are_whole(store)
            if version := model_registry.production(store, RECIPE.name):
                promotion.require_whole(store, version)
    finally:
        shutil.rmtree(place)
