"""A folder that transformers 5 wrote, and one that convert wrote, is the same model in OpenCompass' transformers 4, and servers read it."""

from __future__ import annotations

import json
import shutil
import subprocess
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IDS, MESSAGES, Reading
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipelines.environments import ensure
from xtuner_core.checkpoint.hf import complete_generation_config, copy_texts, eos_ids, header, make_portable, save_model, weight_files
from xtuner_core.data.byte_tokenizer import write_byte_tokenizer
from xtuner_core.data.tokenize import load_tokenizer
from xtuner_core.export.checkpoint import open_model, to_hugging_face
from xtuner_core.export.tensors import Lazy, write_folder
from xtuner_core.export.verify import logits

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
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "rope_parameters": PLAIN_ROPE},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "yarn": {"model_type": "qwen3", "rope_parameters": YARN_ROPE, "tie_word_embeddings": True},
    "dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "mixture": {"model_type": "qwen3_moe", "rope_parameters": PLAIN_ROPE, **EXPERTS},
    "phi3": {"model_type": "phi3", "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}},
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_parameters": GEMMA3_ROPE,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
TIED = ("yarn", "gemma3")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def write_base(name: str, folder: Path) -> Path:
    """As transformers 5 writes a random model and its tokenizer."""
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **CONFIGS[name]})), folder)
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


def tuned(base: Path) -> dict[str, Lazy]:
    """What training might make of a model: every weight moved."""
    return {name: Lazy.of(1.05 * lazy.read().float()) for name, lazy in open_model(base).items()}


def export(base: Path, folder: Path) -> Path:
    """As the convert stage writes a tuned model; every other one in shards."""
    folder.mkdir()
    shard = "50KB" if list(CONFIGS).index(base.name) % 2 else "5GB"
    write_folder(to_hugging_face(base, tuned(base)), folder, shard)
    copy_texts(base, folder, "float32")
    complete_generation_config(folder, [load_tokenizer(folder).control["<|im_end|>"]])
    return folder


@dataclass(frozen=True, slots=True)
class Read:
    """A folder that transformers 5 wrote, before and after the fixes, and without those of the rope; and the export of a tuned model."""

    before: Reading
    after: Reading
    four: Reading
    rope_lost: Reading
    export: Path
    exported: Reading
    exported_four: Reading
    streamed: np.ndarray


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, transformers5: Any, transformers4: Any) -> dict[str, Read]:
    root, out = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("exports")
    folders = [write_base(name, root / name) for name in CONFIGS]
    before = transformers5(folders, "float32")
    for folder in folders:
        make_portable(folder)
    exports = [export(folder, out / folder.name) for folder in folders]
    after, exported = transformers5(folders, "float32"), transformers5(exports, "float32")
    fours = transformers4([*folders, *map(without_rope_fixes, folders), *exports], "float32")
    four, lost, exported_four = (fours[start : start + len(folders)] for start in range(0, len(fours), len(folders)))
    streamed = [logits(folder, tuned(folder), [IDS])[0][None].numpy() for folder in folders]
    columns = zip(before, after, four, lost, exports, exported, exported_four, streamed, strict=True)
    return dict(zip(CONFIGS, (Read(*row) for row in columns), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_versions_read_the_same_model(name: str, read: dict[str, Read]) -> None:
    one = read[name]
    assert one.before.difference(one.after) == 0
    assert one.after.difference(one.four) <= 1e-5
    assert one.before.text == one.after.text == one.four.text
    assert one.before.chat == one.after.chat == one.four.chat
    assert one.after.difference(one.rope_lost) > 1e-2, "the fixes are not needed any more, or this test cannot see them"


@pytest.mark.parametrize("name", CONFIGS)
def test_both_versions_read_the_tuned_model_from_its_export(name: str, read: dict[str, Read]) -> None:
    one = read[name]
    assert abs(one.exported.logits - one.streamed).max() <= 1e-6 * abs(one.streamed).max()
    assert one.exported.difference(one.exported_four) <= 1e-5
    assert one.exported.difference(one.after) > 1e-2, "it must be another model than the base"
    assert one.exported.chat == one.exported_four.chat == one.after.chat
    shards = len(list(one.export.glob("*.safetensors")))
    assert (shards > 1) == (one.export / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_finds_what_it_asks_for(name: str, read: dict[str, Read]) -> None:
    """What vllm/transformers_utils/config.py and model_arch_config_convertor.py do with transformers' own config, and need in it."""
    folder = read[name].export
    stored = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    assert stored["architectures"] and stored["torch_dtype"] == stored["dtype"] == "float32" and config.dtype == torch.float32
    rope = deepcopy(config.rope_parameters)
    config.standardize_rope_params()
    config.validate_rope()
    assert config.rope_parameters == rope and rope, "what is written for transformers 4 must not change what 5 reads"
    for scaling in rope.values() if "full_attention" in rope else [rope]:
        assert "type" not in scaling and (scaling["rope_type"] == "default" or scaling["factor"])
        assert scaling["rope_type"] != "yarn" or scaling["original_max_position_embeddings"]
    assert config.max_position_embeddings and config.num_key_value_heads and config.head_dim
    assert config.tie_word_embeddings == (name in TIED)
    held = {tensor for file in weight_files(folder) for tensor in header(file)}
    assert ("lm_head.weight" in held) == (name not in TIED)
    assert set(eos_ids(json.loads((folder / "generation_config.json").read_text()))) == {257, 260}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.eos_token_id == 257 and len(tokenizer) <= config.vocab_size


def test_lmdeploy_reads_config_tokenizer_and_template(read: dict[str, Read], tmp_path: Path) -> None:
    python = ensure("lmdeploy-without-cuda", print)
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"messages": MESSAGES}))
    command = [python, Path(__file__).with_name("read_with_lmdeploy.py"), request, *(one.export for one in read.values())]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (name, one), found in zip(read.items(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        config = AutoConfig.from_pretrained(one.export)
        assert found["known"] and found["template"] == "HFChatTemplate", name
        assert found["chat"] == one.exported.chat, name
        assert found["dtype"] == "torch.float16", "what it makes of float32"
        assert found["stops"] == [257, 260] and found["tied"] == (name in TIED), name
        sizes = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim]
        assert found["sizes"] == sizes and found["vocabulary"] == config.vocab_size, name
        assert found["rope"] == config.rope_parameters, name


def test_without_the_fixes_transformers_4_cannot_load_the_tokenizer(tmp_path: Path, transformers4: Any) -> None:
    with pytest.raises(RuntimeError, match=r"TokenizersBackend|'list' object"):
        transformers4([write_base("qwen3", tmp_path / "qwen3")], "float32")
