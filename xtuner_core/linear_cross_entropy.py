"""Cross-entropy of a linear layer's output: logits exist for a chunk of the tokens at a time, never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]


def chunked_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, chunk: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over tokens of -weight · log softmax(head(hidden))[label]; hidden `[N, hidden]`, labels and weights `[N]` → 0-d fp32.

    `head` may be anything. A chunk's logits `[chunk, vocabulary]` are recomputed in the backward pass (Chen et al., arXiv:1604.06174).
    """
    if len(labels) == 0:
        return head(hidden).float().sum()  # zero; the head has a gradient on every rank, or FSDP's exchanges would not match
    if len(labels) <= chunk:
        return _loss(hidden, head, labels, weights)  # the only chunk: its logits may stay until the backward pass, which follows at once
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), chunk):
        piece, target, weight = (None if rows is None else rows[start : start + chunk] for rows in (hidden, labels, weights))
        total = total + checkpoint(_loss, piece, head, target, weight, use_reentrant=False)
    return total.float()


def _loss(hidden: torch.Tensor, head: Head, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    logits = head(hidden).float()
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="none") @ weights


def linear_cross_entropy(
    hidden: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor, chunk: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The same for the head `hidden @ matrix.T`, matrix `[vocabulary, hidden]`, with each chunk's gradients taken in the forward pass.

    The logits are computed once and turned into their gradient in place (as in Liger, Hsu et al., arXiv:2410.10989, and in XTuner V1's
    chunk mode). `F.linear_cross_entropy` of torch 2.13 does the same, but sums a bf16 loss in bf16. The head's gradient is summed over
    chunks in the head's precision, as autograd would.
    """
    if len(labels) == 0:
        return (hidden @ matrix.T).float().sum()  # zero, with gradients
    if not torch.is_grad_enabled():  # or the function would still take them
        hidden, matrix = hidden.detach(), matrix.detach()
    return _LinearCrossEntropy.apply(hidden, matrix, labels, chunk, weights)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor, chunk: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad
        of_hidden, of_matrix = torch.empty_like(hidden) if needed[0] else None, torch.zeros_like(matrix) if needed[1] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            loss, slope = _loss_and_slope(hidden[rows] @ matrix.T, labels[rows], None if weights is None else weights[rows])
            total += loss
            if of_hidden is not None:
                torch.mm(slope, matrix, out=of_hidden[rows])
            if of_matrix is not None:
                of_matrix.addmm_(slope.T, hidden[rows])
        ctx.gradients = of_hidden, of_matrix
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_matrix = (None if gradient is None else gradient.mul_(slopes[0]) for gradient in ctx.gradients)
        del ctx.gradients  # scaled in place, so good for one backward pass
        return of_hidden, of_matrix, None, None, None


def _loss_and_slope(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the rows' cross-entropy, and its gradient by the logits in their dtype; computed in fp32."""
    scores, places = F.log_softmax(logits, dim=-1, dtype=torch.float32), labels[:, None]
    losses = -scores.gather(1, places)[:, 0]
    slope = scores.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=torch.float32))
    if weights is None:
        return losses.sum(), slope.to(logits.dtype)
    return losses @ weights, slope.mul_(weights[:, None]).to(logits.dtype)
