"""AdamW over the trainable parameters."""

from __future__ import annotations

import torch

from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizers._groups import decay_groups


def make(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101) on matrices, none on vectors; fused update."""
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return torch.optim.AdamW(decay_groups(trainable, train.weight_decay), lr=train.lr, betas=train.betas, fused=True)
