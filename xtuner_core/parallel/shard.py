"""FSDP2 from outside: layers first, then the root, with one mechanism for mixed precision at every world size."""

from __future__ import annotations

import types

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from xtuner_core.loss import packed_loss
from xtuner_core.parallel.mesh import World

_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shard(model: PreTrainedModel, world: World, dtype: str) -> None:
    """Shard every decoder layer and the rest over all ranks, in place; `model.packed_loss(batch, chunk)` becomes the forward pass.

    Compute runs in `dtype`, gradients are reduced in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=_COMPUTE[dtype], reduce_dtype=torch.float32)
    options = {"mesh": world.mesh, "mp_policy": policy, "reshard_after_forward": world.size > 1}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **{**options, "reshard_after_forward": False})
    model.packed_loss = types.MethodType(packed_loss, model)  # pyright: ignore[reportArgumentType]
    register_fsdp_forward_method(model, "packed_loss")
