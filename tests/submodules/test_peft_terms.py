"""PEFT's tuners as submodules: the numbers of PEFT's own models, with gates, and all that other submodules have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake, tiny_batch
from peft_tuners import batch_of, build, gap, injected, method_of, peft_model, working_types

import unipelt
from unipelt.submodules.room import own_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT's own: BOFT looks for a compiler, FRoD builds a sparse tensor, BEFT says that it cannot merge
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
]
FEW = ("LORA", "OFT", "IA3", "VERA", "SHIRA")
"""A layer that adds, one that changes the input, one that multiplies, one with shared state, one that reads weights."""


def sample(kinds: list[str]) -> list[Any]:
    return [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", sample(working_types()))
def test_the_numbers_are_those_of_peft(kind: str, family: str) -> None:
    model = injected(kind, family)
    output, gradient = gap(model, peft_model(kind, family, model), family)
    assert output <= 1e-6
    assert gradient <= 1e-6
    unmoved = build(family)(**batch_of(family)).logits
    assert (model(**batch_of(family)).logits - unmoved).abs().max() > 1e-3, "the tuner must change something"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", sample(working_types()))
def test_a_gate_scales_the_difference(kind: str, family: str) -> None:
    model = injected(kind, family, gate=0.3)
    output, gradient = gap(model, peft_model(kind, family, model, gate=0.3), family)
    assert output <= 2e-6
    assert gradient <= 1e-5


@pytest.mark.parametrize("kind", sample(working_types()))
def test_it_is_saved_and_loaded_and_removed(kind: str, tmp_path: Path) -> None:
    base = build("bert")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    unipelt.inject(base, method_of(kind, gated=True))
    assert all(torch.equal(base.get_parameter(name), value) for name, value in before.items() if "buffer" not in name)
    shake(base)
    expected = base(**tiny_batch()).logits
    unipelt.save(base, tmp_path)
    torch.manual_seed(99)  # what PEFT draws at random comes from the checkpoint
    other = unipelt.load(build("bert"), tmp_path)
    assert torch.equal(other(**tiny_batch()).logits, expected)
    unipelt.remove(base)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("kind", sample(working_types()))
def test_the_counts_are_those_of_peft(kind: str) -> None:
    model = injected(kind, "bert")
    theirs = peft_model(kind, "bert", model)
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert unipelt.parameter_counts(model).submodules == {f"peft_{kind.lower()}": trained}


@pytest.mark.parametrize("kind", sample(working_types()))
def test_it_is_merged_or_refused_by_name(kind: str) -> None:
    model = injected(kind, "bert")
    expected = model(**tiny_batch()).logits
    if kind in ("LILY",):
        with pytest.raises(unipelt.MergeError, match="PEFT cannot merge its LILY"):
            unipelt.merge(model)
        assert torch.equal(model(**tiny_batch()).logits, expected)
    else:
        plain = unipelt.merge(model)
        assert not own_parameters(plain)
        assert (plain(**tiny_batch()).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", sample(working_types()))
def test_constant_gates_are_folded(kind: str, tmp_path: Path) -> None:
    model = injected(kind, "bert", gate=0.3)
    expected = model(**tiny_batch()).logits
    report = unipelt.fold(model, [tiny_batch()])
    assert {gate.outcome for gate in report.gates} == {"kept" if kind == "LILY" else "merged"}
    assert (model(**tiny_batch()).logits - expected).abs().max() < 1e-5
    folded = model(**tiny_batch()).logits
    unipelt.save(model, tmp_path)
    assert torch.equal(unipelt.load(build("bert"), tmp_path)(**tiny_batch()).logits, folded)
    unipelt.remove(model)
    fresh = build("bert").state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", sample(working_types()))
def test_peft_reads_it(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = injected(kind, family)
    unipelt.save_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    gap = (theirs(**batch_of(family)).logits - model(**batch_of(family)).logits).abs().max()
    assert gap <= 1e-6
