"""How sure a difference between two models is that answered the same samples.

* `interval`: the paired bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13; for comparing two systems on
  one test set: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004). It holds for any mean, but is
  too narrow for few samples: where all of them agree its width is zero.
* `matched_interval`: for answers that are right or wrong, never of zero width: where none of ten answers changed, others may.
* `mcnemar`: for answers that are right or wrong, the exact test on those that changed, which few samples cannot deceive.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
_SEED = 20_040_725
_DRAWN_TOGETHER = 1 << 20
"""Samples drawn in one array operation."""

Scores = Sequence[tuple[float, float]]
"""Score and weight of each sample."""


def interval(before: Scores, after: Scores, confidence: float) -> tuple[float, float] | None:
    """Percentile interval of (weighted mean of `after`) − (weighted mean of `before`), samples paired by position.

    A resample draws samples with replacement, each with its scores and weights under both models, so that the sums above and below a
    ratio such as the loss per token vary together. The same scores always give the same interval. None for fewer than two samples.
    """
    import numpy as np

    columns = np.array([(s * w, w, t * v, v) for (s, w), (t, v) in zip(before, after, strict=True) if w or v], dtype=np.float64)
    if len(columns) < 2:
        return None
    sums = _resampled_sums(columns)
    differences = sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1]
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_sums(columns: np.ndarray) -> np.ndarray:
    """Sums `[RESAMPLES, columns]` over as many rows, drawn with replacement, as `columns` `[samples, columns]` has."""
    import numpy as np

    size, generator = len(columns), np.random.Generator(np.random.PCG64(_SEED))
    together, parts = max(1, _DRAWN_TOGETHER // size), []
    for first in range(0, RESAMPLES, together):
        count = min(together, RESAMPLES - first)
        drawn = generator.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)  # how often each resample has each sample
        parts.append(times @ columns)
    return np.concatenate(parts)


def matched_interval(became_right: int, became_wrong: int, samples: int, confidence: float) -> tuple[float, float]:
    """Interval of the difference of two shares of right answers to the same questions: Wald's, after half an answer more in each of the
    four cells (Agresti & Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine, 2005).
    """
    size, gain = samples + 2, became_right - became_wrong
    width = NormalDist().inv_cdf((1 + confidence) / 2) * sqrt(became_right + became_wrong + 1 - gain**2 / size)
    return (gain - width) / size, (gain + width) / size


def mcnemar(became_right: int, became_wrong: int) -> float:
    """Two-sided p-value that both changes are equally likely: the exact binomial form of McNemar's test (Psychometrika, 1947)."""
    changed, fewer = became_right + became_wrong, min(became_right, became_wrong)
    ways, tail = 1, 1
    for taken in range(fewer):
        ways = ways * (changed - taken) // (taken + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**changed)
