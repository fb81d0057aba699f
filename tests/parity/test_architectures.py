"""Every architecture of the field: our packed step against transformers' own eager attention and loss on each document alone.

A new architecture is a line in `ARCHITECTURES`; what cannot be trained is one in `REFUSED`, with the reason.
`python tests/parity/test_architectures.py` prints the table of docs/architectures.md.
"""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.data.loader import IGNORE, Batch
from xtuner_core.errors import RecipeError
from xtuner_core.loss import packed_loss, require_packable
from xtuner_core.models import attention

TOLERANCE = 1e-5
VOCABULARY = 128
LENGTHS = (23, 5, 40, 12)
WINDOW = 9
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention far from uniform
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT = {  # the attention of DeepSeek V2 and later: keys wider than values
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, **MIXTURE},
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "mixtral": {"model_type": "mixtral", **MIXTURE},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        **ALTERNATING,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 16, **ALTERNATING},
    "internlm2": {  # its fused projection, split into llama's three
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    },
    "internlm2.5": {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e7, "factor": 2.5}},
    "internlm3": {"model_type": "internlm3", "head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e7, "factor": 6.0}},
    "phi": {"model_type": "phi", "num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW},
    "gpt_oss": {"model_type": "gpt_oss", "head_dim": 8, **MIXTURE, **ALTERNATING},
    "deepseek_v3": {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, **LATENT},
    "kimi_k2": {  # DeepSeek V3 without groups of experts, with its own scaling of positions and of the experts' sum
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "rope_parameters": YARN,
        "rms_norm_eps": 1e-6,
        **LATENT,
    },
    "glm": {"model_type": "glm", "head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"model_type": "glm4", "head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4_moe": {"model_type": "glm4_moe", "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "use_qk_norm": True, **MIXTURE},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
    },
    "granitemoe": {"model_type": "granitemoe", "logits_scaling": 6.0, **MIXTURE},
    "cohere": {"model_type": "cohere", "logit_scale": 0.0625, "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", "head_dim": 8, "logit_scale": 0.25, **ALTERNATING},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 16, **MIXTURE},
    "deepseek_v2": {"model_type": "deepseek_v2", "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, **LATENT},
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, **LATENT},
    "minicpm3": {"model_type": "minicpm3", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, **LATENT},
    "minimax_m2": {"model_type": "minimax_m2", "head_dim": 8, **MIXTURE},
    "ministral3": {"model_type": "ministral3", "head_dim": 8},
    "mimo_v2_flash": {"model_type": "mimo_v2_flash", "head_dim": 8, "v_head_dim": 8, **MIXTURE, **ALTERNATING},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", **ALTERNATING},
    "exaone4": {"model_type": "exaone4", **ALTERNATING},
    "ernie4_5": {"model_type": "ernie4_5"},
    "ernie4_5_moe": {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, **MIXTURE},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 8},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": {"model_type": "smollm3"},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def build(values: dict[str, Any], implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, **values})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    for parameter in model.parameters():  # sinks and biases too, which some models leave at zero or uninitialised
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def documents(shared: int) -> list[tuple[torch.Tensor, int]]:
    """Token ids, and how many of them are the prompt; all begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(1)
    beginning = torch.randint(VOCABULARY, (shared,), generator=generator)
    own = [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return [(torch.cat([beginning, ids]), shared + len(ids) // 3) for ids in own]


def pack(rows: list[tuple[torch.Tensor, int]], shared: int) -> Batch:
    labels = [torch.cat([ids[1:], ids[:1]]).index_fill(0, torch.tensor([*range(prompt - 1), len(ids) - 1]), IGNORE) for ids, prompt in rows]
    bounds = list(accumulate((len(ids) - shared for ids, _ in rows), initial=shared))
    places = [torch.arange(len(ids)) for ids, _ in rows]

    def behind(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([values[0][:shared], *(value[shared:] for value in values)])[None]

    return Batch(
        input_ids=behind([ids for ids, _ in rows]),
        labels=behind(labels),
        position_ids=behind(places),
        boundaries=torch.tensor(bounds, dtype=torch.int32),
        longest=max(map(len, places)),
        documents=tuple(range(len(rows))),
        shared=shared,
        text_tokens=sum(map(len, places)),
    )


def alone(model: PreTrainedModel, rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The sum of transformers' own token losses, one document at a time."""
    total = torch.zeros(())
    for ids, prompt in rows:
        labels = ids.index_fill(0, torch.arange(prompt), IGNORE)
        total = total + model(input_ids=ids[None], labels=labels[None], use_cache=False).loss * (len(ids) - prompt)
    return total


def largest_difference(found: PreTrainedModel, expected: PreTrainedModel) -> tuple[float, str]:
    """Over all gradients, relative to each one's largest value; and where."""
    pairs = zip(expected.named_parameters(), found.parameters(), strict=True)
    return max((difference(ours.grad, own.grad), name) for (name, own), ours in pairs if own.requires_grad)


def difference(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None and expected is not None and expected.any()  # every parameter learns
    return float((found - expected).abs().max() / expected.abs().max())


def compare(name: str, shared: int) -> tuple[float, float, str]:
    """Relative difference of the losses, largest one of the gradients, and where."""
    own, ours = (build(ARCHITECTURES[name], implementation) for implementation in ("eager", attention.register()))
    require_packable(ours.eval())
    rows = documents(shared)
    found, expected = packed_loss(ours.train(), pack(rows, shared), chunk=16), alone(own.train(), rows)
    found.backward()
    expected.backward()
    return abs(found.item() / expected.item() - 1), *largest_difference(ours, own)


@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_step_equals_the_documents_alone(name: str, shared: int) -> None:
    loss, gradients, where = compare(name, shared)
    assert loss <= TOLERANCE
    assert gradients <= TOLERANCE, where


def test_the_documentation_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(.+?)`", page, re.MULTILINE) == [*ARCHITECTURES]


REFUSED = {
    "bamba": (
        {"model_type": "bamba", "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
        "carries state from one packed document to the next",
    ),
    "lfm2": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "carries state"),
    "mamba": ({"model_type": "mamba"}, "carries state"),
    "bloom": ({"model_type": "bloom"}, "carries state"),  # ALiBi counts its distances from the beginning of the row
    "qwen3_next": (
        {
            "model_type": "qwen3_next",
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            **MIXTURE,
        },
        "carries state from one packed document to the next",
    ),
    "stablelm": ({"model_type": "stablelm"}, "cannot run on packed documents: .* needs to know the documents"),
    "hyperclovax": ({"model_type": "hyperclovax", "logits_scaling": 2.0}, "changes its logits after the head"),
    "bert": ({"model_type": "bert-generation", "is_decoder": False}, "needs is_causal=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packing_would_falsify_is_refused(name: str) -> None:
    values, reason = REFUSED[name]
    model = build(values, attention.register())
    with pytest.raises(RecipeError, match=reason):
        require_packable(model.eval())


ROPE_BY_LENGTH = {
    "phi3": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [2.0, 4.0, 8.0, 16.0],
            "original_max_position_embeddings": 32,
        },
    },
    "internlm2": {**ARCHITECTURES["internlm2"], "max_position_embeddings": 32},
}


@pytest.mark.parametrize("name", ROPE_BY_LENGTH)
def test_positions_scaled_by_length_follow_the_longest_document_of_the_row(name: str) -> None:
    """Equal while no document, or every one, is longer than the original context; else the short ones get the positions of a long one."""
    own, ours = (build(ROPE_BY_LENGTH[name], implementation) for implementation in ("eager", attention.register()))
    rows = [(torch.arange(length), 2) for length in (20, 40)]
    for part, same in ((rows[:1], True), (rows[1:], True), (rows, False)):
        found, expected = packed_loss(ours, pack(part, 0), 16).item(), alone(own, part).item()
        assert (abs(found / expected - 1) <= TOLERANCE) is same


if __name__ == "__main__":
    for name in ARCHITECTURES:
        (loss, gradients, _), (shared_loss, shared_gradients, _) = (compare(name, shared) for shared in (0, 7))
        print(f"| `{name}` | {max(loss, shared_loss):.0e} | {max(gradients, shared_gradients):.0e} |")
