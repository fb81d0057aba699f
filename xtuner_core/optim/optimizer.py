"""The optimizer that a recipe names."""

from __future__ import annotations

import torch

from xtuner_core import registry
from xtuner_core.config import TrainConfig
from xtuner_core.optim import optimizers


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters.

    Raises:
        RecipeError: no module of xtuner_core/optim/optimizers has the name `train.optimizer`, or what it needs is not installed.
    """
    return registry.find(optimizers, train.optimizer).make(model, train)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
