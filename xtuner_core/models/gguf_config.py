"""The config of a GGUF file's model: transformers' own reading, and what that passes over without a word.

How positions are scaled, the size of heads, of experts, and biases are taken from the file's fields and tensors, as llama.cpp reads them
(src/llama-model.cpp); where they cannot be told exactly in a config.json, the file is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig

from xtuner_core.errors import DataError

Fields = Mapping[str, Any]
PLAIN = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Models of which all is known here; of others, what is not plain is refused."""
SLOWED = "rope_freqs.weight"
"""The tensor that says by how much each frequency is slowed down."""
_OTHERS_SCALED = ("rope_factors_long.weight", "rope_factors_short.weight")
_CARRIED = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def config_of(gguf_file: Path, reader: GGUFReader) -> Any:
    """The config, complete.

    Raises:
        DataError: the file has a part of a model, or one that computes otherwise than a config.json can say.
        ValueError: transformers knows no such architecture.
    """
    every = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if (parts := every.get("split.count", 0)) > 1:
        raise DataError(f"{gguf_file}: is one of {parts} parts; put them together first: llama-gguf-split --merge FIRST_PART WHOLE_FILE.")
    config: Any = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    prefix = f"{every['general.architecture']}."
    fields = {name.removeprefix(prefix): value for name, value in every.items() if name.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        if config.model_type in PLAIN:
            _complete(config, fields, tensors)
        if rope := _scaling(fields, tensors, config):
            if config.model_type not in PLAIN:
                raise ValueError(f"for {config.model_type} the scaling of its positions ({rope['rope_type']}) is not carried over")
            config.rope_parameters = {**config.rope_parameters, **rope}
    except ValueError as error:
        raise DataError(f"{gguf_file}: cannot be imported: {error}. Take the model's original folder.") from None
    return config


def _complete(config: Any, fields: Fields, tensors: Mapping[str, Any]) -> None:
    size = fields.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, size) != size:
            raise ValueError(f"its heads have {size} numbers, but {name} is {fields[name]}")
    found = {
        "head_dim": size,
        "moe_intermediate_size": fields.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": fields.get("expert_shared_feed_forward_length"),
        "attention_bias": "blk.0.attn_q.bias" in tensors or None,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors or None,
    }
    before = {name: getattr(config, name, None) for name in found} | {"head_dim": head_size(config)}
    for name, value in found.items():
        if value is not None and before[name] is not None and value != before[name]:
            setattr(config, name, value)


# Positions --------------------------------------------------------------------------------------------------------------------------


def _scaling(fields: Fields, tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What is to be added to the config's rope parameters (ValueError: cannot be told by them)."""
    if other := [name for name in _OTHERS_SCALED if name in tensors]:
        raise ValueError(f"its positions are scaled by {' and '.join(other)}")
    slowed = torch.tensor(tensors[SLOWED].data, dtype=torch.float32) if SLOWED in tensors else torch.ones(1)
    by_fields = _by_fields({name.removeprefix("rope.scaling."): value for name, value in fields.items() if ".scaling." in name}, fields)
    if bool((slowed == 1).all()):
        return by_fields
    if by_fields:
        raise ValueError(f"its positions are scaled by {SLOWED} and by rope.scaling.type {by_fields['rope_type']} at once")
    return _llama3(slowed, config)


def _by_fields(told: Fields, fields: Fields) -> dict[str, Any]:
    factor = float(told.get("factor") or fields.get("rope.scale_linear") or 1)
    kind = told.get("type", "linear")  # llama.cpp's default
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if odd := [f"rope.scaling.{name} = {value}" for name, value in told.items() if name not in _CARRIED and value != 1]:
        raise ValueError(f"a config.json has no place for {', '.join(odd)}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"positions scaled by {kind} are not known here; known: linear, yarn, llama 3's")
    original = told.get("original_context_length") or fields["context_length"]
    betas = {name: float(told[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in told}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}


def _llama3(slowed: torch.Tensor, config: Any) -> dict[str, Any]:
    """The settings of llama 3 that give these numbers; the file itself does not tell them."""
    before = config.rope_parameters
    for original in (8192, *(1 << power for power in range(5, 21))):
        rope = {
            "rope_type": "llama3", "factor": float(slowed.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        config.rope_parameters = {**before, **rope}
        computed = llama3_factors(config)
        config.rope_parameters = before
        if computed.shape == slowed.shape and torch.allclose(computed, slowed, rtol=1e-5):
            return rope
    raise ValueError(f"{SLOWED} slows its positions down in a way that is not llama 3's")


def llama3_factors(config: Any) -> torch.Tensor:
    """By how much llama 3's scaling slows each frequency down, `[half a head]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / slowed


def head_size(config: Any) -> int:
    """Numbers of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
