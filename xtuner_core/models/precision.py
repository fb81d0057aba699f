"""The words of `train.dtype` and `train.weights`."""

from __future__ import annotations

import torch

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precision of forward and backward pass."""
