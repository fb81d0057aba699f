"""What makes a file settled, and what makes the same data the same."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flows.new_data import key_of_data, unsettled
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe

TINY = load_recipe("qwen3_tiny_full_openai")


def test_a_file_that_a_copying_program_gave_an_old_time_is_not_settled(tmp_path: Path) -> None:
    (tmp_path / "copied.jsonl").write_text("{}")
    os.utime(tmp_path / "copied.jsonl", (0, 0))
    assert unsettled([tmp_path / "copied.jsonl"], 60, time.time()) == [tmp_path / "copied.jsonl"]
    assert unsettled([tmp_path / "copied.jsonl"], 60, time.time() + 61) == []
    assert unsettled([tmp_path / "copied.jsonl"], 0, time.time() + 1) == []


def test_the_key_knows_recipe_store_and_content_and_not_the_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = key_of_data(TINY, store, ["a", "b"])
    assert key == key_of_data(TINY, store, ["b", "a"])
    others = [key_of_data(TINY, store, ["a"]), key_of_data(TINY, Store(tmp_path / "other"), ["a", "b"])]
    others.append(key_of_data(TINY.model_copy(update={"name": "other"}), store, ["a", "b"]))
    assert len({key, *others}) == 4
