"""Checkpoints of format 1, as they were written before what is added to a layer had a room of its own.

`data/format_1` holds 24 of them, of tiny models with random weights: the base, the checkpoint, and in
`expected.safetensors` a batch and the logits that the version which wrote them computed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import bits, refused, shake, tiny_bert
from safetensors.torch import load_file, save_file
from tiny import WITHOUT_INTERFACE
from torch import Tensor
from transformers import BertModel

import unipelt
from unipelt.checkpoint.manifest import FORMAT, MANIFEST, WEIGHTS
from unipelt.submodules.room import own_parameters

FOLDER = next(up / "data" for up in Path(__file__).parents if (up / "data" / "format_1").is_dir()) / "format_1"
NAMES = sorted(path.name for path in FOLDER.iterdir())
EXPECTED = "expected.safetensors"
# a submodule of each kind, gates with and without networks, shared ones, folded ones, and each way a layer is built
SPOILT = ("bert-apl", "bert-apl-folded", "bert-apl-shared-terms", "bert-prompt", "bart-apl", "mpnet-apl", "bert-bitfit")


def read(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def base_of(name: str) -> Any:
    """The base model of a checkpoint, as it was before training."""
    kind = read(FOLDER / name)["base"]["class"]
    return getattr(transformers, kind).from_pretrained(FOLDER / name / "base").eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def batch_and_logits(name: str) -> tuple[dict[str, Tensor], Tensor]:
    batch = load_file(FOLDER / name / EXPECTED)
    return batch, batch.pop("logits")


def assert_expected(model: Any, name: str) -> None:
    batch, want = batch_and_logits(name)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6 * want.abs().max().item(), rtol=0)


def old(name: str) -> Path:
    """The folder of a checkpoint; skips one of a model that this version of Transformers gives no prefix."""
    if name.partition("-")[0] in WITHOUT_INTERFACE:
        pytest.skip("attention goes through no interface in this version of Transformers")
    return FOLDER / name


def test_all_are_there() -> None:
    assert len(NAMES) == 24
    assert {read(FOLDER / name)["format"] for name in NAMES} == {1}
    assert set(SPOILT) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_gives_the_logits_that_it_gave(name: str) -> None:
    model = base_of(name)
    batch, want = batch_and_logits(name)
    assert (logits(model, batch) - want).abs().max() > 1e-3
    assert unipelt.load(model, old(name)) is model
    assert_expected(model, name)
    whole = unipelt.from_pretrained(FOLDER / name, base=FOLDER / name / "base")
    assert torch.equal(logits(whole, batch), logits(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_one_has_its_place(name: str) -> None:
    """Also those that no logit shows: a frozen start, say."""
    model = base_of(name)
    unipelt.load(model, old(name))
    before = load_file(FOLDER / name / WEIGHTS)
    folder_of_base = bits(base_of(name))
    ours = own_parameters(model)
    if "folded" not in read(FOLDER / name):
        here = {key: p.detach() for key, p in model.named_parameters() if key in ours or key in before}
        numbers = [torch.cat([tensor.flatten() for tensor in side.values()]).sort().values for side in (before, here)]
        assert torch.equal(*numbers)
    for key, parameter in model.named_parameters():
        if key in before:
            assert torch.equal(parameter, before[key]), key
        elif key not in ours and "folded" not in read(FOLDER / name):
            assert torch.equal(parameter, folder_of_base[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_one_is_saved_in_the_present_format_which_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = unipelt.load(base_of(name), old(name))
    batch, _ = batch_and_logits(name)
    want = logits(model, batch)
    unipelt.save(model, tmp_path / "new")
    manifest, before = read(tmp_path / "new"), read(FOLDER / name)
    assert manifest["format"] == FORMAT == 2
    for key in ("deployed", "head", "unfrozen"):
        assert manifest[key] == before[key], key
    assert unipelt.UniPELTConfig.from_dict(manifest["unipelt"]) == unipelt.UniPELTConfig.from_dict(before["unipelt"])
    assert manifest["base"]["class"] == before["base"]["class"]
    assert manifest["base"]["fingerprint"]["dtype"] == before["base"]["fingerprint"]["dtype"]
    assert ("folded" in manifest) == ("folded" in before)
    if "folded" in before:
        constants = [sorted(str(gates) for gates in found["folded"].values()) for found in (manifest, before)]
        assert constants[0] == constants[1]
    again = unipelt.load(base_of(name), tmp_path / "new")
    assert torch.equal(logits(again, batch), want)
    loaded = bits(again)
    assert loaded.keys() == bits(model).keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in bits(model).items())
    whole = unipelt.from_pretrained(tmp_path / "new", base=FOLDER / name / "base")
    assert torch.equal(logits(whole, batch), want)
    unipelt.remove(again)
    assert all(torch.equal(tensor, bits(again)[key]) for key, tensor in bits(base_of(name)).items())


@pytest.mark.parametrize("name", NAMES)
def test_one_may_be_saved_for_deployment(name: str, tmp_path: Path) -> None:
    unipelt.save(unipelt.load(base_of(name), old(name)), tmp_path, deploy=True)
    assert_expected(unipelt.load(base_of(name), tmp_path), name)


# Spoilt ones


def spoil(name: str, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with other tensors, for which its manifest vouches."""
    shutil.copytree(old(name), folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    manifest = read(folder)
    manifest["weights"]["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


SPOILT_QUICKLY = [pytest.param(name, marks=[] if name == "bert-apl" else [pytest.mark.slow]) for name in SPOILT]


@pytest.mark.parametrize("name", SPOILT_QUICKLY)
def test_a_missing_tensor_of_any_name_is_found_out(name: str, tmp_path: Path) -> None:
    model = base_of(name)
    for number, key in enumerate(sorted(load_file(FOLDER / name / WEIGHTS))):
        folder = spoil(name, tmp_path / f"{number}", lambda tensors, key=key: tensors.pop(key))  # type: ignore[misc]
        refused(unipelt.load, folder, "does not fit", "it lacks '", model=model)


@pytest.mark.parametrize("name", SPOILT_QUICKLY)
def test_a_tensor_of_another_shape_under_any_name_is_found_out(name: str, tmp_path: Path) -> None:
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
        "turned": lambda tensor: tensor.t().contiguous() if tensor.dim() == 2 else tensor[None],
        "nothing": lambda tensor: tensor[:0],
        "one number": lambda tensor: tensor.flatten()[0].clone(),
    }
    model = base_of(name)
    tensors = load_file(FOLDER / name / WEIGHTS)
    tensors = {key: tensor for key, tensor in tensors.items() if "layers.1." not in key}  # BART has many
    for number, (key, tensor) in enumerate(sorted(tensors.items())):
        for shape, make in shapes.items():
            if make(tensor).shape == tensor.shape:
                continue
            folder = spoil(
                name,
                tmp_path / f"{number} {shape}",
                lambda tensors, key=key, make=make: tensors.update({key: make(tensors[key])}),  # type: ignore[misc]
            )
            refused(unipelt.load, folder, "does not fit", model=model)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize(
    "extra",
    [
        "surprise",
        "bert.encoder.layer.9.attention.self.gates.weight",
        "bert.encoder.layer.0.attention.self.gates.scale",
        "bert.encoder.layer.0.attention.self.key.lora_value.A",
        "bert.embeddings.word_embeddings.weight",
    ],
)
def test_an_unknown_name_is_found_out(name: str, extra: str, tmp_path: Path) -> None:
    folder = spoil(name, tmp_path / "spoilt", lambda tensors: tensors.update({extra: torch.zeros(2, 16)}))
    refused(unipelt.load, folder, "does not fit", "the model has no", extra, model=base_of(name))


@pytest.mark.parametrize("name", SPOILT)
def test_a_name_of_the_present_format_is_found_out(name: str, tmp_path: Path) -> None:
    """Beside the old names, or in their place."""
    new = unipelt.save(unipelt.load(base_of(name), old(name)), tmp_path / "new")
    tensors = load_file(new / WEIGHTS)
    ours = {key: tensor for key, tensor in tensors.items() if ".unipelt." in f".{key}"}
    if not ours:
        return  # biases alone
    for number, given in enumerate((ours, dict(sorted(ours.items())[:1]))):
        folder = spoil(name, tmp_path / f"{number}", lambda there, given=given: there.update(given))  # type: ignore[misc]
        refused(unipelt.load, folder, "of format 1, which has no tensor '", model=base_of(name))
    manifest = read(new) | {"format": 1}
    (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    refused(unipelt.load, new, "of format 1, which has no tensor '", model=base_of(name))


def test_a_row_that_went_over_to_another_tensor_is_found_out(tmp_path: Path) -> None:
    """Together they have as many rows as they should."""
    host = "bert.encoder.layer.0.attention.self"

    def change(tensors: dict[str, Tensor]) -> None:
        gates, down = tensors[f"{host}.gates.weight"], tensors[f"{host}.query.lora_query.A"]
        tensors[f"{host}.gates.weight"] = torch.cat([gates, down[:1]])
        tensors[f"{host}.query.lora_query.A"] = down[1:].clone()

    folder = spoil("bert-apl", tmp_path / "spoilt", change)
    refused(
        unipelt.load, folder, "does not fit its own configuration", "gates.weight is (4, 16)", model=base_of("bert-apl")
    )


def test_whole_numbers_are_found_out(tmp_path: Path) -> None:
    for number, key in enumerate(sorted(load_file(FOLDER / "bert-apl" / WEIGHTS))):
        folder = spoil(
            "bert-apl",
            tmp_path / f"{number}",
            lambda tensors, key=key: tensors.update({key: tensors[key].long()}),  # type: ignore[misc]
        )
        refused(unipelt.load, folder, "torch.int64", model=base_of("bert-apl"))


def test_constants_of_gates_that_are_not_there_are_found_out(tmp_path: Path) -> None:
    for name in ("bert-apl-folded", "llama-apl-folded"):
        for number, path in enumerate(("bert.encoder.layer.7.attention.self.gates", "", "model.layers.0.unipelt")):
            folder = tmp_path / f"{name} {number}"
            shutil.copytree(FOLDER / name, folder)
            manifest = read(folder)
            manifest["folded"][path] = {"prefix": 0.5}
            (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            said = f"cannot be folded again: the model has no gate 'prefix' at {path!r}"
            refused(unipelt.load, folder, said, model=base_of(name))


def test_a_prompt_of_a_model_without_a_head(tmp_path: Path) -> None:
    """Its entry is the model itself, so no path stands before the old name."""

    def base() -> Any:
        torch.manual_seed(0)
        return BertModel(tiny_bert().config)

    model = unipelt.inject(base(), {"preset": "prompt", "prompt": {"length": 3}})
    shake(model)
    unipelt.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({"prompt.embedding": tensors.pop("unipelt.default.prompt.embedding"), **tensors}, tmp_path / WEIGHTS)
    manifest = {**read(tmp_path), "format": 1}
    manifest["weights"]["sha256"] = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    before, after = bits(model), bits(unipelt.load(base(), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_base_is_found_out() -> None:
    other = base_of("bert-nogate")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1
    refused(unipelt.load, FOLDER / "bert-nogate", "weights differ", model=other)
