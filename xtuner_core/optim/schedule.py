"""Learning rate as a pure function of the step."""

from __future__ import annotations

from xtuner_core import registry
from xtuner_core.config import TrainConfig
from xtuner_core.optim import schedules


def learning_rate(step: int, total: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up that never starts at zero, then the schedule down to lr_min.

    Raises:
        RecipeError: no module of xtuner_core/optim/schedules has the name `train.scheduler`.
    """
    warmup = warmup_steps(total, train.warmup_ratio)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return train.lr_min + (train.lr - train.lr_min) * registry.find(schedules, train.scheduler).share(progress, train)


def warmup_steps(total: int, ratio: float) -> int:
    """XTuner's rule: a ratio below 1 is a share of all steps, from 1 on it is their number."""
    return round(ratio if ratio >= 1 else total * ratio)
