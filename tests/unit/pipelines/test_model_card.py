"""Model cards: a header that the Hub's own reader takes, and nothing in the data that could become something else than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData, metadata_load

from pipelines.model_card import card, deciding, plain
from pipelines.recipe import load_recipe

RECIPE = load_recipe("qwen3_tiny_full_openai", ["model.base=/home/me/models/base-1b", "data.train=/secret/place/chats.jsonl"])
FACTS: dict[str, Any] = {
    "base": "base-1b",
    "license": "apache-2.0",
    "relation": "finetune",
    "dtype": "bfloat16",
    "tensors": 12,
    "parameters": 1234,
    "checks": {"next-token choices kept in bfloat16": "100%"},
    "data": [{"file": "chats.jsonl", "sha256": "ab" * 32}],
    "counts": {"documents": 96, "tokens": 18965},
    "training": {"steps": 40, "last_loss": 1.23456789, "validation_loss": 2.5},
}
SCORES: dict[str, Any] = {
    "confidence": 0.95,
    "datasets": {
        "tickets": {
            "metric": "accuracy",
            "unit": "%",
            "higher_is_better": True,
            "values": {"base": 1.25, "tuned": 100.0},
            "differences": {"base": {"value": 98.75, "low": 95.0, "high": 100.0, "no_interval": None}},
        }
    },
}


def header(text: str, folder: Path) -> dict[str, Any]:
    (folder / "README.md").write_bytes(text.encode())
    fields = metadata_load(folder / "README.md")
    assert fields == yaml.safe_load(text.split("---\n")[1])
    return dict(fields or {})


def test_the_header_is_the_hub_s(tmp_path: Path) -> None:
    fields = header(card(RECIPE, FACTS), tmp_path)
    assert fields == {
        "base_model": "base-1b",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xtuner", "full"],
    }
    assert "license" not in header(card(RECIPE, {**FACTS, "license": None}), tmp_path)
    adapter = header(card(RECIPE, {**FACTS, "relation": "adapter"}), tmp_path)
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")


def test_scores_become_the_hub_s_results(tmp_path: Path) -> None:
    text = card(RECIPE, FACTS, SCORES)
    data = ModelCardData(**header(text, tmp_path))
    (result,) = data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("tickets", "accuracy", 100.0)
    assert data.model_name == RECIPE.name
    assert "## Scores" in text and "## Scores" not in card(RECIPE, FACTS)


def test_the_body_tells_what_was_done_and_no_place_of_this_machine() -> None:
    text = card(RECIPE, FACTS)
    for told in ("ab" * 32, "documents: 96", "last loss: 1.235", "validation loss: 2.5", "100%", "total_step: 40", "lmdeploy", "vllm"):
        assert told in text, told
    assert "/home/me" not in text and "/secret" not in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == deciding(RECIPE)


@pytest.mark.parametrize("name", ["a|b.jsonl", "<script>x</script>.jsonl", "[x](http://y).jsonl", "a\n# b.jsonl", "`x`.jsonl"])
def test_a_file_s_name_stays_text(name: str) -> None:
    text = card(RECIPE, {**FACTS, "data": [{"file": name, "sha256": "cd" * 32}]})
    (row,) = [line for line in text.splitlines() if "cd" * 32 in line]
    assert row == f"| {plain(name)} | {'cd' * 32} |"
    bare = plain(name).replace("\\\\", "")
    assert all(bare[place - 1] == "\\" for place, letter in enumerate(bare) if letter in "|<>[]`#")


def test_a_base_s_name_cannot_leave_its_field(tmp_path: Path) -> None:
    name = "x\n---\nlicense: mit: [\n"
    (tmp_path / "README.md").write_bytes(card(RECIPE, {**FACTS, "base": name}).encode())
    assert (metadata_load(tmp_path / "README.md") or {})["base_model"] == name
