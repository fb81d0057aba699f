"""Another update rule for some parameters, AdamW for the rest, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class OwnRule(torch.optim.AdamW):
    """AdamW, but each parameter of a group with `own_rule` is given to `update`, which also decides what its state is."""

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """Change one parameter and its state in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Gradients of the groups with a rule of their own are consumed, so that AdamW passes them over."""
        for group in self.param_groups:
            for parameter in group["params"] if group.get("own_rule") else []:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)
                    parameter.grad = None
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """AdamW's own also turns states of very old files into tensors, and fails where a parameter has no `step`."""
        torch.optim.Optimizer.__setstate__(self, state)
