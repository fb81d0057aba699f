"""AdamW over the trainable parameters."""

from __future__ import annotations

import torch

from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizers._groups import decay_groups
from xtuner_core.optim.optimizers._own_rule import OwnRule


def make(model: torch.nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101) on matrices, none on vectors; fused update of weights in fp32."""
    groups = decay_groups((parameter for parameter in model.parameters() if parameter.requires_grad), train.weight_decay)
    kind = torch.optim.AdamW if train.weights == "fp32" else OwnRule
    return kind(groups, lr=train.lr, betas=train.betas, fused=True)
