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

    Compute runs in `dtype`, gradients are reduced in fp32. One process has nothing to gather layer by layer: there the model is one
    group, without its frozen weights, which are kept in the compute precision anyway (a fifth less time for a short CPU step).
    """
    policy = MixedPrecisionPolicy(param_dtype=_COMPUTE[dtype], reduce_dtype=torch.float32)
    alone = world.size == 1
    for layer in [] if alone else model.model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    frozen = {parameter for parameter in model.parameters() if alone and not parameter.requires_grad}
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
    model.packed_loss = types.MethodType(packed_loss, model)  # pyright: ignore[reportArgumentType]
    register_fsdp_forward_method(model, "packed_loss")
