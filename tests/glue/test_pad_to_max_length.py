"""Texts that are all padded to `max_length`, as the authors' program does by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import make_quick, quick
from torch import Tensor
from transformers import DataCollatorWithPadding

from unipelt.glue.job import Job, prepare
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings, SettingsError
from unipelt.runs.batches import Batches

LONG = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick(tmp_path_factory.mktemp("home"))


def made(home: Path, whole: bool, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, max_length=LONG, pad_to_max_length=whole, **changes))


def logits(job: Job) -> Tensor:
    """Of all training rows, in their order, as a batch."""
    rows = job.splits["train"]
    batch = Batches(rows, [range(len(rows))], DataCollatorWithPadding(job.tokenizer), job.model)[0]
    batch.pop("labels")
    job.model.eval()
    with torch.no_grad():
        return job.model(**batch).logits


def test_every_text_of_every_part_is_padded(home: Path) -> None:
    whole, plain = prepare(made(home, True)), prepare(made(home, False))
    assert set(whole.splits) == set(plain.splits)
    for name, split in whole.splits.items():
        assert {len(ids) for ids in split["input_ids"]} == {LONG}, name
        real = sorted(sum(mask) for mask in split["attention_mask"])
        assert real == sorted(len(ids) for ids in plain.splits[name]["input_ids"]), name
        assert real[0] < real[-1] < LONG, "or padding would make no difference"


@pytest.mark.parametrize(("pooling", "same"), [("masked_mean", True), ("mean", False)])
def test_it_matters_where_gates_average_over_padding_alone(home: Path, pooling: str, same: bool) -> None:
    method = {"preset": "unipelt-apl", "gate": {"pooling": pooling}}
    found = []
    for whole in (True, False):
        job = prepare(made(home, whole, method=method))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, weight in job.model.named_parameters():
                if weight.requires_grad and name.endswith(("weight", "bias")):
                    weight.copy_(0.3 * torch.randn(weight.shape))
        found.append(logits(job))
    assert torch.allclose(found[0], found[1], atol=1e-5) is same


def test_a_run_and_a_packed_run_take_it(home: Path, tmp_path: Path) -> None:
    settings = made(home, True, output_dir=str(tmp_path / "alone"))
    record = run(settings, log=lambda line: None)
    assert record["settings"]["pad_to_max_length"] is True
    packed = made(home, True, output_dir=str(tmp_path / "packed"))
    outcome = run_packed([packed], 1, log=lambda line: None)[str(tmp_path / "packed")]
    assert isinstance(outcome, dict), outcome
    assert outcome["settings"]["pad_to_max_length"] is True
    assert outcome["digest"] == record["digest"]


def test_runs_from_before_it_stay_the_runs_that_they_were() -> None:
    plain = RunSettings(task="rte")
    assert plain.pad_to_max_length is False
    assert "pad_to_max_length" not in plain.identity()
    whole = RunSettings(task="rte", pad_to_max_length=True)
    assert whole.identity()["pad_to_max_length"] is True
    assert whole.digest() != plain.digest()


def test_it_does_not_go_with_a_setting_that_saves_padding() -> None:
    with pytest.raises(SettingsError, match="train_tokens saves padding, and pad_to_max_length adds it"):
        RunSettings(task="rte", train_tokens=512, pad_to_max_length=True)
