"""What `plan` says: cached, will run and what changed, or depends on one that will run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate, prepare
from pipelines.artifacts import Artifact, Store
from pipelines.changes import Origin, changes, origin, origin_of
from pipelines.cleanup import clean
from pipelines.pipeline import STAGES, Planned, check, explain, needed_for, nodes, plan
from pipelines.recipe import PROJECT, load_recipe
from pipelines.runner import run_until
from xtuner_core.errors import DataError, RecipeError, UserError

TINY = "qwen3_tiny_full_openai"


def made_from(stage: str) -> dict[str, Any]:
    return {"inputs": {"model": {"stage": stage, "key": "k", "payload_digest": "d"}}, "key": stage}


TOOK = {"metrics": {}, "seconds": 1.0, "files": []}
DATA = ("data.train=data/openai_chats/heldout.jsonl",)


def planned(store: Store, *overrides: str) -> dict[str, Planned]:
    return {step.node.name: step for step in plan(load_recipe(TINY, [*DATA, *overrides]), store)}


def states(steps: dict[str, Planned]) -> list[str]:
    return [step.state for step in steps.values()]


def artifact(store: Store, stage: str) -> Artifact:
    (folder,) = (store.root / stage).iterdir()
    return Artifact(folder)


def test_an_empty_store_makes_the_base_and_the_rest_depends(tmp_path: Path) -> None:
    steps = planned(Store(tmp_path / "nothing"))
    assert list(steps) == [node.name for node in nodes(load_recipe(TINY))]
    assert states(steps) == ["will run"] + ["depends"] * 7
    assert (steps["base"].why, steps["convert"].why) == ("never made", "on base, prepare, train")
    assert not (tmp_path / "nothing" / "base").exists()


def test_what_is_whole_is_cached_and_its_place_told(prepared_store: Store) -> None:
    steps = planned(prepared_store)
    assert states(steps) == ["cached", "cached", "will run", "depends", "will run", "depends", "depends", "depends"]
    assert steps["prepare"].why == str(artifact(prepared_store, "prepare").path)
    assert steps["prepare"].key == artifact(prepared_store, "prepare").path.name
    assert (steps["train"].why, steps["convert"].why) == ("never made", "on train")


def test_plan_names_the_key_that_the_run_then_makes(prepared_store: Store) -> None:
    override = "data.pack_length=2048"
    key = planned(prepared_store, override)["prepare"].key
    result = run_until("prepare", load_recipe(TINY, [*DATA, override]), prepared_store, print)
    assert (result.cached, result.artifact.path.name) == (False, key)


def test_a_changed_setting_is_named_with_before_and_after(prepared_store: Store) -> None:
    assert planned(prepared_store, "data.pack_length=2048")["prepare"].why == "data.pack_length: 1024 → 2048"


def test_a_change_of_the_base_says_so_and_the_rest_depends(prepared_store: Store) -> None:
    steps = planned(prepared_store, "seed=43")
    assert steps["base"].why == "seed: 42 → 43"
    assert states(steps) == ["will run"] + ["depends"] * 7


def test_files_are_named_by_their_paths(prepared_store: Store, tmp_path: Path) -> None:
    data, moved = tmp_path / "more.jsonl", tmp_path / "moved.jsonl"
    data.write_text('[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]\n')
    shipped = PROJECT / "data/openai_chats/heldout.jsonl"
    before, more = (prepared_store.file_digest(file)[:12] for file in (shipped, data))
    other = planned(prepared_store, f"data.train={data}")["prepare"]
    told = {change.told() for change in other.changes}
    assert told == {f"{data}: added ({more})", f"data/openai_chats/heldout.jsonl: removed ({before})"}
    added = planned(prepared_store, f"data.train={shipped},{data}")["prepare"]
    assert [(change.kind, change.what, change.before) for change in added.changes] == [
        ("file", str(data), None),
        ("setting", "inputs", None),
    ]
    shutil.copy(shipped, moved)
    assert planned(prepared_store, f"data.train={moved}")["prepare"].state == "cached", "its place decides nothing"
    run_until("prepare", load_recipe(TINY, [f"data.train={moved}"]), prepared_store, print)
    moved.write_bytes(data.read_bytes())
    run_until("prepare", load_recipe(TINY, [f"data.train={data}"]), prepared_store, print)
    data.write_text(data.read_text() * 2)
    now = prepared_store.file_digest(data)[:12]
    assert planned(prepared_store, f"data.train={data}")["prepare"].why == f"{data}: changed ({more} → {now})"


def test_what_depends_tells_its_own_changes_or_that_it_may_stay_cached(prepared_store: Store) -> None:
    recipe = load_recipe(TINY, [*DATA])
    stage = needed_for("train", recipe)[-1].stage
    small = replace(stage, run=lambda recipe, work: {}, resumable=False)
    inputs = {"base": artifact(prepared_store, "base"), "data": artifact(prepared_store, "prepare")}
    made = prepared_store.produce(small, recipe, inputs, print).artifact
    step = planned(prepared_store, "data.pack_length=2048")["train"]
    assert (step.state, step.why, step.changes, step.last) == ("depends", "on prepare", (), made)
    assert list(explain(step))[-1] == "  nothing of its own changed: it is cached again if what it depends on comes out the same"
    step = planned(prepared_store, "data.pack_length=2048", "train.lr=0.5")["train"]
    assert list(explain(step))[1:] == ["  setting  train.lr: 0.005 → 0.5"]


def test_another_input_a_library_and_a_stage_s_version_are_named(prepared_store: Store) -> None:
    recipe, base = load_recipe(TINY, [*DATA]), artifact(prepared_store, "base")
    manifest = artifact(prepared_store, "prepare").manifest
    ingredients = json.loads(json.dumps(manifest["ingredients"]))
    ingredients["inputs"]["base"], ingredients["version"] = "0" * 64, 99
    ingredients["libraries"] |= {"numpy": "0.1"}
    now = origin(ingredients, prepare.files_of(recipe), {"base": base})
    assert [(change.kind, change.told()) for change in changes(origin_of(manifest), now)] == [
        ("input", f"base: base/{base.path.name} → base/{base.path.name}"),
        ("library", f"numpy: {manifest['ingredients']['libraries']['numpy']} → 0.1"),
        ("stage", f"version of the stage's code: {manifest['ingredients']['version']} → 99"),
    ]


def test_what_was_cleaned_up_says_so(prepared_store: Store) -> None:
    clean(prepared_store, 0, None, print)
    steps = planned(prepared_store)
    assert steps["base"].why == "cleaned up: over the budget of 0 B"
    assert list(explain(steps["prepare"]))[-1].startswith("  nothing of its own changed")


def test_another_recipe_s_artifacts_are_no_measure(prepared_store: Store) -> None:
    assert planned(prepared_store, "name=mine", "data.pack_length=2048")["prepare"].why == "never made"


LISTS = [
    ({"a": [1, 2]}, {"a": [2, 3]}, ["a: removed (1)", "a: added (3)"]),
    ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] → [2, 1]"]),
    ({"a": [{"name": "x", "n": 1}, {"name": "y"}]}, {"a": [{"name": "y"}, {"name": "x", "n": 2}]}, ["a.x.n: 1 → 2"]),
    ({"a": {"b": None}}, {"a": {"b": {"c": 1}}}, ["a.b: None → {'c': 1}"]),
    ({"a": 1}, {"b": "f" * 64}, ["a: 1 → None", "b: None → ffffffffffff"]),
    ({"a": "x" * 200}, {"a": ""}, [f"a: {'x' * 100}… → "]),
]


@pytest.mark.parametrize(("before", "now", "told"), LISTS)
def test_settings_differ_field_by_field(before: dict[str, Any], now: dict[str, Any], told: list[str]) -> None:
    def of(settings: dict[str, Any]) -> Origin:
        return Origin({"settings": settings, "inputs": {}, "libraries": {}, "stage": "x", "version": 1}, [], {})

    assert [change.told() for change in changes(of(before), of(now))] == told


def test_of_many_changes_the_first_three_are_named(prepared_store: Store) -> None:
    why = planned(prepared_store, "data.pack_length=2048", "data.max_length=512", "data.max_rejected=0.5", "model.template=chatml")[
        "prepare"
    ].why
    assert why == ("data.max_length: 1024 → 512; data.max_rejected: 0.0 → 0.5; data.pack_length: 1024 → 2048; and 1 more")


def test_an_evaluation_is_compared_with_the_last_one_of_the_same_model(prepared_store: Store) -> None:
    recipe, base = load_recipe(TINY, [*DATA]), artifact(prepared_store, "base")
    of_base = prepared_store.ingredients(evaluate.STAGE, recipe, {"model": base})
    files = [{"path": "chats.jsonl", "sha256": digest} for digest in of_base["files"]]
    for name, day, source in (("base", 1, "base"), ("tuned", 2, "convert")):
        folder = prepared_store.root / "eval" / name
        folder.mkdir(parents=True)
        manifest = {"recipe": TINY, "created": f"2026-01-0{day}", "ingredients": of_base, "input_files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest | made_from(source) | TOOK))
    assert planned(prepared_store, "eval.limit=5")["eval-base"].why == "limit: None → 5"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eval.gate=[{dataset: nobody, beat_by: 1}]", "no data set 'nobody' is evaluated"),
        ("eval.suites=[nobody]", "suite 'nobody'"),
        ("chat.prompts=nowhere.jsonl", r"nowhere\.jsonl"),
    ],
)
def test_a_mistake_of_a_stage_that_depends_is_told(prepared_store: Store, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        planned(prepared_store, override)


def test_a_suite_that_prepare_cannot_report_on_is_told_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="suite 'nobody'"):
        run_until("prepare", load_recipe(TINY, [*DATA, "eval.suites=[nobody]"]), Store(tmp_path / "store"), print)
    assert not (tmp_path / "store").exists()


def test_what_does_not_decide_bytes_changes_nothing(prepared_store: Store) -> None:
    assert states(planned(prepared_store, "chat.port=8123", "eval.timeout=99", "train.checkpoint_interval=3", "description=x")) == states(
        planned(prepared_store)
    )


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "payload/data.json").unlink(), "damaged: payload/data.json: missing"),
        (lambda folder: os.truncate(folder / "payload/samples.jsonl", 5), "damaged: payload/samples.jsonl: 5 bytes instead of "),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged: manifest.json: "),
    ],
)
def test_damage_will_be_rebuilt_and_what_needs_it_depends(prepared_store: Store, damage: Callable[[Path], object], why: str) -> None:
    damage(artifact(prepared_store, "prepare").path)
    steps = planned(prepared_store)
    assert steps["prepare"].state == "will run"
    assert steps["prepare"].why.startswith(why)
    assert states(steps) == ["cached", "will run", "depends", "depends", "will run", "depends", "depends", "depends"]
    assert artifact(prepared_store, "prepare").path.is_dir(), "plan only looks"


def test_a_cached_plan_takes_little_processor_time(prepared_store: Store) -> None:
    planned(prepared_store)
    started = time.process_time()
    planned(prepared_store)
    assert time.process_time() - started < 0.3


def test_missing_data_is_told(prepared_store: Store) -> None:
    with pytest.raises(DataError, match=r"nosuch\.jsonl: no such file.*data\.train"):
        planned(prepared_store, "data.train=nosuch.jsonl")


def test_a_base_that_means_nothing_is_told(prepared_store: Store) -> None:
    with pytest.raises(RecipeError, match=r"model\.base: 'nosuch': no such file or folder"):
        planned(prepared_store, "model.base=nosuch")


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("base", ["base"]),
        ("prepare", ["base", "prepare"]),
        ("convert", ["base", "prepare", "train", "convert"]),
        ("eval-base", ["base", "eval-base"]),
        ("verdict", ["base", "prepare", "train", "convert", "eval-base", "eval", "verdict"]),
        ("chat", ["base", "prepare", "train", "convert", "chat"]),
    ],
)
def test_only_what_a_stage_needs_is_made_for_it(name: str, needed: list[str]) -> None:
    assert [node.name for node in needed_for(name, load_recipe(TINY))] == needed


@pytest.mark.parametrize("overrides", [[], ["eval.production=anywhere"]])
def test_inputs_come_before_what_needs_them_and_the_five_stages_are_there(overrides: list[str]) -> None:
    graph = nodes(load_recipe(TINY, overrides))
    names = [node.name for node in graph]
    assert all(names.index(source) < names.index(node.name) for node in graph for source in node.inputs.values())
    assert [name for name in names if name in STAGES] == list(STAGES)


def test_a_recipe_that_names_the_model_in_use_has_it_judged(prepared_store: Store) -> None:
    model = artifact(prepared_store, "base").payload / "model"
    steps = planned(prepared_store, f"eval.production={model}")
    assert list(steps)[4:8] == ["eval-base", "production", "eval-production", "eval"]
    assert (steps["production"].state, steps["eval-production"].why) == ("will run", "on production")
    assert steps["verdict"].node.inputs["production"] == "eval-production"
    needed = needed_for("verdict", load_recipe(TINY, [f"eval.production={model}"]))
    assert [node.name for node in needed] == [name for name in steps if name != "chat"]
    made = run_until("production", load_recipe(TINY, [f"eval.production={model}"]), prepared_store, print).artifact
    assert made.digest == artifact(prepared_store, "base").digest, "the same files, wherever they lie: their evaluation is made once"
    assert all(path.is_symlink() for path in (made.payload / "model").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("eval.datasets=[{name: a, kind: nobody, path: x}]", RecipeError),
        ("eval.suites=[nobody]", RecipeError),
        ("chat.chatter=nobody", RecipeError),
        ("train.launcher=nobody", RecipeError),
        ("train.method=nobody", RecipeError),
        ("train.optimizer=nobody", RecipeError),
        ("train.scheduler=nobody", RecipeError),
        ("data.packing=nobody", RecipeError),
        ("data.format=nobody", RecipeError),
        ("model.template=nobody", RecipeError),
        ("chat.prompts=nowhere.jsonl", DataError),
        ("data.train=nowhere.jsonl", DataError),
        ("model.base=no/where/folder", RecipeError),
        ("eval.production=no/where/folder", RecipeError),
        ("eval.gate=[{dataset: nobody, beat_by: 1}]", RecipeError),
        ("eval.gate=[{dataset: chats, against: production, beat_by: 1, sure: true}]", RecipeError),
    ],
)
def test_a_mistake_of_a_late_stage_is_told_before_the_first(override: str, error: type[Exception]) -> None:
    check(load_recipe(TINY))
    with pytest.raises(error, match=r"nobody|nowhere|no/where|eval\.production"):
        check(load_recipe(TINY, [override]))


def test_a_mistake_of_the_gate_is_told_before_anything_is_made_for_the_verdict(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["eval.gate=[{dataset: nobody, beat_by: 1}]"])
    with pytest.raises(RecipeError, match="no data set 'nobody' is evaluated"):
        run_until("verdict", recipe, Store(tmp_path / "store"), print)
    assert not (tmp_path / "store").exists()
