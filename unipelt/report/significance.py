"""What a mean difference may be by chance: bootstrap intervals and p values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def paired_test(
    differences: Sequence[float], resamples: int = RESAMPLES
) -> tuple[float, float, float, float | None, float | None]:
    """Mean difference, its 95 % bootstrap interval (seeded), and p of the paired t-test and of Wilcoxon's.

    Args:
        differences: one for each pair.
        resamples: of the bootstrap.
    """
    from scipy import stats  # slow to import

    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    # identical differences have no spread for t, and differences of 0 no rank for Wilcoxon
    t = None if np.ptp(values) < 1e-12 else float(stats.ttest_1samp(values, 0.0).pvalue)
    moved = values[np.abs(values) > 1e-12]
    rank = float(stats.wilcoxon(np.round(moved, 12)).pvalue) if len(moved) else None
    return float(values.mean()), float(low), float(high), t, rank


def task_test(
    differences: Sequence[Sequence[float]], resamples: int = RESAMPLES
) -> tuple[tuple[float, float], float | None]:
    """The 95 % interval where tasks are drawn as well (a bootstrap in two stages, seeded), and p over tasks.

    Args:
        differences: for each task, one for each of its pairs.
        resamples: of the bootstrap. Each draws as many tasks as there are, and from each as many pairs as it has; its
            mean is over all pairs drawn.

    Returns:
        The interval, and p of the t-test of the tasks' means against 0, two-sided; None where they have no spread.
    """
    from scipy import stats  # slow to import

    tasks = [np.asarray(values, dtype=np.float64) for values in differences]
    generator = np.random.default_rng(0)
    sums, counts = np.zeros(resamples), np.zeros(resamples)
    for drawn in generator.integers(len(tasks), size=(len(tasks), resamples)):
        for index, values in enumerate(tasks):
            (rows,) = np.nonzero(drawn == index)
            pairs = generator.integers(len(values), size=(len(rows), len(values)))
            sums[rows] += values[pairs].sum(axis=1)
            counts[rows] += len(values)
    low, high = np.percentile(sums / counts, [2.5, 97.5])
    means = [values.mean() for values in tasks]
    t = None if np.ptp(means) < 1e-12 else float(stats.ttest_1samp(means, 0.0).pvalue)
    return (float(low), float(high)), t
