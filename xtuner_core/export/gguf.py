"""A Hugging Face folder as a GGUF file, for llama.cpp and what is built on it (the way back: xtuner_core/models/gguf.py).

Names, fields and layouts are those of llama.cpp's convert_hf_to_gguf.py; names, quantization and the file itself come from its library
`gguf`. Only what is known to come out right is written: an architecture, a position scaling or a pre-tokenizer without a place in the
tables here is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig

from xtuner_core.checkpoint.hf import require_whole
from xtuner_core.durable import drafted
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.gguf_vocabulary import add_vocabulary
from xtuner_core.export.tensors import Lazy, Tensors, open_folder
from xtuner_core.models.check import is_finite, require_own_tensors, some
from xtuner_core.models.gguf_config import SLOWED, head_size, llama3_factors
from xtuner_core.progress import shown

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
"""model_type → llama.cpp's name."""
TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32), "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16), "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1), "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1), "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}  # fmt: skip
"""The types that the library can write."""
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def export_gguf(folder: Path, target: Path, kind: str) -> None:
    """Write the model in `folder` as the file `target`, its matrices as `kind` (a key of TYPES), one tensor in memory at a time.

    Vectors and a router's weights stay float32; rows that no block of a quantized type fits are float16.

    Raises:
        RecipeError: `folder` is no model that can be written, or something is at `target`.
        DataError: its weights are damaged, not those of its config, or too large for float16.
    """
    config = _config(folder)
    require_whole(folder)
    require_own_tensors(folder)
    with drafted(target) as draft:
        writer = gguf.GGUFWriter(draft, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
        try:
            _add_fields(writer, config, target.stem, TYPES[kind][1])
            add_vocabulary(writer, folder, config.vocab_size)
            _write(writer, dict(_named(open_folder(folder), config)), TYPES[kind][0])
        finally:
            writer.close()


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder}: no model folder: {next(iter(str(error).splitlines()), '')}") from None
    refused = [
        (config.model_type not in ARCHITECTURES, f"its architecture is {config.model_type}; known: {', '.join(ARCHITECTURES)}"),
        (getattr(config, "quantization_config", None), "it is quantized; name the model it was made from"),
        (getattr(config, "use_sliding_window", False), "it has sliding window attention"),
        (getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1, "not all its layers have experts"),
    ]
    for wrong, reason in refused:
        if wrong:
            raise RecipeError(f"{folder}: cannot be written as GGUF: {reason}.")
    return config


# Fields -----------------------------------------------------------------------------------------------------------------------------


def _add_fields(writer: gguf.GGUFWriter, config: Any, name: str, file_type: int) -> None:
    size = head_size(config)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_positions(writer, config, size)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


_ROPE = (
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip
_NEUTRAL = {"partial_rotary_factor": 1.0, "truncate": True}


def _add_positions(writer: gguf.GGUFWriter, config: Any, size: int) -> None:
    """Rotary embedding; llama 3's scaling is a tensor, see `_named`."""
    rope = config.rope_parameters
    if odd := [f"{name} = {value}" for name, value in rope.items() if name not in _ROPE and value not in (None, _NEUTRAL.get(name))]:
        raise RecipeError(f"cannot be written as GGUF: there is no place for the positions' {', '.join(odd)}.")
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "default" | "llama3":
            pass
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
            writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
            writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
        case other:
            raise RecipeError(f"cannot be written as GGUF: rope_type {other}; known: default, linear, yarn, llama3.")


# Tensors ----------------------------------------------------------------------------------------------------------------------------


def _named(tensors: Tensors, config: Any) -> Iterator[tuple[str, Lazy]]:
    """Under GGUF's names and in its layout."""
    if config.rope_parameters.get("rope_type") == "llama3":
        yield SLOWED, Lazy.of(llama3_factors(config))
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    unknown = []
    for name, tensor in _stacked(tensors).items():
        if found := names.get_name(name, try_suffixes=(".weight", ".bias")):
            yield found, _permuted(tensor, _rotated_heads(name, config))
        else:
            unknown.append(name)
    if unknown:
        raise RecipeError(f"cannot be written as GGUF: these tensors have no name there: {some(unknown)}.")


def _rotated_heads(name: str, config: Any) -> int:
    """The heads of a projection whose rows llama.cpp rotates in neighbouring pairs (llama alone); 0 for all else."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0) if config.model_type == "llama" else 0


def _permuted(tensor: Lazy, heads: int) -> Lazy:
    """A head's rows i and i + half become neighbours; as they are for 0 heads."""
    if not heads:
        return tensor

    def read() -> torch.Tensor:
        rows = tensor.read()
        return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return Lazy(tensor.shape, tensor.dtype, read)


def _stacked(tensors: Tensors) -> dict[str, Lazy]:
    """Experts of a layer as one tensor `[experts, out, in]`."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if not (expert := _EXPERT.fullmatch(name)):
            found[name] = tensor
        elif expert[2] == "0":
            names = _experts(tensors, expert)
            found[f"{expert[1]}.{expert[3]}_proj.weight"] = Lazy(
                (len(names), *tensor.shape), tensor.dtype, lambda names=names: torch.stack([tensors[one].read() for one in names])
            )
    return found


def _experts(tensors: Tensors, expert: re.Match[str]) -> list[str]:
    names = (f"{expert[1]}.{number}.{expert[3]}_proj.weight" for number in range(len(tensors)))
    return [name for name in names if name in tensors]


def _write(writer: gguf.GGUFWriter, tensors: Tensors, kind: Type) -> None:
    kinds = {name: _kind(name, tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with shown(sum(tensor.bytes for tensor in tensors.values())) as wrote:
        for name, tensor in tensors.items():
            writer.write_tensor_data(_bytes(name, tensor.read(), kinds[name]))
            wrote(tensor.bytes)


def _kind(name: str, tensor: Lazy, kind: Type) -> Type:
    if len(tensor.shape) == 1 or "ffn_gate_inp" in name:
        return Type.F32
    return kind if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def _bytes(name: str, tensor: torch.Tensor, kind: Type) -> Any:
    if kind not in _PLAIN:
        return gguf.quantize(tensor.float().numpy(), kind)
    rounded = tensor.to(_PLAIN[kind]).contiguous()
    if not is_finite(rounded):
        raise DataError(f"{name}: holds numbers that are not finite as {kind.name}. Write it as bf16 or f32.")
    return rounded.view(torch.uint8).numpy()
