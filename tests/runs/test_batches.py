"""Batches of evaluation: what they hold, and that no figure depends on how rows are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert
from tiny_task import make_quick, quick
from transformers import DataCollatorWithPadding

from unipelt.glue import job
from unipelt.glue import run as runner
from unipelt.glue.settings import RunSettings
from unipelt.runs import batches
from unipelt.runs.batches import Batches, default_tokens, materialize, pack_rows, pack_tokens, padded_tokens
from unipelt.runs.settings import SettingsError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, train.tsv and dev.tsv."""
    return make_quick(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([5, 5, 4, 2, 2, 2, 1], 10, [(0, 2), (2, 4), (4, 7)]),
        ([5, 5, 4, 2, 2, 2, 1], 9, [(0, 1), (1, 2), (2, 4), (4, 7)]),
        ([9, 3, 3], 6, [(0, 1), (1, 3)]),  # too long for any batch: alone
        ([2, 1], 1, [(0, 1), (1, 2)]),
        ([1, 1, 6, 1], 6, [(0, 2), (2, 3), (3, 4)]),  # not sorted: the longest row counts, wherever it is
        ([3, 3], 100, [(0, 2)]),
        ([0, 0, 0], 2, [(0, 3)]),  # a text may be empty
        ([], 10, []),
    ],
)
def test_as_many_rows_as_fit(lengths: list[int], tokens: int, expected: list[tuple[int, int]]) -> None:
    assert pack_tokens(lengths, tokens) == [range(*ends) for ends in expected]


def test_every_row_once_and_no_batch_above_the_budget() -> None:
    lengths = sorted(np.random.default_rng(0).integers(3, 60, size=500).tolist(), reverse=True)
    packed = pack_tokens(lengths, 256)
    assert [row for rows in packed for row in rows] == list(range(500))
    for rows, after in zip(packed, [*packed[1:], None], strict=True):
        assert len(rows) * lengths[rows[0]] <= 256
        assert after is None or (len(rows) + 1) * lengths[rows[0]] > 256, "one more would have fitted"
    assert padded_tokens(lengths, packed) < padded_tokens(lengths, pack_rows(500, 64))
    assert padded_tokens(lengths, packed) >= sum(lengths) == padded_tokens(lengths, pack_rows(500, 1))


def test_batches_of_rows() -> None:
    assert pack_rows(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    for pack in (pack_rows(7, 7), pack_rows(7, 8)):
        assert pack == [range(7)]


def test_budgets_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="budget of 1 token or more, not 0"):
        pack_tokens([1], 0)
    with pytest.raises(ValueError, match="1 row or more, not 0"):
        pack_rows(1, 0)
    with pytest.raises(SettingsError, match="eval_tokens must be 0 or more, not -1"):
        RunSettings(task="rte", eval_tokens=-1)


def test_budget_is_no_part_of_what_a_run_is() -> None:
    assert RunSettings(task="rte", eval_tokens=5).digest() == RunSettings(task="rte").digest()


def test_a_gpu_has_larger_batches() -> None:
    assert default_tokens("cuda") > default_tokens("cpu") > 0


def prepared(home: Path, **changes: Any) -> job.Job:
    return job.prepare(RunSettings(**quick(home, **changes)))


def test_a_batch_is_its_rows_padded_to_the_longest(home: Path) -> None:
    ready = prepared(home, eval_tokens=40)
    split, made = ready.splits["dev"], runner.evaluated(ready, "dev")
    sizes = [len(made[index]["labels"]) for index in range(len(made))]
    assert sum(sizes) == len(split) == 24
    assert len(set(sizes)) > 1
    row = 0
    for index, size in enumerate(sizes):
        batch, ids = made[index], split["input_ids"][row : row + size]
        assert type(batch) is dict
        assert batch["input_ids"].shape == (size, len(ids[0]))
        assert batch["input_ids"].numel() <= 40
        assert [list(given[: len(own)]) for given, own in zip(batch["input_ids"], ids, strict=True)] == ids
        assert batch["attention_mask"].sum(dim=1).tolist() == [len(own) for own in ids]
        assert batch["labels"].tolist() == split["label"][row : row + size]
        row += size


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    split = Dataset.from_dict({"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "strange": [[7, 7]], "label": [1]})
    made = Batches(
        split, [range(1)], lambda rows: {name: torch.tensor([rows[0][name]]) for name in rows[0]}, tiny_bert()
    )
    assert set(made[0]) == {"input_ids", "attention_mask", "label"}


def outcome(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """The record of a run with dropout, over two epochs."""
    chosen = RunSettings(**quick(home, output_dir=str(out), train_samples=40, **changes))
    return runner.run(chosen, log=lambda line: None)


def test_figures_do_not_depend_on_the_batches(home: Path, tmp_path: Path) -> None:
    """Batches of uneven sizes against one row a batch, where the loss of a batch is that of its example."""
    single = outcome(home, tmp_path / "single", eval_tokens=0, eval_batch_size=1)
    record = outcome(home, tmp_path / "tokens", eval_tokens=40)
    assert len(record["evaluations"]) == len(single["evaluations"]) == 2
    for one, other in zip(record["evaluations"], single["evaluations"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert record["best"] == single["best"]
    assert record["test"]["metrics"] == single["test"]["metrics"]
    assert record["test"]["loss"] == pytest.approx(single["test"]["loss"], rel=1e-5)
    assert record["gates"]["examples"] == single["gates"]["examples"] == 20
    for gate, values in record["gates"]["values"].items():
        assert values["mean"] == pytest.approx(single["gates"]["values"][gate]["mean"], rel=1e-5)


def test_dev_is_padded_once_a_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    collate = Batches.__getitem__

    def count(self: Batches, index: int) -> Any:
        asked.append((len(self), index))
        return collate(self, index)

    monkeypatch.setattr(Batches, "__getitem__", count)
    outcome(home, tmp_path / "out", eval_tokens=60)
    assert len(asked) == len(set(asked)), "a batch was made twice"


def test_loader_draws_as_trainers_own(home: Path, tmp_path: Path) -> None:
    """Dropout after an evaluation is that of Trainer's own evaluation, which draws once from the generator."""
    ready = prepared(home)
    dev = materialize(runner.evaluated(ready, "dev"), "cpu")
    trainer = runner.BatchTrainer(model=ready.model, args=runner._arguments(ready, tmp_path), eval_dataset=dev)
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer.evaluate()
    assert torch.equal(torch.rand(1), expected)


def test_trainer_speaks_of_rows(home: Path, tmp_path: Path) -> None:
    ready = prepared(home, eval_tokens=40)
    dev = materialize(runner.evaluated(ready, "dev"), "cpu")
    trainer = runner.BatchTrainer(model=ready.model, args=runner._arguments(ready, tmp_path), eval_dataset=dev)
    output = trainer.predict(runner.evaluated(ready, "dev"))
    metrics = output.metrics
    assert metrics is not None
    assert len(output.predictions) == 24
    rate = metrics["test_samples_per_second"] * metrics["test_runtime"]
    assert rate == pytest.approx(24, rel=0.05)
    with torch.no_grad():
        whole = DataCollatorWithPadding(ready.tokenizer)(
            [{name: ready.splits["dev"][name][row] for name in ready.splits["dev"].column_names} for row in range(24)]
        )
        expected = ready.model.eval()(**whole)
    assert metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    np.testing.assert_allclose(output.predictions, expected.logits.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("small", [True, False])
def test_small_splits_are_held_on_the_device(home: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    if not small:
        monkeypatch.setattr(batches, "_SMALL", 8)
    made = materialize(runner.evaluated(prepared(home), "dev"), "meta")
    assert {tensor.device.type for batch in made for tensor in batch.values()} == {"meta" if small else "cpu"}
