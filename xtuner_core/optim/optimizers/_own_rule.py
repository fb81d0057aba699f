"""Another update rule for some parameters, AdamW for the rest, in one optimizer; weights in bf16 are updated in fp32 and rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtuner_core.optim.optimizers._rounding import in_fp32


class OwnRule(torch.optim.AdamW):
    """AdamW, but each parameter of a group with `own_rule` is given to `update`, which also decides what its state is.

    torch's own AdamW keeps moments in the precision of the weights, and rounds to nearest, which loses most updates of a weight in
    bf16: such a weight is given to `update_bf16`.
    """

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        """Change one parameter and its state in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Gradients of parameters with another rule are consumed, so that torch's AdamW passes them over."""
        for group in self.param_groups:
            for parameter in group["params"]:
                rule = self.update if group.get("own_rule") else update_bf16 if parameter.dtype == torch.bfloat16 else None
                if rule and parameter.grad is not None:
                    rule(parameter, parameter.grad, self.state[parameter], group)
                    parameter.grad = None
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """AdamW's own also turns states of very old files into tensors, and fails where a parameter has no `step`."""
        torch.optim.Optimizer.__setstate__(self, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch turns what it loads into the type of the weight; codes are bytes, though, and moments fp32 beside weights in bf16."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            loaded = self.state[parameter]
            loaded |= {name: value.to(loaded[name].device) for name, value in state_dict["state"].get(number, {}).items()}


def update_bf16(parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    """AdamW's update of one weight in bf16, with moments in fp32."""
    if not state:
        state |= {"step": torch.tensor(0.0)}
        state |= {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    state["step"] += 1
    (beta1, beta2), step, rate = group["betas"], state["step"].item(), group["lr"]
    exact = gradient.float()
    moment = state["exp_avg"].lerp_(exact, 1 - beta1)
    root = (state["exp_avg_sq"].mul_(beta2).addcmul_(exact, exact, value=1 - beta2) / (1 - beta2**step)).sqrt_()
    with in_fp32(parameter, gradient, step) as weights:
        weights.mul_(1 - rate * group["weight_decay"])
        weights.addcdiv_(moment, root.add_(group["eps"]), value=-rate / (1 - beta1**step))
