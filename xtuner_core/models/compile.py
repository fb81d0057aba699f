"""Regional compilation: each decoder layer by torch.compile, from outside."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.models.layers import decoder_layers

KINDS = 64
"""Variants of a layer's code that may be compiled: kinds of layers (window, experts), each for training and for measuring."""


def compile_layers(model: PreTrainedModel, train: TrainConfig, device: torch.device) -> None:
    """Compile the layers' `forward` for any number of tokens, if `train.compile`; layers of one kind share the compiled code.

    The attention function stays outside (`torch.compiler.disable`), so a layer is compiled in two pieces around it. Hence activation
    checkpointing goes around the compiled layer: inside, torch cannot trace it over the gap, and silently compiles nothing at all.

    Raises:
        RecipeError: there is no compiler for the device.
    """
    if not train.compile:
        return
    _require_compiler(device)
    torch._dynamo.config.recompile_limit = KINDS
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _require_compiler(device: torch.device) -> None:
    """torch would say so too, but within the first step and in a hundred lines."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise RecipeError("train.compile needs a C++ compiler on a CPU: install g++ (or set CXX), or leave it out.") from None
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RecipeError("train.compile needs Triton on a GPU: pip install triton, or leave it out.")
