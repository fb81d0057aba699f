"""Tiny models of each kind of attention, with transformers' eager attention and with ours, and packed rows for them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.models import attention
from xtuner_core.models.documents import Documents

VOCABULARY = 97
LENGTHS = [1, 40, 7, 1, 10, 64, 23, 5]  # one just over the window of 9
TOLERANCE = 1e-5
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # attention far from uniform; at 0.3 the fp32 rounding of eager itself reaches 1e-5 (against fp64)
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 9},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,  # a scaling that is not 1 / sqrt(head_dim)
    },
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,  # of one, the router would have no gradient but rounding
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def models(name: str, known: dict[str, dict[str, Any]] = MODELS) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random weights with eager attention and with ours."""
    torch.manual_seed(0)
    eager, packed = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**SMALL, **known[name]}), attn_implementation=implementation, dtype=torch.float32
        )
        for implementation in ("eager", attention.register())
    )
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    packed.load_state_dict(eager.state_dict())
    return eager, packed


def documents(lengths: list[int], shared: int = 0) -> Documents:
    return Documents(tuple(accumulate(lengths, initial=shared)))


def packing(lengths: list[int]) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"position_ids": positions, "use_cache": False, "documents": documents(lengths)}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
