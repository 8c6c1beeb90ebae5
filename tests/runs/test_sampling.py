"""K-shot samples: the same permutation as `Dataset.shuffle`, disjoint, and clear about what is too large."""

from __future__ import annotations

import pytest
from datasets import Dataset

from unipelt.runs.sampling import few_shot, fixed_rows


@pytest.fixture
def train() -> Dataset:
    return Dataset.from_dict({"sentence": [f"row {row}" for row in range(50)], "label": list(range(50))})


@pytest.mark.parametrize("seed", [0, 42, 111])
def test_it_is_the_beginning_of_the_shuffled_split(train: Dataset, seed: int) -> None:
    shuffled = train.shuffle(seed=seed)["label"][:]
    shots, dev = few_shot(train, 10, 25, seed)
    assert shots["label"][:] == shuffled[:10]
    assert dev["label"][:] == shuffled[10:35]
    assert shots["sentence"][:] == [f"row {row}" for row in shuffled[:10]]


def test_seeds_differ_and_repeat(train: Dataset) -> None:
    first, _ = few_shot(train, 10, 10, 1)
    again, _ = few_shot(train, 10, 10, 1)
    other, _ = few_shot(train, 10, 10, 2)
    assert first["label"][:] == again["label"][:] != other["label"][:]


def test_train_and_dev_share_no_row_and_may_use_every_row(train: Dataset) -> None:
    shots, dev = few_shot(train, 20, 30, 3)
    assert sorted([*shots["label"], *dev["label"]]) == list(range(50))


def test_one_row_each_is_enough(train: Dataset) -> None:
    shots, dev = few_shot(train.select([7, 8]), 1, 1, 0)
    assert sorted([*shots["label"], *dev["label"]]) == [7, 8]


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(train: Dataset) -> None:
    small, _ = few_shot(train, 5, 5, 4)
    large, _ = few_shot(train, 20, 5, 4)
    assert large["label"][:5] == small["label"][:]


def test_a_smaller_test_set_is_the_same_rows_in_their_order() -> None:
    small, large = fixed_rows(50, 10).tolist(), fixed_rows(50, 20).tolist()
    assert small == fixed_rows(50, 10).tolist() == sorted(set(small))
    assert set(small) < set(large)
    assert small != list(range(10))
    assert (len(small), len(large), fixed_rows(5, 10).tolist()) == (10, 20, [0, 1, 2, 3, 4])


def test_too_many_rows_are_refused_with_the_numbers() -> None:
    train = Dataset.from_dict({"label": [0] * 1500})
    with pytest.raises(ValueError, match=r"train_samples 1,000 \+ dev_samples 1,000 = 2,000 rows.*1,500; lower"):
        few_shot(train, 1000, 1000, 0)


@pytest.mark.parametrize(
    ("train_samples", "dev_samples", "seed", "name"),
    [(0, 5, 0, "train_samples"), (-1, 5, 0, "train_samples"), (5, 0, 0, "dev_samples"), (5, 5, -1, "seed")],
)
def test_numbers_that_make_no_sense_are_refused(
    train: Dataset, train_samples: int, dev_samples: int, seed: int, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; give"):
        few_shot(train, train_samples, dev_samples, seed)
