"""Weights are read by rank 0 alone and spread from there: a machine holds one copy while a run starts, not one for each process."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from xtuner_core.parallel.mesh import World, any_rank

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
Weights = dict[str, torch.Tensor]


def follow_head(model: PreTrainedModel, world: World) -> None:
    """Let every rank's head be tied to the embedding as rank 0's is, before anything is put on the model.

    If a file has two different ones, transformers keeps both, whatever the config says; an outline knows the config only.
    """
    head, embedding = cast(Any, (model.get_output_embeddings(), model.get_input_embeddings()))
    tied = getattr(head, "weight", None) is embedding.weight
    if any_rank(world.rank == 0 and not tied, world) and tied:
        head.weight = torch.nn.Parameter(torch.empty_like(embedding.weight))


def whole_weights(model: PreTrainedModel, world: World) -> Weights:
    """Rank 0's parameters before they are sharded, nothing on the others; all take over rank 0's precisions.

    transformers keeps some tensors of a file in fp32 that it would make in another precision without one.
    """
    tensors = [*model.parameters(), *model.buffers()]
    codes = torch.tensor([_DTYPES.index(tensor.dtype) for tensor in tensors])
    dist.broadcast(codes, 0)
    if world.rank == 0:
        return {name: parameter.data for name, parameter in model.named_parameters()}
    for tensor, code in zip(tensors, codes.tolist(), strict=True):
        if tensor.dtype != _DTYPES[code]:
            tensor.data = torch.empty_like(tensor, dtype=_DTYPES[code])
    return {}


@torch.no_grad()
def spread(model: PreTrainedModel, weights: Weights, world: World) -> None:
    """Give every rank its shard of rank 0's parameters, one parameter at a time, and all of rank 0's buffers; empties `weights`."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        whole = weights.pop(name).to(world.device).contiguous() if world.rank == 0 else empty
        dist.broadcast(whole, 0)
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
