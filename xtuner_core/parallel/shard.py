"""FSDP2 from outside: layers first, then the root, with one mechanism for mixed precision at every world size."""

from __future__ import annotations

import types
from itertools import pairwise

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.estimate import ONE_GROUP
from xtuner_core.loss import packed_loss
from xtuner_core.models.layers import decoder_layers
from xtuner_core.models.precision import COMPUTE
from xtuner_core.parallel.mesh import World, sharding_mesh


def shard(model: PreTrainedModel, world: World, train: TrainConfig) -> None:
    """Shard every decoder layer and the rest, in place, as `train.fsdp` says; `model.packed_loss(batch, chunk)` becomes the forward pass.

    Compute runs in `train.dtype`, gradients are reduced in fp32. One process has nothing to gather from others: there frozen weights,
    which are kept in the compute precision anyway, are left alone, and the rest is one group (a fifth less time for a short CPU step)
    unless it is so large that its copy and the buffers of its gradients would fill a GPU. With CPU offload the model is taken layer by
    layer all the same, or all of it would lie on the device at one time.

    Raises:
        RecipeError: the processes cannot be divided into groups of `train.fsdp.sharding_size`.
    """
    alone = world.size == 1 and not train.fsdp.cpu_offload
    policies = {
        "mesh": sharding_mesh(world, train.fsdp.sharding_size),
        "mp_policy": MixedPrecisionPolicy(param_dtype=COMPUTE[train.dtype], reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type != "cpu") if train.fsdp.cpu_offload else OffloadPolicy(),
    }
    if alone or getattr(model, "is_quantized", False):  # FSDP moves what it shards, but not a 4-bit weight's constants beside it
        model.to(world.device)  # pyright: ignore[reportArgumentType]
    policies["ignored_params"] = {parameter for parameter in model.parameters() if alone and not parameter.requires_grad}
    if not alone or model.num_parameters(only_trainable=True) > ONE_GROUP:
        _shard_layers(decoder_layers(model), train.fsdp.reshard_after_forward, **policies)
    fully_shard(model, reshard_after_forward=False, **policies)
    model.packed_loss = types.MethodType(packed_loss, model)  # pyright: ignore[reportArgumentType]
    register_fsdp_forward_method(model, "packed_loss")


def give_back(model: PreTrainedModel) -> None:
    """Free the weights that forward passes have gathered, where no backward pass follows that would: only then are parameters shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard_layers(layers: list[torch.nn.Module], reshard: bool, **policies: object) -> None:
    """The last layer is not given back after its forward pass, for its backward pass follows at once; each gathers the next one early."""
    sharded: list[FSDPModule] = [
        fully_shard(layer, reshard_after_forward=reshard and layer is not layers[-1], **policies)  # pyright: ignore
        for layer in layers
    ]
    for layer, following in pairwise(sharded):
        layer.set_modules_to_forward_prefetch([following])
