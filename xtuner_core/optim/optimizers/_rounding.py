"""Updates of weights that are kept in bf16: computed in fp32, then rounded at random, for most are smaller than half a bf16 step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

_LOST = 0xFFFF
"""The bits of an fp32 number that bf16 has no place for."""
_FACTORS = (-1640531535, -2048144789, -1028477387)
"""Odd factors of xxHash (Collet), as signed 32-bit numbers."""


@contextmanager
def in_fp32(parameter: torch.Tensor, gradient: torch.Tensor, step: float) -> Iterator[torch.Tensor]:
    """The parameter to be changed in place by its update `step`: itself, or of one in bf16 a copy in fp32 that is put back, rounded."""
    if parameter.dtype != torch.bfloat16:
        yield parameter
        return
    values = parameter.float()
    yield values
    into, new, noise = (one.to_local() if isinstance(one, DTensor) else one for one in (parameter, values, gradient))
    into.copy_(round_at_random(new, noise, int(step)))


def round_at_random(values: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
    """fp32 values to one of the two bf16 numbers beside them, the nearer the likelier, so that the mean stays what it was.

    Stochastic rounding (Gupta et al., arXiv:1502.02551). What decides is a hash of the bits of the value, of its gradient and of the
    step (or a weight without a gradient would stay in its place for good, and not decay): the same on every process that holds a copy,
    after a resume, and for every number of processes, without a random stream to keep.
    """
    bits = values.view(torch.int32)
    mixed = (noise.float().view(torch.int32) * _FACTORS[0]).bitwise_xor_(bits).add_(step)
    for factor, shift in zip(_FACTORS[1:], (15, 13), strict=True):
        mixed = mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    mixed.bitwise_xor_(mixed >> 16).bitwise_and_(_LOST)
    return mixed.add_(bits).bitwise_and_(~_LOST).view(torch.float32).bfloat16()
