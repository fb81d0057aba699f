"""Intervals around differences: properties, coverage in simulation, and figures that SciPy gives too."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.comparison.bootstrap import interval, matched_interval, mcnemar

Scores = list[tuple[float, float]]
PAIRS = st.lists(
    st.tuples(st.floats(0, 10, width=32), st.floats(0, 10, width=32), st.integers(1, 400)).map(lambda x: ((x[0], x[2]), (x[1], x[2]))),
    min_size=2,
    max_size=30,
)


def mean(scores: Scores) -> float:
    return sum(score * weight for score, weight in scores) / sum(weight for _, weight in scores)


def split(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> tuple[Scores, Scores]:
    return [one for one, _ in pairs], [two for _, two in pairs]


def answers(seed: int, size: int, before: float, after: float) -> tuple[Scores, Scores]:
    """Right and wrong answers of two models; what is hard for the one is hard for the other."""
    chance = random.Random(seed)
    hardness = [chance.random() for _ in range(size)]
    drawn = [[(float((chance.random() + one) / 2 < rate), 1.0) for one in hardness] for rate in (before, after)]
    return drawn[0], drawn[1]


@given(PAIRS)
@settings(max_examples=40)
def test_the_interval_holds_the_measured_difference(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    before, after = split(pairs)
    found = interval(before, after, 0.95)
    assert found is not None
    assert found[0] - 1e-9 <= mean(after) - mean(before) <= found[1] + 1e-9


@given(PAIRS)
@settings(max_examples=25)
def test_the_other_way_round_it_has_the_other_sign(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    before, after = split(pairs)
    there, back = interval(before, after, 0.9), interval(after, before, 0.9)
    assert there is not None and back is not None
    assert back == pytest.approx((-there[1], -there[0]), abs=1e-9)


def test_the_order_of_the_samples_matters_less_than_the_resampling_itself() -> None:
    before, after = answers(3, 200, 0.4, 0.5)
    pairs = list(zip(before, after, strict=True))
    found = interval(before, after, 0.95)
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        assert interval(*split(pairs), 0.95) == pytest.approx(found, abs=0.01)


def test_95_percent_intervals_hold_the_truth_in_about_95_of_100_cases() -> None:
    """The mean score and the loss per token of 60 samples, 300 times each."""
    generator = np.random.default_rng(7)
    held = {"accuracy": 0, "loss": 0}
    for _ in range(300):
        hard = generator.random(60)
        right = [[(float(one), 1.0) for one in generator.random(60) * 0.5 + hard * 0.5 < rate] for rate in (0.4, 0.6)]
        low, high = interval(right[0], right[1], 0.95) or (1.0, 0.0)
        held["accuracy"] += low <= 0.36 <= high  # the sum of two uniform halves is below 0.4 with chance 0.32, below 0.6 with 0.68
        weights = generator.integers(5, 200, 60)
        common = generator.exponential(1.0, 60)
        loss = [list(zip((common * scale + generator.normal(0, 0.2, 60)).tolist(), weights.tolist(), strict=True)) for scale in (1.0, 0.9)]
        low, high = interval(loss[0], loss[1], 0.95) or (1.0, 0.0)
        held["loss"] += low <= -0.1 <= high
    assert all(0.90 <= count / 300 <= 0.99 for count in held.values()), held


def test_the_figures_of_scipy() -> None:
    """scipy.stats.bootstrap(paired=True, method="percentile", n_resamples=10000) and scipy.stats.binomtest, SciPy 1.17."""
    chance = random.Random(0)
    sizes = {size: ([], []) for size in (16, 200)}
    for size, (before, after) in sizes.items():
        before += [(float(chance.random() < 0.4), 1.0) for _ in range(size)]
        after += [(float(chance.random() < 0.6), 1.0) for _ in range(size)]
    assert interval(*sizes[16], 0.95) == pytest.approx((-0.3125, 0.4375), abs=1e-9)
    assert interval(*sizes[200], 0.95) == pytest.approx((0.12, 0.32), abs=0.006)
    assert [mcnemar(4, 0), mcnemar(10, 2), mcnemar(3, 3), mcnemar(50, 31)] == pytest.approx([0.125, 0.03857421875, 1, 0.0448285223858])


def test_few_and_equal_samples() -> None:
    right, wrong = [(1.0, 1.0)] * 4, [(0.0, 1.0)] * 4
    assert interval([], [], 0.95) is None
    assert interval(wrong[:1], right[:1], 0.95) is None
    assert interval(wrong, right, 0.95) == (1.0, 1.0), "all samples say the same: the bootstrap knows no doubt"
    assert mcnemar(4, 0) == 0.125, "the exact test does"
    assert interval([*wrong, (9.0, 0.0)], [*right, (9.0, 0.0)], 0.95) == (1.0, 1.0), "what has no weight says nothing"


def test_the_interval_of_matched_shares_knows_how_few_the_samples_are() -> None:
    """By hand for three samples; against the plain interval for many."""
    assert matched_interval(0, 0, 3, 0.95) == pytest.approx((-0.392, 0.392), abs=1e-3)
    low, high = matched_interval(30, 20, 2000, 0.95)
    wald = 1.959964 * (50 - 10**2 / 2000) ** 0.5 / 2000
    assert (low, high) == pytest.approx((0.005 - wald, 0.005 + wald), abs=1e-4), "of many samples Wald's own interval"
    assert matched_interval(4, 9, 50, 0.9) == pytest.approx(tuple(-end for end in reversed(matched_interval(9, 4, 50, 0.9))))


@pytest.mark.parametrize(("gained", "lost"), [(0.03, 0.03), (0.1, 0.1), (0.05, 0.15)])
def test_of_20_answers_a_few_of_which_change_95_percent_intervals_hold_the_truth(gained: float, lost: float) -> None:
    """The bootstrap's do so in fewer cases: where no answer changed it is sure of nothing at all."""
    drawn = np.random.default_rng(11).multinomial(20, (gained, lost, 1 - gained - lost), 2000)
    ends = {(right, wrong): matched_interval(right, wrong, 20, 0.95) for right, wrong, _ in drawn.tolist()}
    assert np.mean([low <= gained - lost <= high for low, high in (ends[right, wrong] for right, wrong, _ in drawn.tolist())]) >= 0.94


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_exact_test_knows_no_direction_and_no_doubt_beyond_one(right: int, wrong: int) -> None:
    assert mcnemar(right, wrong) == mcnemar(wrong, right) <= 1
    assert mcnemar(right + 1, wrong) <= mcnemar(right, wrong) or right < wrong


def test_thousands_of_samples_take_seconds_not_gigabytes() -> None:
    before, after = answers(1, 14_000, 0.4, 0.42)
    low, high = interval(before, after, 0.95) or (1.0, 0.0)
    assert low <= mean(after) - mean(before) <= high
    assert high - low < 0.03
