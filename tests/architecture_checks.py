"""The checks of a method on one small model, for `coverage_table.py` and `tests/hosts/test_architectures.py`.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import inspect
import tempfile
from typing import Any

import torch
from tiny import CACHE
from torch import Tensor

import unipelt
from unipelt.hosts.description import Family
from unipelt.hosts.inputs import text_batch
from unipelt.injection.parameters import kept_names
from unipelt.submodules.room import own_parameters

PARTS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3, "alpha": 6.0},
}
_HEADS_THAT_TRAIN = ("SequenceClassification",)
_PADDED = 2  # `text_batch` ends the second text with this many padding tokens
_CACHED = 5  # the number of tokens that go into the cache first

Batch = dict[str, Any]


def method_config(method: str) -> unipelt.UniPELTConfig:
    """Return the configuration of a preset, with small submodules; the adapter of the preset `adapter` gets a gate."""
    config = unipelt.resolve(method)
    config = config.updated({name: part for name, part in PARTS.items() if config.part(name)})
    return config.updated({"adapter": {"gate": True}}) if method == "adapter" else config


def batch_of(model: Any, head: str, family: Family) -> Batch:
    """Return inputs with which a small model runs: texts alone if the model takes them, else texts and images."""
    signature = inspect.signature(model.forward).parameters
    stack = family.stacks[0]
    crosses = len(family.stacks) == 1 and stack.cross is not None and "input_ids" in signature
    crosses = crosses and not model.config.is_encoder_decoder
    there = crosses and any(stack.cross is not None and stack.cross.path in name for name, _ in model.named_modules())
    two = head in ("Seq2SeqLM", "MaskedLM", "ImageTextToText")
    if head != "ImageTextToText":
        return text_batch(model, crossing=there, two=two)
    try:
        output(model, text_batch(model, two=two))
    except Exception:  # what fails with images too fails again in the check itself
        return text_batch(model, two=two, images=True)
    return text_batch(model, two=two)


def check(model: Any, other: Any, method: str, head: str, batch: Batch) -> list[str]:
    """Do with a model everything that the page says, and raise an error at the first thing that is wrong.

    Args:
        model, other: two equal small models.
        method: name of a preset.
        head: the end of the name of the model's `AutoModelFor...`.
        batch: inputs of the model.

    Returns:
        The properties (`padding`, `causal`, `cache`) that the bare model has, and that it kept with the method.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = output(model, batch)
    if not bare.isfinite().all():
        raise AssertionError("the small model's own output is not finite")
    properties = [name for name, holds in PROPERTIES.items() if _holds(holds, model, head, batch)]
    unipelt.inject(model, method_config(method))
    _check_frozen(model, head)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    out = _first(model, batch)
    if torch.allclose(out, bare):
        raise AssertionError("the output does not change")
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    for name, parameter in own_parameters(model).items():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise AssertionError(f"{name} gets no gradient")
    for name in properties:
        if not PROPERTIES[name](model, head, batch):
            raise AssertionError(f"the bare model keeps {name}, and the injected model does not")
    _check_saved(model, other, batch)
    unipelt.remove(model)
    after = model.state_dict()
    if list(after) != list(before) or not all(torch.equal(tensor, before[name]) for name, tensor in after.items()):
        raise AssertionError("the model is another after removal")
    if not torch.equal(output(model, batch), bare):
        raise AssertionError("the output is another after removal")
    return properties


def _check_frozen(model: Any, head: str) -> None:
    """Check that nothing but the submodules (and a task's head) trains, and that the counts say so."""
    ours = own_parameters(model)
    counts = unipelt.parameter_counts(model)
    own = sum(parameter.numel() for parameter in ours.values() if parameter.requires_grad)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in ours)
    if head not in _HEADS_THAT_TRAIN:
        if strangers := [name for name, one in model.named_parameters() if one.requires_grad and name not in ours]:
            raise AssertionError(f"{strangers[0]} trains, and belongs to the pretrained model")
        if counts.head or counts.base != total:
            raise AssertionError(f"{counts.base} parameters are counted as the base's, and it has {total}")
    if counts.trained != own:
        raise AssertionError(f"{counts.trained} parameters are counted as trained, and {own} are")


def _check_saved(model: Any, other: Any, batch: Batch) -> None:
    """Check that a checkpoint holds what trains and nothing else, and gives the same output when it is loaded."""
    want = output(model, batch)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strangers := sorted(set(kept_names(model)) - trains - set(own_parameters(model))):
        raise AssertionError(f"{strangers[0]} is saved, and does not train")
    with tempfile.TemporaryDirectory() as folder:
        unipelt.save(model, folder)
        unipelt.load(other, folder)
    if not torch.equal(output(other, batch), want):
        raise AssertionError("what was loaded gives another output")


def _first(model: Any, batch: Batch) -> Tensor:
    out = model(**batch)
    logits: Tensor = out["logits"] if "logits" in out else out[0]
    return logits


@torch.no_grad()
def output(model: Any, batch: Batch) -> Tensor:
    """Return a model's logits or, without logits, its first output."""
    return _first(model, batch)


def _holds(holds: Any, model: Any, head: str, batch: Batch) -> bool:
    """Return whether a bare model has a property; a model that cannot be run in the way of the check has not."""
    try:
        return bool(holds(model, head, batch))
    except Exception:
        return False


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def keeps_padding_out(model: Any, head: str, batch: Batch) -> bool:
    """Return whether a text with padding gives what it gives alone."""
    ids = batch["input_ids"].clone()
    ids[1, -_PADDED - 1] = ids[0, -1]  # the token that ends a text
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids[1, -_PADDED:] = 0 if padding is None else padding
    whole = {**batch, "input_ids": ids}
    short = {name: value[1:] for name, value in whole.items()}
    for name in ("input_ids", "attention_mask"):
        short[name] = short[name][:, :-_PADDED]
    alone = output(model, short)
    padded = output(model, whole)[1:]
    if padded.dim() == 3 and padded.shape[1] != alone.shape[1]:
        padded = padded[:, : alone.shape[1]]
    return _close(padded, alone)


def _decoded(head: str, batch: Batch) -> tuple[str, Batch]:
    """Return the name of the text that a model continues, and its batch without padding."""
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    whole = {key: torch.ones_like(value) if key == "attention_mask" else value for key, value in batch.items()}
    return name, whole


def is_causal(model: Any, head: str, batch: Batch) -> bool:
    """Return whether a changed token changes no earlier output."""
    if head not in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        return False
    name, whole = _decoded(head, batch)
    changed = whole[name].clone()
    changed[:, _CACHED:] = changed[:, _CACHED:].flip(0)
    before, after = output(model, whole), output(model, {**whole, name: changed})
    return _close(before[:, :_CACHED], after[:, :_CACHED]) and not _close(before, after)


def is_cached(model: Any, head: str, batch: Batch) -> bool:
    """Return whether the end of a text gives the same with a cache of the beginning as the text in one piece."""
    if head not in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        return False
    name, whole = _decoded(head, batch)
    ids = whole[name]
    want = output(model, whole)[:, _CACHED:]
    first, second = {**whole, name: ids[:, :_CACHED]}, {**whole, name: ids[:, _CACHED:]}
    if name == "input_ids" and "attention_mask" in whole:
        first["attention_mask"] = whole["attention_mask"][:, :_CACHED]
    with torch.no_grad():
        found = model(**first, use_cache=True)
        cache = found["past_key_values" if "past_key_values" in found else "cache"]
        got = _first(model, {**second, CACHE: cache, "use_cache": True})
    return cache is not None and _close(got, want)


PROPERTIES = {"padding": keeps_padding_out, "causal": is_causal, "cache": is_cached}
"""Name -> the function that returns whether a model has the property on a batch."""
