"""Model folders: what is edited for older readers, and what is read from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from xtuner_core.checkpoint.hf import make_portable, missing_files, weight_files, weight_keys
from xtuner_core.errors import DataError


def written(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder / name


def portable(folder: Path, name: str, value: Any) -> Any:
    file = written(folder, name, value)
    make_portable(folder)
    once = file.read_bytes()
    make_portable(folder)
    assert file.read_bytes() == once, "not idempotent"
    return json.loads(once)


def test_rope_and_dtype_are_also_where_transformers_4_looks(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    config = portable(tmp_path, "config.json", {"dtype": "bfloat16", "rope_parameters": rope, "hidden_size": 8})
    assert config == {"dtype": "bfloat16", "torch_dtype": "bfloat16", "rope_parameters": rope, "rope_theta": 100000.0, "hidden_size": 8}


def test_a_scaled_rope_and_one_in_a_nested_config(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    text = portable(tmp_path, "config.json", {"text_config": {"rope_parameters": rope}})["text_config"]
    assert text["rope_theta"] == 500.0
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_the_number_of_experts_has_both_names(tmp_path: Path) -> None:
    assert portable(tmp_path, "config.json", {"num_local_experts": 4}) == {"num_local_experts": 4, "num_experts": 4}
    assert portable(tmp_path, "config.json", {"num_local_experts": 4, "num_experts": 8})["num_experts"] == 8


def test_a_config_of_transformers_4_keeps_its_fields(tmp_path: Path) -> None:
    config = {"rope_theta": 7.0, "rope_scaling": None, "torch_dtype": "float16"}
    assert portable(tmp_path, "config.json", config) == config


def test_tokenizer_config_loses_what_transformers_4_or_another_machine_trips_over(tmp_path: Path) -> None:
    machine = {"local_files_only": True, "is_local": True, "backend": "tokenizers"}
    before = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "eos_token": "<e>"}
    assert portable(tmp_path, "tokenizer_config.json", before | machine) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "eos_token": "<e>",
    }


def test_a_named_tokenizer_class_stays(tmp_path: Path) -> None:
    assert portable(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})["tokenizer_class"] == "Qwen2Tokenizer"


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable as JSON"):
        make_portable(tmp_path)


def write_shards(folder: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float16)}, folder / "one.safetensors")
    save_file({"b": np.zeros((), np.float32), "c": np.zeros(4, np.int64)}, folder / "two.safetensors")
    shards = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    written(folder, "model.safetensors.index.json", {"weight_map": shards})


def test_weight_keys_of_shards_and_of_a_single_file(tmp_path: Path) -> None:
    save_file({"x": np.zeros((5, 1), np.float32)}, tmp_path / "model.safetensors")
    assert weight_keys(tmp_path) == {"x": ((5, 1), "F32")}
    write_shards(tmp_path)
    assert weight_keys(tmp_path) == {"a": ((2, 3), "F16"), "b": ((), "F32"), "c": ((4,), "I64")}


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert missing_files(tmp_path) == ["config.json", "tokenizer.json", "model.safetensors"]
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert missing_files(tmp_path) == ["config.json", "tokenizer.json", "two.safetensors"]


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.safetensors: missing"):
        weight_keys(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        weight_keys(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json: not a weight index"):
        weight_files(tmp_path)
