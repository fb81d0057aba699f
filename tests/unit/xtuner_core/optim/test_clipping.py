"""The norm of gradients, and gradients scaled down by it."""

from __future__ import annotations

import pytest
import torch

from xtuner_core.optim.clipping import clip


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    made = torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(5)))
    for parameter in made.parameters():
        parameter.grad = torch.randn(parameter.shape)
    return made


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def exact_norm(model: torch.nn.Module) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients(model))) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_also_of_gradients_in_bf16(model: torch.nn.Sequential, dtype: torch.dtype) -> None:
    model.to(dtype)
    before = exact_norm(model)
    norm = clip(model, 1.0)
    assert float(norm) == pytest.approx(before, rel=1e-6) and norm.dtype == torch.float32
    assert exact_norm(model) == pytest.approx(1, rel=1e-3)


def test_smaller_gradients_stay_and_a_parameter_may_have_none(model: torch.nn.Sequential) -> None:
    model[0].requires_grad_(False).zero_grad()
    before = gradients(model)
    clip(model, 1e3)
    assert len(before) == 8 and all(map(torch.equal, gradients(model), before))


def test_as_torch_does_in_fp32_to_the_bit(model: torch.nn.Sequential) -> None:
    before = gradients(model)
    norm, found = clip(model, 1.0), gradients(model)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    assert torch.equal(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True), norm)
    assert all(map(torch.equal, gradients(model), found))
