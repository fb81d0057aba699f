"""The peak rate to the end."""

from __future__ import annotations

from xtuner_core.config import TrainConfig


def share(progress: float, train: TrainConfig) -> float:
    """Always 1."""
    return 1.0
