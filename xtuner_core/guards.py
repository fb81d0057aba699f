"""Checks that keep broken numbers out of the weights."""

from __future__ import annotations

import math

from xtuner_core.errors import DataError


def require_finite(step: int, loss: float, grad_norm: float, documents: list[int]) -> None:
    """Stop before the update if loss or gradient is NaN or infinite.

    Raises:
        DataError: names the step, the values and the documents it trained on; the last checkpoint stays good.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise DataError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were left unchanged. Documents of the step: {documents[:20]}. "
        "Look at them with `xtuner preview`, or lower train.lr."
    )
