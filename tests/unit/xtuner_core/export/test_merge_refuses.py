"""A merge of what does not belong together, or is damaged: one message, and nothing at the target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from xtuner_core.errors import DataError, RecipeError, UserError
from xtuner_core.export.merge import merge

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of it."""
    place = tmp_path_factory.mktemp("made")
    base(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(place / "adapter"))
    return place


def base(folder: Path, **sizes: Any) -> Path:
    AutoModelForCausalLM.from_config(Qwen2Config(**{**SIZES, **sizes})).save_pretrained(str(folder))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(place: Path, base: str = "base", **options: Any) -> UserError:
    before = set(place.rglob("*"))
    with pytest.raises(UserError) as told:
        merge(place / base, [(place / "adapter", 1.0)], place / "merged", **options)
    assert set(place.rglob("*")) == before, "nothing is left"
    return told.value


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


def with_field(place: Path, **fields: Any) -> None:
    file = place / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_without_one_of_its_tensors(place: Path) -> None:
    changed(place / "adapter" / WEIGHTS, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != FIRST})
    assert f"{FIRST} is missing" in str(refused(place))


def test_an_adapter_with_a_tensor_too_many(place: Path) -> None:
    other = FIRST.replace("q_proj", "k_proj")
    changed(place / "adapter" / WEIGHTS, lambda tensors: tensors | {other: tensors[FIRST].clone()})
    assert f"{other} has no place in this base" in str(refused(place))


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"hidden_size": 16}, f"{FIRST} is [4, 32] and should be [4, 16] for this base"),
        ({"num_hidden_layers": 1}, f"{FIRST.replace('layers.0', 'layers.1')} has no place in this base"),
        ({"num_hidden_layers": 3}, f"{FIRST.replace('layers.0', 'layers.2')} is missing"),
    ],
)
def test_an_adapter_of_another_base(place: Path, sizes: dict[str, int], told: str) -> None:
    base(place / "other", **sizes)
    assert told in str(error := refused(place, base="other")) and isinstance(error, DataError)


def test_a_number_that_is_none(place: Path) -> None:
    changed(place / "adapter" / WEIGHTS, lambda tensors: tensors | {FIRST: tensors[FIRST] * float("nan")})
    assert f"{WEIGHTS}: the tensor {FIRST} holds NaN or infinity" in str(refused(place))


def test_a_base_with_a_number_that_is_none(place: Path) -> None:
    name = "model.norm.weight"
    changed(place / "base" / "model.safetensors", lambda tensors: tensors | {name: tensors[name] * float("inf")})
    assert f"tensor {name} holds NaN or infinity" in str(refused(place))


def test_a_base_without_a_tensor_that_the_adapter_changes(place: Path) -> None:
    gone = "model.layers.0.self_attn.q_proj.weight"
    changed(place / "base" / "model.safetensors", lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone})
    assert f"tensor {gone} is missing in the base's weights" in str(refused(place))


def test_what_float16_cannot_hold(place: Path) -> None:
    changed(place / "adapter" / WEIGHTS, lambda tensors: {name: tensor + 1e4 for name, tensor in tensors.items()})
    merge(place / "base", [(place / "adapter", 1.0)], place / "whole")
    assert "tensor model.layers.0.self_attn.q_proj.weight holds NaN or infinity" in str(refused(place, dtype=torch.float16))


@pytest.mark.parametrize("file", [f"adapter/{WEIGHTS}", "base/model.safetensors"])
def test_a_truncated_file(place: Path, file: str) -> None:
    (place / file).write_bytes((place / file).read_bytes()[:-10])
    assert f"{file}: not a whole safetensors file" in str(error := refused(place)) and isinstance(error, DataError)


def test_no_adapter_and_no_weights(place: Path) -> None:
    (place / "adapter" / WEIGHTS).rename(place / "adapter" / "adapter_model.bin")
    assert "A pickle is there (adapter_model.bin), which may run code and is never opened" in str(refused(place))
    (place / "adapter" / CONFIG).unlink()
    assert "adapter_config.json is missing" in str(refused(place))
    with pytest.raises(RecipeError, match="it holds a whole model"):
        merge(place / "base", [(place / "base", 1.0)], place / "merged")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is PROMPT_TUNING; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changed the base before training"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication cannot become part of a model's weights"),
        ({"target_modules": ["wq"]}, r"Target modules {'wq'} not found in the base model"),
        ({"r": 8}, "q_proj.lora_A.weight is [4, 32] and should be [8, 32]"),
    ],
)
def test_a_config_that_is_not_for_this(place: Path, fields: dict[str, Any], told: str) -> None:
    with_field(place, **fields)
    assert told in str(refused(place))


def test_a_config_that_is_no_json(place: Path) -> None:
    (place / "adapter" / CONFIG).write_text("{")
    assert f"{CONFIG}: not readable as JSON" in str(refused(place))


def test_a_base_that_is_stored_quantized(place: Path) -> None:
    config = place / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert "its weights are stored quantized" in str(refused(place))


def test_a_target_that_is_there(place: Path) -> None:
    (place / "merged").mkdir()
    assert f"{place / 'merged'}: exists already" in str(refused(place))


def test_a_field_of_a_newer_peft_is_passed_over(place: Path) -> None:
    with_field(place, made_up=1)
    told: list[str] = []
    merge(place / "base", [(place / "adapter", 1.0)], place / "merged", say=told.append)
    assert not told
