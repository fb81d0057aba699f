"""Down in half a cosine wave (Loshchilov & Hutter, arXiv:1608.03983, without restarts)."""

from __future__ import annotations

import math

from xtuner_core.config import TrainConfig


def share(progress: float, train: TrainConfig) -> float:
    """Slow at the beginning and the end, fast in the middle."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
