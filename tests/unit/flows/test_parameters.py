"""The schema of the flow's parameters: the UI's form, and what the server refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.finetune import finetune_flow
from flows.parameters import DEMO
from pipelines import launchers
from pipelines.artifacts import Store
from pipelines.pipeline import check
from pipelines.recipe import load_recipe, shipped_names
from pipelines.retraining import recipe_of_today
from xtuner_core import adapters, registry
from xtuner_core.data import templates
from xtuner_core.errors import RecipeError

SCHEMA = parameter_schema(finetune_flow.fn).model_dump_for_openapi()
TINY = "qwen3_tiny_full_openai"


def whole(**section: Any) -> dict[str, Any]:
    return {"recipe": {**load_recipe(TINY).model_dump(mode="json"), **section}}


def section(name: str, **changes: Any) -> dict[str, Any]:
    return whole(**{name: {**load_recipe(TINY).model_dump(mode="json")[name], **changes}})


def problems(parameters: dict[str, Any]) -> list[str]:
    return [str(error.message) for error in validate(parameters, SCHEMA)]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"recipe": TINY, "changes": ["train.total_step=3"], "store": "artifacts", "trigger": "schedule"},
        {"recipe": "my/own.yaml"},
        whole(),
        section("train", method="lora", trackers=["tensorboard"], total_step=3),
        section("model", template=None),
    ],
)
def test_the_server_takes(parameters: dict[str, Any]) -> None:
    assert problems(parameters) == []


@pytest.mark.parametrize(
    "parameters",
    [
        whole(bogus=1),
        section("train", learning_rate=1),
        section("train", lr=-1.0),
        section("train", method="lroa"),
        section("train", trackers=["tensorbord"]),
        section("model", template="qwen9"),
        section("eval", datasets=[{"name": "a b"}]),
        {"recipe": 7},
        {"changes": "train.lr=1"},
        {"trigger": "whim"},
    ],
)
def test_the_server_refuses(parameters: dict[str, Any]) -> None:
    assert problems(parameters)


def test_without_parameters_it_is_the_demo() -> None:
    assert SCHEMA["properties"]["recipe"]["default"] == DEMO in shipped_names()
    assert "required" not in SCHEMA


def test_the_form_offers_names_and_says_what_every_field_is() -> None:
    shipped, file, recipe = SCHEMA["properties"]["recipe"]["anyOf"]
    assert shipped["enum"] == shipped_names()
    assert (shipped["title"], file["title"], recipe["title"]) == ("A shipped recipe", "A recipe's file", "The whole recipe")
    train, model = (SCHEMA["definitions"][name]["properties"] for name in ("TrainConfig", "ModelConfig"))
    assert train["method"]["enum"] == registry.names(adapters)
    assert train["launcher"]["enum"] == registry.names(launchers)
    assert model["template"]["anyOf"][0]["enum"] == ["own", *registry.names(templates)]
    assert [one["title"] for one in train["epochs"]["anyOf"]] == ["number", "not set"]
    fields = [field for kind in SCHEMA["definitions"].values() for field in kind["properties"].values()]
    described = [field for field in fields if field.get("description") or "$ref" in field]
    assert len(fields) > 100 and described == fields
    assert all(field.get("description") for field in SCHEMA["properties"].values())


def test_a_word_that_only_the_run_can_judge_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nope.*qwen3_tiny_full_openai"):
        recipe_of_today("nope", (), Store(tmp_path))
    with pytest.raises(RecipeError, match="'lroa' is not one of the adapters: full, lora, qlora"):
        check(recipe_of_today(TINY, ["train.method=lroa"], Store(tmp_path)))


def test_changes_of_a_whole_recipe_are_those_of_a_file(tmp_path: Path) -> None:
    changes = ["train.epochs=2", "chat.count=3"]
    written = load_recipe(TINY)
    assert recipe_of_today(written, changes, Store(tmp_path)) == load_recipe(TINY, changes)
    assert recipe_of_today(written, (), Store(tmp_path)) == written
