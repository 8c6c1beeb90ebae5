"""Models whose weights accelerate keeps elsewhere, and brings in for each module's forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers import shake
from tiny import tiny_batch, tiny_model

import unipelt

METHODS: tuple[Any, ...] = ("unipelt-apl", "unipelt", "houlsby", {"preset": "unipelt-al", "gate": {"shared": True}})


@pytest.mark.parametrize(
    ("method", "family", "where"),
    [
        *((method, family, "cpu") for method in METHODS for family in ("bert", "llama", "bart")),
        *(("unipelt-apl", family, "disk") for family in ("bert", "llama", "bart")),
    ],
    ids=str,
)
def test_an_offloaded_model_gives_the_same_bits(family: str, method: Any, where: str, tmp_path: Path) -> None:
    model = unipelt.inject(tiny_model(family), method)
    shake(model)
    batch = tiny_batch(family)
    with torch.no_grad():
        want = model(**batch).logits
        if where == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_that_was_offloaded_first(family: str, tmp_path: Path) -> None:
    there, here, batch = tiny_model(family), tiny_model(family), tiny_batch(family)
    accelerate.disk_offload(there, tmp_path, torch.device("cpu"))
    logits = []
    for base in (there, here):
        torch.manual_seed(1)
        with torch.no_grad():
            logits.append(unipelt.inject(base, "unipelt-apl")(**batch).logits)
    assert torch.equal(*logits)


def test_a_model_without_numbers_is_refused_and_left_alone() -> None:
    model = tiny_model("bert").to("meta")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(
        unipelt.InjectionError, match=r"weight is on the device meta and has no numbers.*load the model"
    ):
        unipelt.inject(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not hasattr(model, "unipelt_injection")
