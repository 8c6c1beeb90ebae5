"""What is found out about a run before it begins: device, folder, tokenizer, weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_task import make_quick, quick, save_model
from transformers import AutoTokenizer

from unipelt.files.progress import Progress
from unipelt.glue.job import prepare
from unipelt.glue.settings import RunSettings
from unipelt.runs.errors import RunError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_quick(tmp_path)


def edit(path: Path, **changes: Any) -> None:
    """Change a file of JSON; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_gpu_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="device is cuda, and PyTorch finds no GPU; use --device cpu"):
        prepare(RunSettings(**quick(home, device="cuda")))
    assert prepare(RunSettings(**quick(home, device="auto"))).device == "cpu"


def test_a_folder_that_cannot_be_written_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != home)
    with pytest.raises(RunError, match=f"cannot write the results: {home} is not writable; choose another"):
        prepare(RunSettings(**quick(home, output_dir=str(home / "a" / "b"))))


def test_weights_that_cannot_be_checked(home: Path) -> None:
    (home / "model" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model_sha256 is given, and .* has no model\.safetensors to check it against"):
        prepare(RunSettings(**quick(home, model_sha256="0" * 64)))


def test_a_model_without_padding_pads_with_its_end(home: Path) -> None:
    save_model(home / "model", "gpt2")
    edit(home / "model" / "config.json", pad_token_id=None)
    job = prepare(RunSettings(**quick(home)))
    assert job.tokenizer.pad_token == "[SEP]"
    assert job.model.config.pad_token_id == job.tokenizer.pad_token_id == 3


@pytest.mark.parametrize(("named", "token"), [(1, "[UNK]"), (-1, "[SEP]"), (10_000, "[SEP]")])
@pytest.mark.parametrize("own", [None, "[MASK]"])
def test_a_head_finds_the_last_token(home: Path, named: int, token: str, own: str | None) -> None:
    """The tokenizer has no padding token, or another than the configuration, which may name none that there is."""
    save_model(home / "model", "gpt2")
    edit(home / "model" / "config.json", pad_token_id=named)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.pad_token = own
    tokenizer.save_pretrained(home / "model")
    job = prepare(RunSettings(**quick(home, method="lora")))
    assert job.tokenizer.pad_token == (own or token if named != 1 else token)
    assert job.model.config.pad_token_id == job.tokenizer.pad_token_id
    rows = job.splits["dev"].select(range(12)).select_columns(["input_ids", "attention_mask"])
    assert len({len(ids) for ids in rows["input_ids"]}) > 2
    model = job.model.eval()
    with torch.no_grad():
        together = model(**job.tokenizer.pad(rows[:], return_tensors="pt")).logits
        alone = [model(**job.tokenizer.pad(rows[row : row + 1], return_tensors="pt")).logits for row in range(12)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_tokenizer_with_nothing_to_pad_with(home: Path) -> None:
    save_model(home / "model", "gpt2")
    edit(home / "model" / "config.json", pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(home / "model")
    with pytest.raises(RunError, match="has neither a padding token nor an end token to pad with"):
        prepare(RunSettings(**quick(home)))


def test_weights_that_nobody_asked_to_check_may_have_another_form(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in several files; and progress bars are as they were."""
    from transformers import AutoModel
    from transformers.utils import logging

    AutoModel.from_pretrained(home / "model").save_pretrained(home / "model", max_shard_size="4KB")
    (home / "model" / "model.safetensors").unlink(missing_ok=True)
    logging.disable_progress_bar()
    try:
        assert prepare(RunSettings(**quick(home))).model_sha256 is None
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_base_of_another_kind_of_problem(home: Path) -> None:
    """A base that was trained on several labels at once, whose configuration names the classes, too."""
    edit(home / "model" / "config.json", problem_type="multi_label_classification", id2label={"0": "x", "1": "y"})
    config = prepare(RunSettings(**quick(home))).model.config
    assert config.problem_type == "single_label_classification"
    assert (config.id2label, config.label2id, config.num_labels) == ({0: "0", 1: "1"}, {"0": 0, "1": 1}, 2)
    for name in ("train", "dev"):
        rows = [f"good cat {index}\t{index / 10}" for index in range(60)]
        (home / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    config = prepare(RunSettings(**quick(home, train_samples=30))).model.config
    assert config.problem_type == "regression"
    assert (config.id2label, config.label2id, config.num_labels) == ({0: "score"}, {"score": 0}, 1)


def test_a_lack_of_memory_is_told_with_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("unipelt.glue.job.load_model", lack)
    with pytest.raises(
        RunError, match=r"memory ran out while data and model were loaded; free some, or choose a smaller model$"
    ):
        prepare(RunSettings(**quick(home)))


def test_token_ids_are_kept_in_memory_alone(home: Path) -> None:
    before = datasets.are_progress_bars_disabled()
    job = prepare(RunSettings(**quick(home)))
    assert all(not split.cache_files for split in job.splits.values())
    assert datasets.are_progress_bars_disabled() == before


def test_the_progress_of_tokenizing_is_in_texts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []

    class Watched(Progress):
        def close(self) -> None:
            seen.append(self)
            super().close()

    monkeypatch.setattr("unipelt.glue.job.Progress", Watched)
    job = prepare(RunSettings(**quick(home)))
    assert [(one.done, one.total) for one in seen[:3]] == [(len(job.splits[name]),) * 2 for name in job.splits]
    assert [str(one).partition(",")[0] for one in seen[:2]] == [
        *("tokenizing: 48 of 48 texts", "tokenizing: 24 of 24 texts")
    ]


def test_the_majority_is_that_of_the_test_set(home: Path) -> None:
    """Three of four training rows are of one class, four of five test rows of the other."""
    for name, labels in (("train", "1110" * 12), ("dev", "00010" * 4)):
        rows = [f"good cat number {index}\t{label}" for index, label in enumerate(labels)]
        (home / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    job = prepare(RunSettings(**quick(home, train_samples=24, dev_samples=24)))
    assert job.majority == 0.8
