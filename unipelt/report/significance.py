"""How far a mean may be off by chance: t intervals, p values, and Holm's correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Of every interval."""
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class MeanEffect:
    """A mean of differences, and how far chance may have moved it.

    Attributes:
        mean: a fraction, as the scores are.
        low, high: its 95 % t interval; None of one difference.
        p: of the t-test against 0, two-sided; None of one difference, and where all are equal.
        count: differences.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    count: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_effect(differences: Sequence[float]) -> MeanEffect:
    """The mean of these differences with its t interval (n - 1 degrees of freedom) and t-test.

    The interval holds the true mean in 95 % of cases for any number of differences from two up, if they are about
    normal. (A percentile bootstrap of five differences holds it in about 84 %.)
    """
    from scipy import stats  # slow to import

    values = np.asarray(differences, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return MeanEffect(mean, None, None, None, count)
    if np.ptp(values) < _NO_SPREAD:
        return MeanEffect(mean, mean, mean, None, count)
    error = values.std(ddof=1) / np.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return MeanEffect(mean, mean - reach, mean + reach, p, count)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """P values corrected for their number by Holm's method (1979); None stays None and does not count.

    If all that are below 0.05 afterwards are called differences, the chance of one false call is at most 5 %.
    """
    known = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[index] = largest
    return corrected
