"""Muon for the hidden matrices, AdamW for embeddings, head and vectors, with one learning rate for both.

After Keller Jordan (https://kellerjordan.github.io/posts/muon), the step scaled to AdamW's size as in Moonlight (Liu et al.,
arXiv:2502.16982), so that AdamW's learning rate and weight decay can be kept. The numbers are those of
`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` to the last bit. That class itself is not used because of sharded matrices: it takes
them, but exchanges data more than ten times per matrix, and its result then differs by a per cent from that of one process. Here the
update is gathered once per matrix. Stacked matrices (experts, `[experts, out, in]`), which it refuses, are updated one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizers._groups import decay_groups
from xtuner_core.optim.optimizers._own_rule import OwnRule
from xtuner_core.optim.optimizers._rounding import in_fp32

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that is applied again and again; chosen for the steepest slope at zero."""
ITERATIONS = 5
RMS_OF_ADAMW = 0.2
"""Typical size of an entry of AdamW's update, in units of the learning rate."""


def make(model: torch.nn.Module, train: TrainConfig) -> Muon:
    """Hidden matrices are all trainable parameters of two and more dimensions but the embeddings and the head."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vocabulary = _vocabulary(model)
    hidden = [parameter for parameter in trainable if parameter.ndim >= 2 and id(parameter) not in vocabulary]
    taken = {id(parameter) for parameter in hidden}
    rest = decay_groups((parameter for parameter in trainable if id(parameter) not in taken), train.weight_decay)
    muon = [{"params": hidden, "weight_decay": train.weight_decay, "own_rule": True}] if hidden else []
    return Muon([*muon, *rest], lr=train.lr, betas=train.betas, fused=True)


def _vocabulary(model: torch.nn.Module) -> set[int]:
    """Identities of the parameters with a row per token."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) or module is head]
    return {id(parameter) for module in modules for parameter in module.parameters()}


class Muon(OwnRule):
    """Muon for the groups with `own_rule`; the state is `momentum_buffer` and, of a weight in bf16, `step`."""

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """`update` with the group's rate and decay."""
        update(parameter, gradient, state, group["lr"], group["weight_decay"])


def update(
    parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], learning_rate: float, weight_decay: float
) -> None:
    """Change one matrix `[out, in]`, or a stack of them `[..., out, in]`, and its momentum in place; sharded or not."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient, dtype=torch.float32)
        state |= {"step": torch.tensor(0.0)} if parameter.dtype == torch.bfloat16 else {}  # for its rounding
    momentum = state["momentum_buffer"].lerp_(gradient.float(), 1 - MOMENTUM)
    direction = _direction(gradient.float().lerp(momentum, MOMENTUM))  # Nesterov's look ahead
    step = state["step"].add_(1).item() if "step" in state else 0.0
    with in_fp32(parameter, gradient, step) as weights:
        weights.mul_(1 - learning_rate * weight_decay)
        weights.add_(direction, alpha=-learning_rate * RMS_OF_ADAMW * max(parameter.shape[-2:]) ** 0.5)


def _direction(matrix: torch.Tensor) -> torch.Tensor:
    """`orthogonalize`, of which a sharded matrix needs all rows on every rank; a stack that is sharded by matrix does not."""
    if not isinstance(matrix, DTensor):
        return orthogonalize(matrix)
    mesh, places = matrix.device_mesh, matrix.placements
    if matrix.ndim > 2 and all(place.is_replicate() or getattr(place, "dim", None) == 0 for place in places):
        local = orthogonalize(matrix.to_local())
        return DTensor.from_local(local, mesh, places, run_check=False, shape=matrix.shape, stride=matrix.stride())
    return distribute_tensor(orthogonalize(matrix.full_tensor()), mesh, places, src_data_rank=None)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The matrices `[..., out, in]` with all singular values moved to about 1 (0.5 to 1.5), in bf16.

    Newton–Schulz iteration with a quintic polynomial: X ← aX + b(XXᵀ)X + c(XXᵀ)²X.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.bfloat16().mT if tall else matrix.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = _add_product(x, a, _add_product(gram, b, gram, gram, c), x)
    return x.mT if tall else x


def _add_product(base: torch.Tensor, factor: float, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """`factor · base + alpha · left @ right` with a single rounding, of matrices or of stacks of them."""
    if base.ndim == 2:
        return torch.addmm(base, left, right, beta=factor, alpha=alpha)
    flat = [tensor.flatten(0, -3) for tensor in (base, left, right)]
    return torch.baddbmm(*flat, beta=factor, alpha=alpha).view_as(base)
