"""Down in a straight line."""

from __future__ import annotations

from xtuner_core.config import TrainConfig


def share(progress: float, train: TrainConfig) -> float:
    """What is left of the run."""
    return 1.0 - progress
