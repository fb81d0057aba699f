"""What the key of the stage convert knows: what decides its bytes, the card's among them, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines import convert
from pipelines.model_card import card
from pipelines.recipe import load_recipe

RECIPE = "qwen3_tiny_full_openai"
FACTS: dict[str, Any] = {
    "base": "base-1b", "license": None, "relation": "finetune", "dtype": "bfloat16", "tensors": 1, "parameters": 1, "checks": {},
    "data": [], "counts": {}, "training": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "name=another", "description=another", "eval.limit=1", "eval.confidence=0.9", "chat.max_tokens=9", "data.workers=1",
        "data.max_rejected=0.5", "train.checkpoint_keep=9", "train.trackers=[tensorboard]",
    ],
)  # fmt: skip
def test_what_does_not_decide_the_weights_changes_neither_key_nor_card(change: str) -> None:
    plain, changed = load_recipe(RECIPE), load_recipe(RECIPE, [change])
    assert changed != plain
    assert convert.STAGE.settings(changed) == convert.STAGE.settings(plain)
    assert convert.STAGE.files(changed) == convert.STAGE.files(plain) == []
    assert card(changed, FACTS) == card(plain, FACTS)


@pytest.mark.parametrize(
    "change", ["convert.dtype=float32", "convert.max_shard_size=1GB", "train.lora.alpha=7", "seed=7", "data.loss=last"]
)
def test_what_decides_them_changes_both(change: str) -> None:
    plain, changed = load_recipe(RECIPE), load_recipe(RECIPE, [change])
    assert convert.STAGE.settings(changed) != convert.STAGE.settings(plain)
    assert card(changed, FACTS) != card(plain, FACTS)


def test_the_verdict_s_card_has_the_recipe_s_name_and_description() -> None:
    recipe = load_recipe(RECIPE, ["name=night-run", "description=For tickets."])
    assert "night-run" not in card(recipe, FACTS) and "For tickets" not in card(recipe, FACTS)
    scores = {"confidence": 0.95, "datasets": {}}
    text = card(recipe, FACTS, scores)
    assert "# night-run" in text and "For tickets." in text and "name: night-run" in text
