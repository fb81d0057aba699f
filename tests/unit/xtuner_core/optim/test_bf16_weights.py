"""Weights kept in bf16: rounded without a bias, so that updates far smaller than a bf16 step add up."""

from __future__ import annotations

import copy

import pytest
import torch

from xtuner_core import registry
from xtuner_core.config import TrainConfig
from xtuner_core.optim import optimizers
from xtuner_core.optim.optimizer import make_optimizer
from xtuner_core.optim.optimizers._rounding import round_at_random

NAMES = registry.names(optimizers)
SHAPE = (64, 96)


@pytest.mark.parametrize("noise", [1, 0], ids=["with a gradient", "without"])
def test_rounding_takes_a_neighbour_and_keeps_the_mean(noise: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(64)
    rounded = torch.stack([round_at_random(values, noise * torch.randn(64), step).float() for step in range(20_000)])
    low, high = rounded.amin(0), rounded.amax(0)
    step = high - low
    assert ((low <= values) & (values <= high)).all()
    assert (step <= values.abs() * 2**-7).all() and (step > 0).all()
    assert ((rounded.mean(0) - values).abs() / step).max() < 5 * 0.5 / 20_000**0.5  # five standard errors of a coin


def test_what_bf16_can_hold_stays() -> None:
    values = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(values.float(), torch.randn(1000), 1), values)


def twins(name: str, **settings: float) -> list[tuple[torch.nn.Linear, torch.optim.Optimizer]]:
    """The same weights in fp32 and in bf16, each with its optimizer."""
    torch.manual_seed(0)
    exact = torch.nn.Linear(SHAPE[1], SHAPE[0]).bfloat16().float()
    kept = {"fp32": exact, "bf16": copy.deepcopy(exact).bfloat16()}
    return [
        (model, make_optimizer(model, TrainConfig.model_validate({"optimizer": name, "weights": weights, **settings})))
        for weights, model in kept.items()
    ]


def update(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, step: int) -> None:
    """With gradients that mostly point one way."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (1 + torch.randn(parameter.shape)).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_updates_smaller_than_a_bf16_step_add_up(name: str) -> None:
    (exact, one), (kept, other) = twins(name, lr=1e-5, lr_min=0.0)
    start = exact.weight.detach().clone()
    for step in range(100):
        update(exact, one, step)
        update(kept, other, step)
    moved, moved_in_bf16 = (model.weight.detach().float() - start for model in (exact, kept))
    half_step = float((start.abs() * 2**-9).mean())
    assert float(moved.abs().mean()) / 100 < 0.1 * half_step  # rounded to the nearest number, most weights would never move
    assert float((moved_in_bf16 * moved).sum() / moved.square().sum()) == pytest.approx(1, abs=0.2)
    assert {tensor.dtype for tensor in other.state[kept.weight].values()} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_without_gradients_decays(name: str) -> None:
    """A word that never occurs, an expert that is never asked."""
    for model, optimizer in twins(name, lr=1e-3, weight_decay=0.1):
        before = float(model.weight.detach().float().abs().mean())
        for _ in range(500):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        assert float(model.weight.detach().float().abs().mean()) / before == pytest.approx(0.951, abs=2e-3)  # (1 - 1e-4)^500


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_loaded_keeps_its_types_and_goes_on_to_the_bit(name: str) -> None:
    (_, (model, optimizer)), (_, (again, fresh)) = twins(name), twins(name)
    for step in range(3):
        update(model, optimizer, step)
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model_, optimizer_ in ((model, optimizer), (again, fresh)):
        update(model_, optimizer_, 3)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, fresh.state[other][key]) and value.dtype == fresh.state[other][key].dtype, key
