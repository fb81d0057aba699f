"""What `plan` says: cached, will run and what changed, or depends on one that will run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import evaluate
from pipelines.artifacts import Artifact, Store
from pipelines.pipeline import STAGES, Planned, check, needed_for, nodes, plan
from pipelines.recipe import load_recipe
from pipelines.runner import run_until
from xtuner_core.errors import DataError, RecipeError, UserError

TINY = "qwen3_tiny_full_openai"
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
    assert planned(prepared_store, "data.pack_length=2048")["prepare"].why == "settings.data.pack_length: 1024 → 2048"


def test_a_change_of_the_base_says_so_and_the_rest_depends(prepared_store: Store) -> None:
    steps = planned(prepared_store, "seed=43")
    assert steps["base"].why == "settings.seed: 42 → 43"
    assert states(steps) == ["will run"] + ["depends"] * 7


def test_a_changed_file_is_named_by_its_digest(prepared_store: Store, tmp_path: Path) -> None:
    data = tmp_path / "more.jsonl"
    data.write_text('[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]\n')
    before, after = artifact(prepared_store, "prepare").manifest["ingredients"]["files"][0], prepared_store.file_digest(data)
    assert planned(prepared_store, f"data.train={data}")["prepare"].why == f"files[0]: {before[:12]} → {after[:12]}"
    shipped = Path(__file__).parents[3] / "data/openai_chats/heldout.jsonl"
    assert planned(prepared_store, f"data.train={shipped},{data}")["prepare"].why == (
        f"files[1]: None → {after[:12]}; settings.inputs[1]: None → train .jsonl as auto × 1.0"
    )


def test_of_many_changes_the_first_three_are_named(prepared_store: Store) -> None:
    why = planned(prepared_store, "data.pack_length=2048", "data.max_length=512", "data.max_rejected=0.5", "model.template=chatml")[
        "prepare"
    ].why
    assert why == (
        "settings.data.max_length: 1024 → 512; settings.data.max_rejected: 0.0 → 0.5; settings.data.pack_length: 1024 → 2048; and 1 more"
    )


def test_an_evaluation_is_compared_with_the_last_one_of_the_same_model(prepared_store: Store) -> None:
    recipe, base = load_recipe(TINY, [*DATA]), artifact(prepared_store, "base")
    of_base = prepared_store.ingredients(evaluate.STAGE, recipe, {"model": base})
    for name, day, ingredients in (("base", 1, of_base), ("tuned", 2, {**of_base, "inputs": {"model": "0" * 64}})):
        folder = prepared_store.root / "eval" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(
            json.dumps({"stage": "eval", "recipe": TINY, "created": f"2026-01-0{day}", "ingredients": ingredients, **TOOK})
        )
    assert planned(prepared_store, "eval.limit=5")["eval-base"].why == "settings.limit: None → 5"


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
