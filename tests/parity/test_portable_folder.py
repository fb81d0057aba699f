"""A folder that transformers 5 wrote is the same model in the transformers 4 that OpenCompass uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from xtuner_core.checkpoint.hf import make_portable, save_model
from xtuner_core.data.byte_tokenizer import write_byte_tokenizer

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # far from uniform answers, so that a wrong position shows
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "rope_parameters": PLAIN_ROPE},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "phi3": {"model_type": "phi3", "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}},
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_parameters": GEMMA3_ROPE,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def write_folder(name: str, folder: Path) -> Path:
    """As transformers 5 writes a random model and its tokenizer."""
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL, **CONFIGS[name])), folder)
    write_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def without_rope_fixes(folder: Path) -> Path:
    """A copy that transformers 4 can load, whose config lacks the old names of the rope."""
    copy = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-rope-lost")))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in ROPE_FIELDS}))
    return copy


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory, transformers5: Any, transformers4: Any) -> dict[str, tuple[Any, ...]]:
    """Name → (transformers 5 before the fixes, 5 after, 4 after, 4 without the rope fixes)."""
    root = tmp_path_factory.mktemp("folders")
    folders = [write_folder(name, root / name) for name in CONFIGS]
    before = transformers5(folders, "float32")
    for folder in folders:
        make_portable(folder)
    after = transformers5(folders, "float32")
    four = transformers4([*folders, *map(without_rope_fixes, folders)], "float32")
    return dict(zip(CONFIGS, zip(before, after, four[: len(folders)], four[len(folders) :], strict=True), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_versions_read_the_same_model(name: str, readings: dict[str, tuple[Any, ...]]) -> None:
    before, after, four, rope_lost = readings[name]
    assert before.difference(after) == 0
    assert after.difference(four) <= 1e-5
    assert before.text == after.text == four.text
    assert before.chat == after.chat == four.chat
    assert after.difference(rope_lost) > 1e-2, "the fixes are not needed any more, or this test cannot see them"


def test_without_the_fixes_transformers_4_cannot_load_the_tokenizer(tmp_path: Path, transformers4: Any) -> None:
    with pytest.raises(RuntimeError, match=r"TokenizersBackend|'list' object"):
        transformers4([write_folder("qwen3", tmp_path / "qwen3")], "float32")
