"""LoRA beside a base in 4-bit NormalFloat with double quantization (QLoRA, Dettmers et al., arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import Linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from xtuner_core.adapters import lora
from xtuner_core.config import TrainConfig
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError
from xtuner_core.export.tensors import Lazy, Tensors
from xtuner_core.models.precision import COMPUTE

READ_BY_ALL = True
"""Weights are quantized as they are read, which leaves a quarter of them; their constants are no parameters that could be spread."""


QUANTIZED_BASE = "quantized_base.json"
"""In an adapter's folder: the base as the adapter was trained beside it. Other readers know nothing of the file and pass it over."""


def load(model_dir: Path, train: TrainConfig, **options: Any) -> PreTrainedModel:
    """Quantize all linear layers but the head as they are read; the rest is kept in the precision it computes in.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    Linear4bit = _bitsandbytes().nn.Linear4bit
    dtype = COMPUTE[train.dtype]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # before torch 2.13 FSDP2 would cast packed bytes to the compute precision as if they were numbers
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, quantization_config=nf4, **options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Or a forward pass in evaluation mode on a CPU with AVX512-BF16 puts the weights into another layout for good,
            # and in the training that follows no gradient passes through them.
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
    return model


def _bitsandbytes() -> ModuleType:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise RecipeError(f'train.method qlora needs bitsandbytes ({error}): pip install "xtuner-pipeline[qlora]".') from None


def prepare(model: PreTrainedModel, train: TrainConfig, seed: int) -> None:
    """Freeze the model and add adapters (RecipeError: a target name matches nothing)."""
    lora.add_lora(model, train.lora, seed)


def save_adapter(tensors: Tensors, train: TrainConfig, base: str, folder: Path) -> None:
    """Write trained adapter tensors as a folder that peft loads, and in a file of its own beside which base they were trained."""
    lora.save_adapter(tensors, train, base, folder)
    write_json(folder / QUANTIZED_BASE, {"quantization": "nf4", "double_quantization": True, "dtype": str(COMPUTE[train.dtype])[6:]})


def as_quantized(base: Tensors, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Lazy]:
    """The weights of the base as `load` makes them of `base` for a run in `dtype`: linear layers as what their 4 bits stand for.

    `model` has the base's layers, if need be without numbers (RecipeError: bitsandbytes is not installed).
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    spared = get_keys_to_not_convert(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is Linear and should_convert_module(name, spared)}
    rounded = {name: tensor.to(dtype) if tensor.dtype.is_floating_point else tensor for name, tensor in base.items()}
    return {name: _there_and_back(tensor) if name in linear else tensor for name, tensor in rounded.items()}


def _there_and_back(weight: Lazy) -> Lazy:
    bitsandbytes = _bitsandbytes()

    def read() -> torch.Tensor:
        packed = bitsandbytes.nn.Params4bit(weight.read(), requires_grad=False, quant_type="nf4", quant_storage=weight.dtype).to("cpu")
        return bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)

    return Lazy(weight.shape, weight.dtype, read)
