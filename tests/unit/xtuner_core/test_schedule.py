"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner_core.config import TrainConfig
from xtuner_core.optim.schedule import learning_rate


def rates(total: int, **train: object) -> list[float]:
    config = TrainConfig.model_validate({"lr": 1e-3, "lr_min": 1e-5, **train})
    return [learning_rate(step, total, config) for step in range(total)]


@given(total=st.integers(1, 300), warmup=st.floats(0, 0.9), scheduler=st.sampled_from(["cosine", "linear", "constant"]))
def test_rises_to_the_peak_and_never_leaves_its_range(total: int, warmup: float, scheduler: str) -> None:
    found = rates(total, warmup_ratio=warmup, scheduler=scheduler)
    steps = round(total * warmup)
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in found)
    assert all(before < after for before, after in pairwise(found[:steps]))
    assert max(found) == pytest.approx(1e-3)
    assert all(before >= after for before, after in pairwise(found[max(0, steps - 1) :]))


@pytest.mark.parametrize(("scheduler", "last"), [("cosine", 1e-5), ("linear", 1e-5), ("constant", 1e-3)])
def test_the_last_step_has_the_lowest_rate(scheduler: str, last: float) -> None:
    assert rates(40, scheduler=scheduler)[-1] == pytest.approx(last)


def test_known_values() -> None:
    assert rates(5, warmup_ratio=0.4, scheduler="linear") == pytest.approx([5e-4, 1e-3, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])
    assert rates(3, warmup_ratio=0.0)[1] == pytest.approx((1e-3 + 1e-5) / 2)  # the middle of the cosine
    assert rates(1) == [1e-3]
