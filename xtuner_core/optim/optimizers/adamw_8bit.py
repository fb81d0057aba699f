"""AdamW whose two moments of each matrix take one byte a number instead of four.

Block-wise dynamic quantization (Dettmers et al., arXiv:2110.02861): a block of 256 numbers of a row has one scale, its largest
magnitude, and each number is the nearest of 256 values that are dense where numbers usually lie. As a change to the paper the root of
the second moment is stored, so that twice as many orders of magnitude fit and none becomes zero beside a momentum that is not.

It is written here because bitsandbytes refuses sharded tensors (DTensor), and torchao keeps tensor subclasses that no safetensors file
can hold. A block never crosses a row, and FSDP shards by row: codes and scales are plain sharded tensors, a checkpoint of any number
of processes fits any other, and the numbers are the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizers._groups import decay_groups
from xtuner_core.optim.optimizers._own_rule import OwnRule
from xtuner_core.optim.optimizers._rounding import in_fp32

BLOCK = 256
SMALLEST = 4096
"""Matrices with fewer numbers keep moments of four bytes: there is little to save."""
AT_ONCE = 2**24
"""Numbers of a matrix that are worked on together; bounds the memory for intermediate results."""


def make(model: torch.nn.Module, train: TrainConfig) -> AdamW8bit:
    """Quantized moments for matrices, those of vectors and small matrices stay as they are."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    large = [parameter for parameter in trainable if parameter.ndim >= 2 and parameter.numel() >= SMALLEST]
    taken = {id(parameter) for parameter in large}
    rest = decay_groups((parameter for parameter in trainable if id(parameter) not in taken), train.weight_decay)
    quantized = [{"params": large, "weight_decay": train.weight_decay, "own_rule": True, "fused": False}] if large else []
    return AdamW8bit([*quantized, *rest], lr=train.lr, betas=train.betas, fused=True)


class AdamW8bit(OwnRule):
    """State of a quantized parameter: `step`, and `codes` and `scales` of `exp_avg` and of the root of `exp_avg_sq`."""

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """AdamW's update with the exact new moments, which are quantized afterwards."""
        if not state:
            state |= {"step": torch.tensor(0.0)}
            state |= {f"{moment}_codes": torch.zeros_like(parameter, dtype=torch.uint8) for moment in ("exp_avg", "root")}
            state |= {f"{moment}_scales": _zero_scales(parameter) for moment in ("exp_avg", "root")}
        state["step"] += 1
        names = ("exp_avg_codes", "exp_avg_scales", "root_codes", "root_scales")
        for rows in _slices(parameter, gradient, *(state[name] for name in names)):
            _update_rows(*rows, step=state["step"].item(), group=group)


def _zero_scales(parameter: torch.Tensor) -> torch.Tensor:
    """fp32 `[rows, blocks]`, sharded as the parameter."""
    blocks = -(-parameter[0].numel() // BLOCK)
    if not isinstance(parameter, DTensor):
        return torch.zeros(len(parameter), blocks, device=parameter.device)
    local = torch.zeros(len(parameter.to_local()), blocks, device=parameter.device)
    shape = torch.Size((len(parameter), blocks))
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(blocks, 1))


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """This rank's rows of all tensors, `[rows, columns]`, a part after the other; changing them changes the tensors."""
    local = [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten(1) for tensor in tensors]
    yield from zip(*(tensor.split(max(1, AT_ONCE // max(1, local[0].shape[1]))) for tensor in local), strict=True)


def _update_rows(
    parameter: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, root_codes: torch.Tensor,
    root_scales: torch.Tensor, step: float, group: dict[str, Any],
) -> None:  # fmt: skip
    rate, (beta1, beta2) = group["lr"], group["betas"]
    moment = dequantize(codes, scales, signed=True).lerp_(gradient.float(), 1 - beta1)
    exact = gradient.float()
    second = dequantize(root_codes, root_scales, signed=False).square_().mul_(beta2).addcmul_(exact, exact, value=1 - beta2)
    root = second.sqrt_()
    corrected = (root / (1 - beta2**step) ** 0.5).add_(group["eps"])
    with in_fp32(parameter, gradient, step) as weights:
        weights.mul_(1 - rate * group["weight_decay"])
        weights.addcdiv_(moment, corrected, value=-rate / (1 - beta1**step))
    for (into, its_scales), values, signed in (((codes, scales), moment, True), ((root_codes, root_scales), root, False)):
        for place, new in zip((into, its_scales), quantize(values, signed), strict=True):
            place.copy_(new)


def quantize(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[rows, columns]` and scales fp32 `[rows, blocks]` of fp32 values `[rows, columns]`."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(-1)
    shares = (blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny).unsqueeze(-1)).bfloat16()
    bits = shares.view(torch.int16).int().bitwise_and_(0xFFFF)
    codes = _codes(signed, values.device).index_select(0, bits.flatten()).view_as(blocks)
    return codes.flatten(1)[:, : values.shape[1]], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """The values, fp32 `[rows, columns]`."""
    levels = _levels(signed, codes.device).index_select(0, codes.flatten().int()).view_as(codes)
    return _blocks(levels).mul(scales.unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """`[rows, columns]` → `[rows, blocks, BLOCK]`, filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


@cache
def _levels(signed: bool, device: torch.device) -> torch.Tensor:
    """256 ascending values from -1 or 0 to 1: of seven decades, the higher one always with twice as many of equal distance."""
    decades = range(7)
    edges = [torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64) for decade in decades]
    middles = [10.0 ** (decade - 6) * (edge[1:] + edge[:-1]) / 2 for decade, edge in zip(decades, edges, strict=True)]
    positive = torch.cat(middles)
    every = [*([-positive] if signed else []), positive, torch.tensor([0.0, 1.0], dtype=torch.float64)]
    return torch.cat(every).sort().values.to(torch.float32).to(device)


@cache
def _codes(signed: bool, device: torch.device) -> torch.Tensor:
    """The code of the nearest level for each of the 65536 bf16 numbers, in the order of their bits: twenty times faster than a search."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    levels = _levels(signed, torch.device("cpu"))
    return torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).to(device)
