"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay and vectors (norms, biases) without, as far as there are any."""
    every = list(parameters)
    groups = [
        {"params": [parameter for parameter in every if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in every if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
