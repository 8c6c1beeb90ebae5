"""Helpers of many tests: tiny models and batches, logits, and checks that a refused call changes nothing."""

from __future__ import annotations

import os

# transformers and torch read these when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with such small tensors, threads only wait for each other

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import unipelt
from unipelt.checkpoint.manifest import MANIFEST, WEIGHTS, CheckpointError
from unipelt.pack import Pack, kept_values

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
SMALL = {"adapter": {"bottleneck": 6}, "prefix": {"length": 4, "hidden": 10}, "lora": {"rank": 3, "alpha": 5.0}}


def tiny_bert(
    num_labels: int = 2, seed: int = 0, dropout: float = 0.0, **config: object
) -> BertForSequenceClassification:
    """Return a random BERT in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**{**sizes, "num_labels": num_labels, **config})).eval()


def tiny_batch(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 7), tokens: int = 9) -> dict[str, Tensor]:
    """Return random texts of the given lengths, padded on the right: ids and mask, (len(lengths), tokens)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SIZES["vocab_size"], (len(lengths), tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def shake(model: torch.nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Move every trainable parameter away from its start, so that no term is zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))


def small(preset: str = "unipelt-apl", **changes: object) -> unipelt.UniPELTConfig:
    """Return a preset with submodules as small as the tiny model."""
    config = unipelt.resolve(preset)
    return config.updated({name: part for name, part in SMALL.items() if getattr(config, name)}).updated(changes)


def trained(preset: str = "unipelt-apl", model: Any = None, **changes: object) -> Any:
    """Return a model with a method in it, all trainable parameters moved away from their start."""
    model = unipelt.inject(tiny_bert() if model is None else model, small(preset, **changes))
    shake(model)
    return model


def logits(model: Any, batch: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    """Return a model's logits without gradients, by default for `tiny_batch()`."""
    with torch.no_grad():
        found: Tensor = model(**(tiny_batch() if batch is None else batch), **options).logits
    return found


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Check that two tensors are equal within a tolerance.

    The tolerance grows with the largest value above 1 (logits of a random mT5 are near 25).
    """
    torch.testing.assert_close(got, want, atol=tolerance * max(1.0, want.abs().max().item()), rtol=0)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def edit(folder: Path, where: str, value: object) -> None:
    """Put a value into the manifest, at a path with dots."""
    manifest = read(folder)
    *path, last = where.split(".")
    part = manifest
    for key in path:
        part = part[key]
    part[last] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


def seal(folder: Path) -> None:
    """Write the hash of the present weights into the manifest, so that a later check must find the fault."""
    edit(folder, "weights.sha256", hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


def what_is_there(model: PreTrainedModel) -> dict[str, Any]:
    """Return everything of a model that a refusal must not change."""
    modules = list(model.modules())
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": [type(module) for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "config": model.config.to_dict(),
        "training": [module.training for module in modules],
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    tensors, expected = now.pop("tensors"), before.pop("tensors")
    assert now == before
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def refused(load: Callable[[Any, Any], Any], folder: Path, *parts: str, model: Any = None) -> None:
    """Check that `load(model, folder)` raises an error with these parts in its message.

    The model must stay as it was.
    """
    base = tiny_bert() if model is None else model
    before, flags = bits(base), [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load(base, folder)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert len(str(caught.value)) < 700
    assert not hasattr(base, "unipelt_injection")
    after = bits(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flags == [parameter.requires_grad for parameter in base.parameters()]


@contextmanager
def refusing(model: PreTrainedModel, *said: str, error: type[Exception] = CheckpointError) -> Iterator[None]:
    """Check that the block raises an error with these words, and that the model is bitwise unchanged."""
    before = what_is_there(model)
    with pytest.raises(error) as caught:
        yield
    for words in said:
        assert words in str(caught.value), f"{words!r} is not in {str(caught.value)!r}"
    assert_same(what_is_there(model), before)


def assert_pack_computes_as_single_models(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
    """Check that a pack gives each replica, with values and a batch of its own, the logits of the model alone."""
    pack, values = Pack(model, tokens=9), []
    for seed in range(1, len(batches) + 1):
        shake(model, seed)
        values.append({name: value.clone() for name, value in kept_values(model).items()})
        pack.add(values[-1])
    packed = pack({name: torch.stack([batch[name] for batch in batches]) for name in batches[0]})
    for own, batch, got in zip(values, batches, packed, strict=True):
        model.load_state_dict(own, strict=False)
        with torch.no_grad():
            assert_near(got.detach(), model(**batch).logits)
