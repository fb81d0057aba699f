"""Activation checkpointing of decoder layers (Chen et al., arXiv:1604.06174), from outside: parameters keep their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.models.layers import decoder_layers

_GROUPED = "aten::_grouped_mm"
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm", _GROUPED})
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::fwd",
}  # fmt: skip
CHEAP = 8
"""A product whose result has more than this many columns for each number that is summed up is not worth its place: a LoRA's second."""


def recompute(model: PreTrainedModel, train: TrainConfig) -> None:
    """Let the first `train.recompute_ratio` of the decoder layers keep little for the backward pass, and compute the rest again in it.

    Random numbers are drawn again as they were, so loss and gradients are those of `recompute: none`, bit for bit. A compiled layer is
    left as it is by `selective`: that choice is what the compiler makes by itself.
    """
    if train.recompute == "none" or (train.recompute == "selective" and train.compile):
        return
    layers = decoder_layers(model)
    for layer in layers[: int(len(layers) * train.recompute_ratio)]:
        options = {"context_fn": partial(_contexts, _kept_products(layer))} if train.recompute == "selective" else {}
        layer.forward = _checkpointed(layer.forward, **options)


def _checkpointed(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """In the place of the layer's `forward` and not around its call, so that FSDP's hooks run once."""

    @wraps(forward)
    def checkpointed(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **options, **named)

    return checkpointed


def _kept_products(layer: torch.nn.Module) -> frozenset[str]:
    """transformers adds the biases of experts (gpt_oss) to their product in place, so that it cannot be kept."""
    biased = any(getattr(module, "has_bias", False) for module in layer.modules())
    return _PRODUCTS - {_GROUPED} if biased else _PRODUCTS


def _contexts(products: frozenset[str]) -> Any:
    """Keep what takes long to compute: results of attention and of matrix products, after torchtitan
    (torchtitan/distributed/activation_checkpoint.py); but where it passes over every second product, this one looks at their shapes.
    """

    def policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
        kept = name in _ATTENTION or (name in products and is_dear(arguments))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def is_dear(arguments: tuple[Any, ...]) -> bool:
    """Whether a product's result is worth its place; the last matrix among the arguments is the right one, `[..., summed, columns]`."""
    right = [argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.ndim >= 2][-1]
    return right.shape[-1] <= CHEAP * right.shape[-2]
