"""Three weeks of a recipe that goes on from production, by the real stages: trained, nothing new, one more file; and what it decides."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import model_registry, promotion, retraining
from pipelines.artifacts import Artifact, Store
from pipelines.model_registry import Version
from pipelines.pipeline import nodes, plan
from pipelines.recipe import PROJECT, Recipe
from pipelines.retraining import as_of_today, asked, beginning, news, nothing_new, recipe_of_today
from pipelines.runner import run_node

pytestmark = pytest.mark.slow

CHATS = (PROJECT / "data" / "openai_chats" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
TREE = {
    "retrain": {"start": "production", "replay": 0.25},
    "train": {"method": "lora", "total_step": 3, "global_batch_size": 2, "lr": 1e-2, "dtype": "fp32"},
    "eval": {
        "datasets": [{"name": "chats", "kind": "loss", "path": "data/openai_chats/heldout.jsonl"}],
        "limit": 4,
        "production": "registry",
    },
}


@dataclass
class Weeks:
    """A store, the folder that new files come into, and the recipe's file."""

    store: Store
    data: Path
    recipe: Path
    lines: list[str] = field(default_factory=list)

    def today(self, *changes: str) -> Recipe:
        return recipe_of_today(str(self.recipe), changes, self.store)

    def written(self, *changes: str) -> Recipe:
        return asked(str(self.recipe), changes)

    def run(self, *changes: str) -> tuple[Version, dict[str, Artifact]]:
        """The whole run; its model becomes a version."""
        recipe, made = self.today(*changes), {}
        self.lines.clear()
        for node in nodes(recipe):
            made[node.name] = run_node(node, recipe, self.store, made, self.lines.append).artifact
        return promotion.register(self.store, recipe, made, True, "", {}), made

    def cached(self, *changes: str) -> set[str]:
        return {step.node.name for step in plan(self.today(*changes), self.store) if step.state == "cached"}


@pytest.fixture(scope="module")
def weeks(tmp_path_factory: pytest.TempPathFactory) -> Weeks:
    place = tmp_path_factory.mktemp("weeks")
    (place / "data").mkdir()
    tree = yaml.safe_load((PROJECT / "tests" / "service" / "tiny.yaml").read_text(encoding="utf-8"))
    data = {**tree["data"], "train": [str(place / "data")]}
    (place / "recipe.yaml").write_text(yaml.safe_dump({**tree, **TREE, "data": data}), encoding="utf-8")
    return Weeks(Store(place / "store"), place / "data", place / "recipe.yaml")


@dataclass(frozen=True)
class Made:
    version: Version
    artifacts: dict[str, Artifact]
    lines: list[str]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(row) for row in (self.artifacts["train"].record / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(weeks: Weeks) -> Made:
    """The first week, promoted."""
    (weeks.data / "a.jsonl").write_text("".join(CHATS[:48]), encoding="utf-8")
    assert beginning(weeks.written(), weeks.store).why.endswith("no version of tiny_service is in production yet")
    assert nothing_new(weeks.today(), weeks.store) is None
    version, made = weeks.run()
    assert "no new data" in str(nothing_new(weeks.today(), weeks.store))  # not promoted yet: a candidate that nobody wants is enough
    promotion.promote(weeks.store, version, "Ada", "first")
    return Made(version, made, list(weeks.lines))


@pytest.fixture(scope="module")
def third(weeks: Weeks, first: Made) -> Iterator[Made]:
    """The third week, with a new file, promoted."""
    (weeks.data / "b.jsonl").write_text("".join(CHATS[48:]), encoding="utf-8")
    found = news(weeks.today(), weeks.store)
    assert found and found.changes == [f"file {weeks.data / 'b.jsonl'}"]
    assert nothing_new(weeks.today(), weeks.store) is None
    version, made = weeks.run()
    yield Made(version, made, list(weeks.lines))


def test_when_nothing_changed_it_is_told_in_no_time_with_what_it_was_compared_to(weeks: Weeks, first: Made) -> None:
    started = time.process_time()
    told = nothing_new(weeks.today(), weeks.store)
    assert time.process_time() - started < 3
    assert told and told.startswith("no new data: tiny_service@1 (")
    assert "the files of data.train" in told
    assert weeks.cached() >= {"base", "prepare", "train", "convert", "eval", "chat"}


def test_a_file_that_was_only_renamed_is_not_new_and_one_that_changed_is(weeks: Weeks, first: Made) -> None:
    before = (weeks.data / "a.jsonl").read_bytes()
    (weeks.data / "a.jsonl").rename(weeks.data / "z.jsonl")
    assert nothing_new(weeks.today(), weeks.store)
    (weeks.data / "z.jsonl").write_bytes(before + CHATS[60].encode())
    assert nothing_new(weeks.today(), weeks.store) is None
    [source] = weeks.today().data.train
    assert (source.sample_ratio, source.path) == (1, str(weeks.data / "z.jsonl"))
    (weeks.data / "z.jsonl").unlink()
    (weeks.data / "a.jsonl").write_bytes(before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.lr=0.02", "train: settings.train.lr: 0.01 → 0.02"),
        ("chat.max_tokens=5", "chat: settings.max_tokens: 4 → 5"),
        ("eval.gate=[{dataset: chats, lose_at_most: 1}]", "verdict: settings.gate: [] → "),
        ("model.base=preset:qwen3-moe-tiny", "base: settings.name: qwen3-tiny → qwen3-moe-tiny"),
    ],
)
def test_what_else_of_the_recipe_changed_is_new_too(change: str, told: str, weeks: Weeks, first: Made) -> None:
    found = news(weeks.today(change), weeks.store)
    assert found and any(line.startswith(told) for line in found.changes)


def test_a_run_that_goes_on_learns_the_new_file_whole_and_replays_a_part_of_the_old_one(weeks: Weeks, first: Made, third: Made) -> None:
    sources = {Path(one["file"]).name: one["sample_ratio"] for one in third.artifacts["prepare"].metrics["sources"]}
    assert sources == {"a.jsonl": 0.25, "b.jsonl": 1.0}
    assert any(line.startswith("tokenized 1 of 2 input files") for line in third.lines)
    log = (third.artifacts["train"].record / "train.log").read_text()
    assert f"trained tensors of {first.artifacts['train'].payload / 'checkpoint'}" in log
    assert third.rows()[0]["total_loss"] < first.rows()[0]["total_loss"] - 0.1
    assert model_registry.went_on_from(weeks.store, third.version) == first.version
    assert model_registry.went_on_from(weeks.store, first.version) is None


def test_a_version_remembers_what_those_before_it_have_seen_and_no_file_for_validation(weeks: Weeks, first: Made, third: Made) -> None:
    assert [Path(file["path"]).name for file in third.version.data] == ["a.jsonl", "b.jsonl"]
    held = ["data.validation=[data/openai_chats/heldout.jsonl]", "retrain.replay=0", "promotion.model=other"]
    made = dict(third.artifacts)
    recipe = weeks.today(*held)
    for node in nodes(recipe)[:2]:
        made[node.name] = run_node(node, recipe, weeks.store, made, print).artifact
    assert {Path(file["path"]).name for file in model_registry.trained_on(weeks.store, "other", made)} == {"a.jsonl", "b.jsonl"}


def test_asked_for_again_it_is_the_same_run_before_and_after_its_promotion(weeks: Weeks, first: Made, third: Made) -> None:
    stages = {"base", "prepare", "train", "convert", "eval", "chat"}
    assert weeks.cached() >= stages and nothing_new(weeks.today(), weeks.store)
    promotion.promote(weeks.store, third.version, "Ada", "better")
    assert weeks.cached() >= stages and nothing_new(weeks.today(), weeks.store)
    assert weeks.today().eval.production == str(model_registry.folder(weeks.store, third.version) / "model")
    promotion.rollback(weeks.store, "tiny_service", "Ada", "worse")
    assert weeks.cached() >= stages and nothing_new(weeks.today(), weeks.store)


def test_replay_of_nothing_leaves_old_files_out_and_each_version_replays_another_part(weeks: Weeks, first: Made, third: Made) -> None:
    [new] = weeks.today("retrain.replay=0").data.train
    assert Path(new.path).name == "b.jsonl"
    promotion.promote(weeks.store, third.version, "Ada", "better")
    (weeks.data / "c.jsonl").write_text("".join(CHATS[:3]), encoding="utf-8")
    try:
        assert {Path(one.path).name: (one.sample_ratio, one.draw) for one in weeks.today().data.train} == {
            "a.jsonl": (0.25, 2),
            "b.jsonl": (0.25, 2),
            "c.jsonl": (1.0, 0),
        }
    finally:
        (weeks.data / "c.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("train.lora.rank=4", r"tiny_service@1, which is in production: train.lora.rank is 16 there and 4 here"),
        ("train.method=full", "train.method is lora there and full here"),
        ("model.base=preset:qwen3-moe-tiny", "model.base is another model than the one it was trained on"),
        ("retrain.start=base", "as the recipe says"),
    ],
)
def test_where_it_cannot_go_on_it_begins_at_the_base_with_all_files_and_says_why(
    change: str, reason: str, weeks: Weeks, first: Made, third: Made
) -> None:
    promotion.promote(weeks.store, first.version, "Ada", "for this test")
    found = beginning(weeks.written(change), weeks.store)
    assert found.version is None and found.why.endswith(reason)
    today = weeks.today(change)
    assert (today.train.start, today.data.train) == (None, weeks.written(change).data.train)


def test_a_checkpoint_that_is_gone_is_told(weeks: Weeks, first: Made, third: Made, tmp_path: Path) -> None:
    promotion.promote(weeks.store, first.version, "Ada", "for this test")
    checkpoint = model_registry.checkpoint(weeks.store, first.version)
    shutil.move(checkpoint, tmp_path / "away")
    try:
        assert beginning(weeks.written(), weeks.store).why.endswith("its training checkpoint is not in the store any more")
        assert as_of_today(weeks.written(), weeks.store).train.start is None
    finally:
        shutil.move(tmp_path / "away", checkpoint)


def test_a_run_that_ended_half_way_is_something_new(weeks: Weeks, first: Made, third: Made) -> None:
    change = "train.lr=0.005"
    recipe, made = weeks.today(change), {}
    for node in nodes(recipe)[:4]:
        made[node.name] = run_node(node, recipe, weeks.store, made, print).artifact
    assert retraining.nothing_new(weeks.today(change), weeks.store) is None
