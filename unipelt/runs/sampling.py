"""The K-shot samples of the paper's low-resource tables (UniPELT, section 4.1)."""

from __future__ import annotations

import operator

import numpy as np
from datasets import Dataset


def few_shot(train: Dataset, train_samples: int, dev_samples: int, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a small train set and a dev set from the train split.

    The split is shuffled with the seed, by the same permutation as `Dataset.shuffle(seed=seed)`. The first
    `train_samples` rows are the train set, and the next `dev_samples` rows are the dev set. The two sets share no row.
    For one seed, the train set with a smaller K is the beginning of the train set with a larger K.

    Args:
        train: The whole train split.
        train_samples: K, the number of training rows.
        dev_samples: Number of rows in the dev set (1,000 in the paper).
        seed: Seed of the shuffle, at least 0.

    Returns:
        The K-shot train set and the dev set.

    Raises:
        ValueError: A number is not positive, the seed is negative, or the split is too small.
    """
    rows, dev_rows = few_shot_rows(len(train), train_samples, dev_samples, seed)
    return train.select(rows), train.select(dev_rows)


def few_shot_rows(count: int, train_samples: int, dev_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows that `few_shot` takes from `count` rows: (train_samples,) and (dev_samples,).

    Raises:
        ValueError: As `few_shot`.
    """
    for name, value in (("train_samples", train_samples), ("dev_samples", dev_samples)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} is {value}; give a positive number of rows")
    if operator.index(seed) < 0:
        raise ValueError(f"seed is {seed}; give 0 or a positive whole number")
    wanted = train_samples + dev_samples
    if wanted > count:
        raise ValueError(
            f"train_samples {train_samples:,} + dev_samples {dev_samples:,} = {wanted:,} rows, "
            f"but the train split has {count:,}; lower one of the two"
        )
    order = np.random.default_rng(seed).permutation(count)
    return order[:train_samples], order[train_samples:wanted]


def fixed_rows(count: int, samples: int) -> np.ndarray:
    """Return the sorted row indices of a smaller test set, (min(samples, count),), the same in every run."""
    return np.sort(np.random.default_rng(0).permutation(count)[:samples])
