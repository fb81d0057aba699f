"""One byte a number: how near it comes, what it saves, and that a training hardly notices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_core.config import TrainConfig
from xtuner_core.optim.optimizer import make_optimizer
from xtuner_core.optim.optimizers.adamw_8bit import BLOCK, _levels, dequantize, quantize

LEVELS = {signed: _levels(signed, torch.device("cpu")).double() for signed in (True, False)}


@settings(max_examples=50)
@given(rows=st.integers(0, 5), columns=st.integers(1, 600), power=st.integers(-30, 30), signed=st.booleans(), seed=st.integers(0, 2**31))
def test_each_number_becomes_the_nearest_level_of_its_block(rows: int, columns: int, power: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) ** 3 * 10.0**power
    values = values if signed else values.abs()
    codes, scales = quantize(values, signed)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, values.shape, (rows, -(-columns // BLOCK)))
    largest = scales.repeat_interleave(BLOCK, dim=1)[:, :columns].double()
    nearest = (values.unsqueeze(-1) - LEVELS[signed] * largest.unsqueeze(-1)).abs().amin(-1)
    error = (dequantize(codes, scales, signed) - values).abs()
    assert bool((error <= nearest + 2**-7 * values.abs() + 1e-6 * largest).all())  # numbers are rounded to bf16 before


def test_levels_are_dense_near_the_largest_number() -> None:
    for signed, top in ((True, 64), (False, 128)):
        levels = LEVELS[signed]
        assert len(levels.unique()) == 256 and levels.max() == 1 and bool((levels == 0).any())
        assert int(((levels > 0.1) & (levels < 1)).sum()) == top
        assert 0 < levels[levels > 0].min() < 1e-6
    assert torch.equal(-LEVELS[True][LEVELS[True] < 0].flip(0), LEVELS[True][(LEVELS[True] > 0) & (LEVELS[True] < 1)])


def test_the_largest_number_of_a_block_and_zeros_come_back_exactly() -> None:
    values = torch.zeros(2, 2 * BLOCK)
    values[0, 3], values[1, BLOCK + 5] = 7.3e-9, 41.7
    codes, scales = quantize(values, signed=True)
    assert torch.equal(dequantize(codes, scales, signed=True), values)


def trained(name: str, steps: int = 60) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a small regression."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.GELU(), torch.nn.Linear(300, 32))
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, lr=3e-3))
    inputs = torch.randn(512, 64)
    targets = torch.sin(inputs @ torch.randn(64, 32) / 8)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, optimizer


def test_a_training_goes_as_with_moments_of_four_bytes() -> None:
    (expected, _), (found, _) = trained("adamw"), trained("adamw_8bit")
    assert expected[-1] < 0.1 * expected[0]
    assert found == pytest.approx(expected, rel=0.03)
    assert found != expected


def test_the_moments_of_a_large_matrix_take_a_quarter_and_others_are_as_they_were() -> None:
    _, optimizer = trained("adamw_8bit", steps=1)
    [quantized, small] = optimizer.param_groups
    for parameter in quantized["params"]:
        state = optimizer.state[parameter]
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert size <= (2 + 8 * state["root_scales"].numel() / parameter.numel()) * parameter.numel() + 4
    assert [parameter.shape for parameter in quantized["params"]] == [(300, 64), (32, 300)]
    assert all(set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"} for parameter in small["params"])
