"""PEFT's tuners as submodules: the numbers of PEFT's own models, with gates, and all that other submodules have."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake, tiny_batch
from peft_tuners import batch_of, build, gap, injected, method_of, peft_model, working_types
from tiny import tiny_batch as family_batch
from tiny import tiny_model

import unipelt
from unipelt.hosts.locate import InjectionError
from unipelt.pack import Pack, PackError
from unipelt.submodules.room import own_buffers, own_parameters, placed_terms

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
FEWER = ("OFT", "VERA", "SHIRA")


WORKING = [kind if kind in FEWER else pytest.param(kind, marks=pytest.mark.slow) for kind in working_types()]
"""All types that work; all but a few are slow."""


# tests/submodules/test_peft_table.py compares the numbers of all types
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", FEW)
def test_the_numbers_are_those_of_peft(kind: str, family: str) -> None:
    model = injected(kind, family)
    output, gradient = gap(model, peft_model(kind, family, model), family)
    assert output <= 1e-6
    assert gradient <= 1e-6
    unmoved = build(family)(**batch_of(family)).logits
    assert (model(**batch_of(family)).logits - unmoved).abs().max() > 1e-3, "the tuner must change something"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", [*FEW, "C3A"])  # C3A adds to the host's output in place
def test_a_gate_scales_the_difference(kind: str, family: str) -> None:
    model = injected(kind, family, gate=0.3)
    output, gradient = gap(model, peft_model(kind, family, model, gate=0.3), family)
    assert output <= 2e-6
    assert gradient <= 1e-5


@pytest.mark.parametrize("kind", WORKING)
def test_it_is_saved_and_loaded_and_removed(kind: str, tmp_path: Path) -> None:
    base = build("bert")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    unipelt.inject(base, method_of(kind, gated=True))
    assert all(torch.equal(base.get_parameter(name), value) for name, value in before.items() if "buffer" not in name)
    shake(base)
    state = base.state_dict()
    expected = base(**tiny_batch()).logits
    assert base.state_dict().keys() == state.keys(), "a pass changes no buffer's place in the state dict"
    base.load_state_dict(state)
    unipelt.save(base, tmp_path)
    torch.manual_seed(99)  # what PEFT draws at random comes from the checkpoint
    other = unipelt.load(build("bert"), tmp_path)
    assert torch.equal(other(**tiny_batch()).logits, expected)
    unipelt.remove(base)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_boft_leaves_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its search for a compiler sets `CXX`, and libraries that `torch.compile` makes with it cannot be loaded."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "c++")
    before = dict(os.environ)
    unipelt.inject(build("bert"), method_of("BOFT"))
    assert dict(os.environ) == before


@pytest.mark.parametrize("kind", WORKING)
def test_the_counts_are_those_of_peft(kind: str) -> None:
    model = injected(kind, "bert")
    theirs = peft_model(kind, "bert", model)
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert unipelt.parameter_counts(model).submodules == {f"peft_{kind.lower()}": trained}


@pytest.mark.parametrize("kind", WORKING)
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


@pytest.mark.parametrize("kind", [*FEWER, "LILY"])
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
@pytest.mark.parametrize("kind", WORKING)
def test_peft_reads_it(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = injected(kind, family)
    unipelt.save_peft(model, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets
    assert not any("layer" in name for name in targets), "names from the layer suit a model around the base too"
    theirs = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    gap = (theirs(**batch_of(family)).logits - model(**batch_of(family)).logits).abs().max()
    assert gap <= 1e-6


def test_a_term_before_it_is_added_to_the_term_of_the_host() -> None:
    """With LoRA before it, PEFT's layer reads the host's own output, and both terms are added."""
    alone = {}
    states: dict[str, Any] = {}
    for name, changes in {"lora": {"peft": None}, "oft": {"lora": None}, "both": {}}.items():
        method = {"preset": "lora", "peft": {"type": "OFT", "oft_block_size": 4, "gate": False}, **changes}
        model: Any = unipelt.inject(build("bert"), method)
        shake(model)
        for placed in placed_terms(model):  # the same numbers with and without the other term
            for path, parameter in placed.term.named_parameters():
                with torch.no_grad():
                    parameter.copy_(states.setdefault(f"{placed.path}.{placed.term.name}.{path}", parameter.clone()))
        alone[name] = model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(2, 5, 32)
    bare: Any = build("bert")
    host = bare.bert.encoder.layer[0].attention.self.query(x)
    lora, oft, both = (alone[name](x) for name in ("lora", "oft", "both"))
    assert (lora - host).abs().max() > 1e-2
    assert (oft - host).abs().max() > 1e-2
    torch.testing.assert_close(both, lora + oft - host, rtol=1e-5, atol=1e-5)


def test_all_terms_of_one_projection_are_merged_in_their_order() -> None:
    tuners = {"a": {"type": "OFT", "oft_block_size": 4, "gate": False}, "b": {"type": "IA3", "gate": False}}
    method = {"preset": "lora", "peft": tuners, "red": {"gate": False, "places": ["value"]}, "ia3": {"gate": False}}
    model: Any = unipelt.inject(build("bert"), method)
    shake(model)
    expected = model(**tiny_batch()).logits
    assert (unipelt.merge(model)(**tiny_batch()).logits - expected).abs().max() < 1e-5


def test_folding_keeps_a_tuner_beside_lora() -> None:
    method = {"preset": "lora", "gate": {"pooling": "static"}, "peft": {"type": "OFT", "oft_block_size": 4}}
    model: Any = unipelt.inject(build("bert"), {**method, "lora": {"places": ["query"], "gate": True}})
    shake(model)
    expected = model(**tiny_batch()).logits
    report = unipelt.fold(model, [tiny_batch()])
    outcomes = {gate.name: gate.outcome for gate in report.gates}
    assert outcomes == {"lora_query": "kept", "peft_oft_query": "kept", "peft_oft_value": "merged"}
    assert (model(**tiny_batch()).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", WORKING)
def test_half_precision_is_that_of_peft(kind: str) -> None:
    model = injected(kind, "bert", dtype_of_base=torch.bfloat16)
    assert {parameter.dtype for parameter in own_parameters(model).values()} == {torch.float32}
    theirs = peft_model(kind, "bert", model)
    ours, expected = (one(**tiny_batch()).last_hidden_state for one in (model.base_model, theirs.base_model.model.bert))
    assert ours.dtype is torch.bfloat16
    assert torch.equal(ours, expected)


def test_threads_do_not_exchange_the_output_of_the_host() -> None:
    model = injected("VERA", "bert", gate=0.3)
    batches = [tiny_batch(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        found: dict[int, list[torch.Tensor]] = {}

        def serve(index: int) -> None:
            with torch.no_grad():
                found[index] = [model(**batches[index]).logits for _ in range(20)]

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(logits, expected[index]) for index, all_ in found.items() for logits in all_)


def test_copies_are_independent_and_share_what_the_original_shares() -> None:
    model = injected("VBLORA", "bert")
    other: Any = copy.deepcopy(model)
    banks = {id(placed.term.layer.vblora_vector_bank["default"]) for placed in placed_terms(other)}
    assert len(banks) == 1
    before = model(**tiny_batch()).logits
    assert torch.equal(other(**tiny_batch()).logits, before)
    shake(other, seed=5)
    assert torch.equal(model(**tiny_batch()).logits, before)


def test_a_shared_parameter_is_counted_saved_and_trained_once(tmp_path: Path) -> None:
    model = injected("VBLORA", "bert")
    groups = unipelt.parameter_groups(model, lr=1e-3, peft_vblora=1e-2)
    trained = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in trained}) == len(trained)
    assert {group["lr"] for group in groups if group["name"] == "peft_vblora"} == {1e-2}
    unipelt.save(model, tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "model.safetensors")
    assert sum("vector_bank" in name for name in names) == 1


def test_drawn_indices_come_from_the_checkpoint(tmp_path: Path) -> None:
    model = injected("SHIRA", "bert")
    moved = {name: buffer for name, buffer in own_buffers(model).items() if "indices" in name}
    assert moved
    for buffer in moved.values():
        buffer.copy_(buffer.flip(1))  # other positions than PEFT draws again
    expected = model(**tiny_batch()).logits
    unipelt.save(model, tmp_path)
    assert torch.equal(unipelt.load(build("bert"), tmp_path)(**tiny_batch()).logits, expected)


def test_a_checkpoint_holds_what_was_drawn_and_not_what_the_configuration_says() -> None:
    for kind, held in {"OFT": False, "BOFT": False, "VERA": True}.items():
        model = injected(kind, "bert")
        term = next(placed_terms(model)).term
        assert bool(term.saved_buffers) is held
        assert bool(own_buffers(model)) is held
        assert [name for name in model.state_dict() if "buffer" in name or name in own_buffers(model)] == [
            *own_buffers(model)
        ]
        assert term.extra_repr() == kind
    gated = next(placed_terms(injected("OFT", "bert", gate=0.3))).term
    assert gated.extra_repr() == "OFT, gate=peft_oft_query"


def test_a_tuner_trains_in_a_model_that_trains() -> None:
    for kind, in_place in {"OFT": False, "C3A": True}.items():
        model = unipelt.inject(build("bert").train(), method_of(kind))
        assert all(module.training for module in model.modules())
        term = next(placed_terms(model)).term
        assert term.layer.base_layer.copies is in_place
        assert not term.writes_in_place(torch.empty(0)), "it gets a copy"
        assert all(module.training for module in term.modules()), "the question changes no mode"


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"type": "OTF"}, "has no type 'OTF'; did you mean 'OFT'"),
    ({"type": "ADALORA"}, "PEFT's ADALORA cannot be a submodule: its budget of ranks"),
    ({"type": "OFT", "block": 4}, "has no option 'block'"),
    ({"type": "OFT", "oft_blok_size": 4}, "did you mean 'oft_block_size'"),
    ({"type": "OFT", "target_modules": ["query"]}, "cannot set target_modules"),
    ({"type": "LORA", "lora_ga_config": {}}, "needs an object of PEFT's"),
    ({"type": "LORA", "bias": "all"}, "bias must be none"),
    ({"type": "LORA", "r": -1}, "PEFT cannot build its LORA here"),
    ({"type": "OFT", "oft_block_size": 4, "r": 4}, "PEFT refuses these options of OFT"),
    ({"type": "LORA", "init_lora_weights": "pissa"}, "replace the weight of bert.encoder.layer.0.attention.self.query"),
    ({"type": "IA3", "feedforward_modules": ["down"]}, "feedforward_modules names places here, out of query, value"),
    ({"type": "ROAD", "group_size": 7}, "PEFT cannot build its ROAD here|PEFT refuses"),
]


@pytest.mark.parametrize(("tuner", "message"), REFUSALS, ids=[message[:20] for _, message in REFUSALS])
def test_a_refusal_leaves_the_model_as_it_was(tuner: dict[str, Any], message: str) -> None:
    model = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InjectionError, match=message):
        unipelt.inject(model, {"preset": "unipelt-al", "peft": tuner})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "unipelt_injection")


def test_factors_of_the_input_of_a_projection() -> None:
    """In `feedforward_modules` of IA3, a method names places."""
    tuner = {"type": "IA3", "gate": False, "places": ["value", "down"], "feedforward_modules": ["down"]}
    model: Any = unipelt.inject(build("bert"), {"preset": "lora", "lora": None, "peft": tuner})
    layer = model.bert.encoder.layer[0].unipelt["default"]
    shapes = {name: tuple(layer.terms[f"peft_ia3_{name}"].layer.ia3_l["default"].shape) for name in ("value", "down")}
    assert shapes == {"value": (32, 1), "down": (1, 48)}


def test_other_ways_out_are_refused_with_the_reason(tmp_path: Path) -> None:
    gated = injected("OFT", "bert", gate=0.3)
    with pytest.raises(unipelt.CheckpointError, match="depends on the text"):
        unipelt.save_peft(gated, tmp_path / "a")
    with pytest.raises(ValueError, match="is a tuner of PEFT's itself"):
        unipelt.save(gated, tmp_path / "b", peft=True)
    mixed: Any = unipelt.inject(build("bert"), {"preset": "adapter", "peft": {"type": "OFT", "gate": False}})
    with pytest.raises(unipelt.CheckpointError, match="is an adapter, which a PEFT folder of PEFT's OFT cannot hold"):
        unipelt.save_peft(mixed, tmp_path / "c")
    assert not any(tmp_path.iterdir())


def test_packs_take_it_or_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    Pack(injected("VERA", "bert", gate=0.3), 9)
    for kind, reason in {
        "LILY": "averages its router over all tokens",
        "OSF": "has a hook",
        "SHIRA": "one by one",
    }.items():
        with pytest.raises(PackError, match=reason):
            Pack(injected(kind, "bert"), 9)


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InjectionError, match=r"pip install 'unipelt\[peft\]'"):
        unipelt.inject(build("bert"), method_of("OFT"))


def test_layers_of_other_architectures(tmp_path: Path) -> None:
    """Slices of one projection (GPT-2, whose weights are also transposed), and both stacks of T5."""
    for family in ("gpt2", "t5"):
        model: Any = unipelt.inject(tiny_model(family), method_of("OFT", gated=True))
        batch = family_batch(family)
        base = tiny_model(family)(**batch).logits
        shake(model)
        expected = model(**batch).logits
        assert (expected - base).abs().max() > 1e-3
        unipelt.save(model, tmp_path / family)
        assert torch.equal(unipelt.load(tiny_model(family), tmp_path / family)(**batch).logits, expected)
        assert torch.equal(unipelt.remove(model)(**batch).logits, base)
