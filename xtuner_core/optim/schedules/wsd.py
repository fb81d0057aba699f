"""Warm-up, stable, decay (Hu et al., arXiv:2404.06395): the peak rate, then down in the last `train.decay_ratio` of the steps."""

from __future__ import annotations

import math

from xtuner_core.config import TrainConfig


def share(progress: float, train: TrainConfig) -> float:
    """1 and then 1 - √, the shape that Hägele et al. (arXiv:2405.18392) found to be the best."""
    decayed = 1.0 - (1.0 - progress) / train.decay_ratio
    return 1.0 - math.sqrt(max(0.0, decayed))
