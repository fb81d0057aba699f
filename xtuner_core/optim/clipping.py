"""Gradients scaled down to a norm."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(model: torch.nn.Module, most: float) -> torch.Tensor:
    """Scale the model's gradients so that their common norm is at most `most`; the norm before that, 0-d fp32, the same on every rank.

    As `torch.nn.utils.clip_grad_norm_`, which for gradients in bf16 rounds the norm to three digits, and by it all of them.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(gradients, 2.0, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
