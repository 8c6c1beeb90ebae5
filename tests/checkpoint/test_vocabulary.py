"""A base with a resized vocabulary comes back with its rows, and a fingerprint sees every number of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import edit, read, refusing, shake, small, tiny_bert, trained
from tiny import tiny_model
from torch import Tensor

import unipelt
from unipelt.checkpoint.base_model import describe_base
from unipelt.checkpoint.manifest import SAMPLE

ROWS = 62
HEADS = {
    "bert": "SequenceClassification",
    "modernbert": "MaskedLM",
    "llama": "CausalLM",
    "gpt2": "CausalLM",
    "t5": "Seq2SeqLM",
    "bart": "Seq2SeqLM",
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def pretrained(folder: Path, family: str, tied: bool | None = None) -> Any:
    """A base that came from a folder."""
    auto: Any = getattr(transformers, f"AutoModelFor{HEADS[family]}")
    if not folder.is_dir():
        changes: dict[str, Any] = {} if tied is None else {"tie_word_embeddings": tied}
        own = tiny_model(family, HEADS[family], **changes)
        own.save_pretrained(folder)
    return auto.from_pretrained(folder)


def resized(model: Any, seed: int = 0, rows: int = ROWS) -> Any:
    """The model with other rows, each moved, of the output head too."""
    model.resize_token_embeddings(rows)
    generator = torch.Generator().manual_seed(seed)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            with torch.no_grad():
                module.weight[-2:] += torch.randn(2, module.weight.shape[1], generator=generator)
    return model


def answer(model: Any) -> Tensor:
    ids = torch.tensor([[5, 60, 61, 9], [61, 7, 60, 8]])
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, **given).logits
    return found


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *(("bert", None), ("modernbert", True), ("modernbert", False), ("llama", False), ("llama", True)),
        *(("gpt2", True), ("t5", False), ("t5", True), ("bart", None)),
    ],
)
def test_a_resized_base_comes_back(tmp_path: Path, family: str, tied: bool | None, late: bool) -> None:
    model = pretrained(tmp_path / "base", family, tied)
    if not late:
        resized(model)
    unipelt.inject(model, small("lora"))
    if late:
        resized(model)
    vocabulary = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    assert not any(parameter.requires_grad for module in vocabulary for parameter in module.parameters()), "frozen"
    shake(model)
    expected = answer(model)
    unipelt.save(model, tmp_path / "a")
    again: Any = unipelt.from_pretrained(tmp_path / "a")
    assert torch.equal(answer(again), expected)
    assert not any(p.requires_grad for p in again.get_input_embeddings().parameters())

    unipelt.save(again, tmp_path / "b")
    assert torch.equal(answer(unipelt.from_pretrained(tmp_path / "b")), expected), "and from there once more"
    theirs = resized(pretrained(tmp_path / "base", family, tied), seed=5)
    before = answer(theirs)
    assert torch.equal(answer(unipelt.load(theirs, tmp_path / "a")), expected), "a base with other rows gets these"
    assert torch.equal(answer(unipelt.remove(theirs)), before), "and has its own again"


def test_fewer_rows(tmp_path: Path) -> None:
    model = pretrained(tmp_path / "base", "bert").eval()
    model.resize_token_embeddings(50)
    unipelt.inject(model, small("lora"))
    unipelt.save(model, tmp_path / "a")
    again: Any = unipelt.from_pretrained(tmp_path / "a")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_rows_that_train(tmp_path: Path) -> None:
    model: Any = unipelt.inject(resized(pretrained(tmp_path / "base", "llama", False)), small("lora"))
    model.get_input_embeddings().weight.requires_grad_(True)
    shake(model)
    unipelt.save(model, tmp_path / "a")
    assert torch.equal(answer(unipelt.from_pretrained(tmp_path / "a")), answer(model))


@pytest.mark.parametrize("rows", [None, 64])
def test_a_base_of_another_size_is_refused(tmp_path: Path, rows: int | None) -> None:
    unipelt.save(unipelt.inject(resized(pretrained(tmp_path / "base", "bert")), small("lora")), tmp_path / "a")
    other: Any = pretrained(tmp_path / "base", "bert")
    if rows is not None:
        other.resize_token_embeddings(rows)
    with refusing(other, "vocab_size was 62", "resize_token_embeddings"):
        unipelt.load(other, tmp_path / "a")


def test_the_rest_of_a_resized_base_is_checked(tmp_path: Path) -> None:
    unipelt.save(unipelt.inject(resized(pretrained(tmp_path / "base", "bert")), small("lora")), tmp_path / "a")
    other: Any = resized(pretrained(tmp_path / "base", "bert"))
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 3] += 1e-3
    with refusing(other, "its weights differ"):
        unipelt.load(other, tmp_path / "a")


def test_a_resized_base_that_was_built_in_memory(tmp_path: Path) -> None:
    model: Any = unipelt.inject(resized(tiny_bert()), small("lora"))
    unipelt.save(model, tmp_path)
    other: Any = resized(tiny_bert(), seed=1)
    with refusing(other, "its weights differ"):
        unipelt.load(other, tmp_path)
    assert torch.equal(answer(unipelt.load(resized(tiny_bert()), tmp_path)), answer(model))


@pytest.mark.parametrize("rows", [10**12, 10**4])
def test_a_manifest_with_rows_that_no_tensor_has(tmp_path: Path, rows: int) -> None:
    unipelt.save(unipelt.inject(resized(pretrained(tmp_path / "base", "bert")), small("lora")), tmp_path / "a")
    edit(tmp_path / "a", "base.config.vocab_size", rows)
    with pytest.raises(unipelt.CheckpointError, match=f"'vocab_size' is {rows}, and no tensor has that size"):
        unipelt.from_pretrained(tmp_path / "a")


def test_a_trained_base_parameter_is_kept_over_two_rounds(tmp_path: Path) -> None:
    model: Any = unipelt.inject(pretrained(tmp_path / "base", "bert"), small("lora"))
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    shake(model)
    for name in ("a", "b", "c"):
        unipelt.save(model, tmp_path / name)
        found: Any = unipelt.from_pretrained(tmp_path / name)
        assert found.bert.encoder.layer[0].output.dense.weight.equal(model.bert.encoder.layer[0].output.dense.weight)
        model = found


# --- the fingerprint


def of(dtype: torch.dtype) -> Any:
    model: Any = tiny_bert()
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_a_base_counts(tmp_path: Path, dtype: torch.dtype) -> None:
    unipelt.save(unipelt.inject(of(dtype), small("lora")), tmp_path)
    unipelt.load(of(dtype), tmp_path)
    names = [name for name, _ in tiny_bert().named_parameters() if not name.startswith("classifier")]
    for name in (names[0], names[7], names[-1]):
        model = of(dtype)
        weight = model.get_parameter(name).data.view(-1)
        weight[weight.numel() - 2] = 3.0
        with refusing(model, "its weights differ"):
            unipelt.load(model, tmp_path)


def test_a_parameter_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = unipelt.inject(tiny_bert(), small("lora"))
    found = []
    for size in (2**24, 7):
        monkeypatch.setattr("unipelt.checkpoint.base_model._BLOCK", size)
        found.append(describe_base(model, dict(model.named_parameters()))["fingerprint"])
    assert found[0] == found[1]
    assert found[0]["covers"] == "all numbers"


def test_a_checkpoint_with_the_fingerprint_of_a_sample_still_loads(tmp_path: Path) -> None:
    model = trained("lora")
    unipelt.save(model, tmp_path)
    sampled = describe_base(model, dict(model.named_parameters()), covers=SAMPLE)["fingerprint"]
    assert sampled == {"sha256": sampled["sha256"], "dtype": "float32"}
    assert sampled["sha256"] != read(tmp_path)["base"]["fingerprint"]["sha256"]
    edit(tmp_path, "base.fingerprint", sampled)
    unipelt.load(tiny_bert(), tmp_path)
    other = tiny_bert(seed=3)
    with refusing(other, "its weights differ"):
        unipelt.load(other, tmp_path)
    edit(tmp_path, "base.fingerprint.covers", "half")
    with pytest.raises(unipelt.CheckpointError, match=r"fingerprint.covers must be 'all numbers' or 'a sample'"):
        unipelt.load(tiny_bert(), tmp_path)
