"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from xtuner_core.config import TrainConfig


def learning_rate(step: int, total: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up that never starts at zero, then the schedule down to lr_min."""
    warmup = round(total * train.warmup_ratio)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[train.scheduler]
    return train.lr_min + (train.lr - train.lr_min) * shape
