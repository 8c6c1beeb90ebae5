"""Training in parts of a batch: the step is that of the whole, and what it cannot be used with is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import WORDS, make_quick, quick, save_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, DataCollatorWithPadding

from unipelt.glue import run as runner
from unipelt.glue.job import Job, prepare
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.settings import RunSettings
from unipelt.runs.batches import split_batch
from unipelt.runs.errors import RunError
from unipelt.runs.settings import SettingsError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv, dev.tsv and a model without dropout."""
    folder = make_quick(tmp_path_factory.mktemp("home"))
    config = AutoConfig.from_pretrained(folder / "model")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder / "model")
    return folder


def texts(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    """A batch of texts of these lengths, each of numbers of its own, with 0 where there is padding."""
    width = max(lengths) + 2  # some columns are padding in every row
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        own = torch.arange(1, length + 1) + 100 * (row + 1)
        ids[row, width - length if left else 0 : width if left else length] = own
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.arange(len(lengths)) * 10}


@pytest.mark.parametrize("left", [False, True])
def test_parts_are_the_batch(left: bool) -> None:
    batch = texts(2, 5, 3, 5, 1, left=left)
    parts = split_batch(batch, 6)
    assert [part["input_ids"].shape for part in parts] == [(1, 5), (1, 5), (2, 3), (1, 1)]
    assert [part["labels"].tolist() for part in parts] == [[10], [30], [20, 0], [40]], "of one length in their order"
    for part in parts:
        assert set(part) == set(batch)
        for row, label in enumerate(part["labels"].tolist()):
            own = batch["input_ids"][label // 10]
            assert part["input_ids"][row][part["attention_mask"][row] == 1].tolist() == own[own > 0].tolist()
            assert part["attention_mask"][row].tolist() == (part["input_ids"][row] > 0).long().tolist()


def test_a_batch_that_fits_stays_as_it_is() -> None:
    batch = texts(2, 5, 3)
    (alone,) = split_batch(batch, 15)
    assert all(alone[name] is batch[name] for name in batch), "in its order, with its padding: the same bits"
    assert len(split_batch(batch, 14)) == 2
    with pytest.raises(ValueError, match="budget of 1 token or more, not 0"):
        split_batch(batch, 0)


def test_texts_without_a_token() -> None:
    parts = split_batch(texts(4, 0, 0), 4)
    assert [part["input_ids"].tolist() for part in parts] == [[[101, 102, 103, 104]], [[0], [0]]]


def step(job: Job, folder: Path) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, ...]]]:
    """Loss and gradients of one step on 11 rows, and the shapes of what was passed through the model."""
    shapes: list[tuple[int, ...]] = []
    rows = job.splits["train"]
    batch = DataCollatorWithPadding(job.tokenizer)(
        [{name: rows[name][row] for name in rows.column_names} for row in range(11)]
    )
    assert len(set(batch["attention_mask"].sum(dim=1).tolist())) > 3, "of different lengths"
    trainer = runner.make_trainer(job, folder, [])
    trainer.current_gradient_accumulation_steps = 1  # which train() sets
    hook = job.model.register_forward_pre_hook(
        lambda model, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    try:
        # what Trainer counts over the steps that it accumulates
        loss = trainer.training_step(job.model, dict(batch), num_items_in_batch=torch.tensor(11))
    finally:
        hook.remove()
    return loss, {name: each.grad for name, each in job.model.named_parameters() if each.grad is not None}, shapes


@pytest.mark.parametrize("method", ["unipelt-apl", "fine-tuning"])
@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_a_step_in_parts_is_the_step_of_the_batch(
    home: Path, tmp_path: Path, family: str, method: str, regression: bool
) -> None:
    changes: dict[str, Any] = {"method": method, "regression": regression}
    if family != "bert":
        changes["model"] = str(save_model(tmp_path / "model", family))
    whole, gradients, shapes = step(prepare(RunSettings(**quick(home, **changes))), tmp_path)
    parts, others, pieces = step(prepare(RunSettings(**quick(home, **changes, train_tokens=30))), tmp_path)
    assert len(shapes) == 1
    assert len({rows for rows, _ in pieces}) > 1, "parts of different sizes, or a wrong weight would not show"
    assert sum(rows for rows, _ in pieces) == 11
    assert all(rows * tokens <= 30 for rows, tokens in pieces)
    assert sum(rows * tokens for rows, tokens in pieces) < shapes[0][0] * shapes[0][1], "less padding"
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert set(others) == set(gradients)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def record(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return runner.run(RunSettings(**quick(home, output_dir=str(out), **changes)), log=lambda line: None)


def test_a_run_in_parts_comes_to_the_same(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(batch: Any, tokens: int) -> list[Any]:
        parts = split_batch(batch, tokens)
        counts.append(len(parts))
        return parts

    monkeypatch.setattr("unipelt.runs.trainer.split_batch", counted)
    whole = record(home, tmp_path / "whole")
    assert counts == []
    parts = record(home, tmp_path / "parts", train_tokens=40)
    assert parts["settings"]["train_tokens"] == 40
    assert [each["step"] for each in parts["evaluations"]] == [each["step"] for each in whole["evaluations"]] == [4, 8]
    for one, other in zip(parts["evaluations"], whole["evaluations"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert parts["test"]["loss"] == pytest.approx(whole["test"]["loss"], rel=1e-4)
    assert len(counts) == 8
    assert max(counts) > 1


def test_a_budget_for_every_batch_changes_no_bit(home: Path, tmp_path: Path) -> None:
    whole, roomy = record(home, tmp_path / "whole"), record(home, tmp_path / "roomy", train_tokens=10_000)
    assert roomy["evaluations"] == whole["evaluations"]
    assert roomy["test"] == whole["test"]


def test_it_is_a_part_of_what_a_run_is() -> None:
    plain = RunSettings(task="rte")
    assert plain.train_tokens is None
    assert "train_tokens" not in plain.identity(), "runs from before there was the setting stay the runs that they were"
    assert len({each.digest() for each in (plain, *(RunSettings(task="rte", train_tokens=n) for n in (256, 512)))}) == 3


def test_gates_that_average_over_padding_are_refused() -> None:
    method = {"preset": "unipelt-apl", "gate": {"pooling": "mean"}}
    with pytest.raises(SettingsError, match="train_tokens changes how texts are padded"):
        RunSettings(task="rte", method=method, train_tokens=512)
    RunSettings(task="rte", method=method)


def test_a_model_that_cannot_tell_padding_is_refused(home: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    config = AutoConfig.for_model(
        "fnet",
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    AutoModel.from_config(config).save_pretrained(model)
    changes = {"model": str(model), "method": "fine-tuning", "output_dir": str(tmp_path / "out")}
    with pytest.raises(RunError, match="needs a model that can tell padding by an attention_mask, and FNet"):
        runner.run(RunSettings(**quick(home, **changes, train_tokens=40)), log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_pack_is_refused(home: Path, tmp_path: Path) -> None:
    settings = RunSettings(**quick(home, output_dir=str(tmp_path / "out"), train_tokens=40))
    outcomes = run_packed([settings], places=1, log=lambda line: None)
    assert "train_tokens and a pack exclude each other" in str(outcomes[str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
