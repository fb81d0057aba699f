"""Weights that rank 0 reads reach every rank as they are in the file: fused experts, buffers, heads, adapters; answers are rank 0's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_core import build
from xtuner_core.config import SftConfig

SCRIPT = Path(__file__).with_name("spread_in_turn.py")
TINY = {
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
TWO_HEADS = "a config that says tied beside a file with a head of its own"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({"model_type": "qwen3_moe", "head_dim": 8, **EXPERTS}, {}),
    "deepseek_v3": ({"model_type": "deepseek_v3", **EXPERTS, **LATENT}, {"method": "lora", "lora": {"targets": ["o_proj"]}}),
    "gemma3": ({"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True}, {"freeze": ["model.layers.0.*"]}),
    "dora": ({"model_type": "llama"}, {"method": "lora", "lora": {"dora": True}, "fsdp": {"sharding_size": 1, "cpu_offload": True}}),
    TWO_HEADS: ({"model_type": "llama"}, {"freeze": ["lm_head.weight"]}),
}


@pytest.mark.slow
def test_every_rank_has_the_weights_of_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    for name, (values, train) in CASES.items():
        folder = tmp_path / name
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **values}))
        for tensor in (*model.parameters(), *(buffer for key, buffer in model.named_buffers() if key in model.state_dict())):
            torch.nn.init.normal_(tensor)
        model.config.tie_word_embeddings = model.config.tie_word_embeddings or name == TWO_HEADS
        model.save_pretrained(folder)
        config = SftConfig.model_validate(
            {"model_dir": folder, "data_dir": "-", "work_dir": "-", "train": {"global_batch_size": 2, **train}}
        )
        (tmp_path / f"{name}.json").write_text(config.model_dump_json())
        command.append(str(tmp_path / f"{name}.json"))
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same on") == 2 * len(CASES)
