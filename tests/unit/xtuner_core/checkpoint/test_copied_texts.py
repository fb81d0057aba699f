"""The files beside a model's weights, given to weights that were made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xtuner_core.checkpoint.hf import copy_texts


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "text_config": {"dtype": "bfloat16"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors", "model.safetensors.index.json", "code.py"):
        (folder / name).write_text("{}")
    return folder


def test_what_describes_the_model_is_copied_and_the_type_of_its_weights_corrected(base: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "chat_template.jinja").write_text("its own")
    copy_texts(base, made, "float32")
    assert sorted(path.name for path in made.iterdir()) == ["LICENSE", "chat_template.jinja", "config.json", "tokenizer.json"]
    assert (made / "chat_template.jinja").read_text() == "its own"
    config = json.loads((made / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["text_config"] == {"dtype": "float32", "torch_dtype": "float32"}
    assert config["rope_theta"] == 1e6, "readable for transformers 4.57 as well"
