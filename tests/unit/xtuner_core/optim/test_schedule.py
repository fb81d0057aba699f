"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner_core import registry
from xtuner_core.config import TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.optim import schedules
from xtuner_core.optim.schedule import learning_rate, warmup_steps

NAMES = registry.names(schedules)
LOWEST = {"cosine": 1e-5, "linear": 1e-5, "constant": 1e-3, "wsd": 1e-5}
"""The rate of the last step."""


def rates(total: int, **train: object) -> list[float]:
    config = TrainConfig.model_validate({"lr": 1e-3, "lr_min": 1e-5, **train})
    return [learning_rate(step, total, config) for step in range(total)]


@given(
    total=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.999), st.integers(1, 400)),
    decay=st.floats(0, 1, exclude_min=True),
    scheduler=st.sampled_from(NAMES),
)
def test_rises_to_the_peak_and_never_leaves_its_range(total: int, warmup: float, decay: float, scheduler: str) -> None:
    found = rates(total, warmup_ratio=warmup, scheduler=scheduler, decay_ratio=decay)
    steps = warmup_steps(total, warmup)
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in found)
    assert all(rate >= 1e-5 * (1 - 1e-12) for rate in found[steps:])
    assert found[:steps] == pytest.approx([1e-3 * (step + 1) / steps for step in range(min(steps, total))])
    assert steps > total or max(found) == pytest.approx(1e-3)
    assert all(before >= after for before, after in pairwise(found[max(0, steps - 1) :]))


@given(progress=st.floats(0, 1), decay=st.floats(0, 1, exclude_min=True), name=st.sampled_from(NAMES))
def test_a_schedule_is_a_share_that_begins_at_the_peak(progress: float, decay: float, name: str) -> None:
    share, train = registry.find(schedules, name).share, TrainConfig(decay_ratio=decay)
    assert share(0.0, train) == 1.0
    assert 0.0 <= share(progress, train) <= 1.0


@pytest.mark.parametrize("scheduler", NAMES)
def test_the_last_step_has_the_lowest_rate(scheduler: str) -> None:
    assert rates(40, scheduler=scheduler)[-1] == pytest.approx(LOWEST[scheduler])


@given(total=st.integers(2, 300), share=st.floats(0.01, 0.9))
def test_a_warm_up_is_a_share_below_one_and_steps_from_one_on(total: int, share: float) -> None:
    assert warmup_steps(total, share) == round(total * share)
    assert warmup_steps(total, 1) == 1
    assert rates(total, warmup_ratio=total)[-1] == pytest.approx(1e-3)
    if steps := round(total * share):
        assert rates(total, warmup_ratio=share) == rates(total, warmup_ratio=steps)


def test_known_values() -> None:
    assert rates(5, warmup_ratio=0.4, scheduler="linear") == pytest.approx([5e-4, 1e-3, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])
    assert rates(3, warmup_ratio=0.0)[1] == pytest.approx((1e-3 + 1e-5) / 2)  # the middle of the cosine
    assert rates(1) == [1e-3]


def test_wsd_is_stable_and_then_falls_with_the_root() -> None:
    found = rates(11, warmup_ratio=2, scheduler="wsd", decay_ratio=0.5)
    assert found[:7] == pytest.approx([5e-4, *[1e-3] * 6])  # the decay begins where half of the 8 steps after the first peak are over
    assert found[7:] == pytest.approx([1e-5 + (1e-3 - 1e-5) * (1 - (part / 4) ** 0.5) for part in (1, 2, 3, 4)])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(RecipeError, match="'step' is not one of the schedules: constant, cosine, linear, wsd"):
        rates(3, warmup_ratio=0, scheduler="step")
