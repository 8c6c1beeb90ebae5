"""Folding: a model whose gates are constant computes the same without them, and comes back bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, shake, what_is_there
from inside import added_to, parts
from tiny import SIMPLE, WITHOUT_INTERFACE, tiny_batch, tiny_model
from torch import Tensor, nn

import unipelt
from unipelt import CheckpointError, FoldError, InjectionError
from unipelt.gates.fold import FoldedGate, FoldReport
from unipelt.gates.measure import find_gates
from unipelt.gates.merge import fold_constants
from unipelt.injection.state import injection_of
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import own_parameters, own_parts

SMALL: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3, "alpha": 5.0},
}
FAMILIES = ["bert", "bart", "gpt2", "t5", "llama", "mpnet", "albert", "modernbert", "gpt_neox", "deberta"]


def config(family: str, **changes: object) -> dict[str, Any]:
    """A small UniPELT(APL), as far as the architecture and this Transformers take it."""
    parts: dict[str, Any] = dict(SMALL)
    if family in (*SIMPLE, *WITHOUT_INTERFACE):
        parts["prefix"] = None
    return {"preset": "unipelt-apl", **parts, **changes}


def trained(family: str = "bert", attention: str = "sdpa", changes: Any = None, **options: Any) -> Any:
    """A model with a method in it, everything that trains moved away from its start."""
    model = unipelt.inject(tiny_model(family, attention=attention, **options), config(family, **(changes or {})))
    shake(model, std=0.3)
    return model


def hold(model: nn.Module, value: Callable[[str], float | None]) -> None:
    """Make each gate whose name gets a value exactly that, whatever it reads."""
    temperature = injection_of(model).config.gate.temperature
    for own in own_parts(model):
        if own.part.gate in ("", "network") or (wanted := value(own.part.gate)) is None:
            continue
        logit = torch.logit(torch.tensor(wanted, dtype=torch.float64)) * temperature
        own.tensor.copy_(logit if own.part.parameter == "bias" else torch.zeros(()))


def by_name(name: str) -> float:
    """A constant for each kind of gate, none of them 0.5 or 1."""
    return {"adapter": 0.3, "prefix": 0.6, "lora_query": 0.8, "lora_value": 0.35}[name.rpartition(".")[2]]


def outputs(model: Any, family: str = "bert", seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(family, seed)).logits


def batches(family: str = "bert") -> list[dict[str, Tensor]]:
    return [tiny_batch(family, seed) for seed in (0, 1)]


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-6 * float(expected.abs().max().clamp_min(1)), rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_constant_gates_fold_to_the_same_model(family: str, attention: str) -> None:
    model = trained(family, attention)
    hold(model, by_name)
    expected = outputs(model, family, seed=5)
    plain = outputs(unipelt.remove(copy.deepcopy(model)), family, seed=5)
    assert not torch.allclose(plain, expected, atol=1e-3), "the submodules matter"
    report = unipelt.fold(model, batches(family), tolerance=1e-6, closed=0.0)
    assert_close(outputs(model, family, seed=5), expected)
    assert not any(isinstance(module, (Gates, LoRA, PrefixNetwork)) for module in model.modules())
    for gate in report.gates:
        assert gate.mean == pytest.approx(by_name(gate.name), abs=1e-6)
        assert gate.std < 1e-6
        assert gate.minimum <= gate.mean + 1e-6
        assert gate.maximum >= gate.mean - 1e-6
        assert gate.outcome == ("merged" if "lora" in gate.name else "constant")
    assert report.outcomes["merged"] == report.merged > 0
    assert report.after.deployed < report.before.deployed
    assert report.after.gates == {}
    assert report.after.trained == report.after.head == 0
    assert report.after.base == report.before.base


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, {"gating": gating}) for family in ("bert", "mpnet") for gating in ("scale", "mass")),
        *((family, {"softmax": "own"}) for family in ("bert", "gpt2", "bart", "llama")),
    ],
)
def test_every_gating_folds_exactly(family: str, kind: dict[str, str]) -> None:
    model = trained(family, changes={"prefix": {**SMALL["prefix"], **kind}})
    hold(model, by_name)
    unmasked = {name: value for name, value in tiny_batch(family).items() if name != "attention_mask"}
    with torch.no_grad():
        expected = outputs(model, family), model(**unmasked)[0]
        unipelt.fold(model, batches(family), tolerance=1e-6)
        assert_close(outputs(model, family), expected[0])
        assert_close(model(**unmasked)[0], expected[1])


@pytest.mark.parametrize("start", ["zero", "pissa"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_gate_that_multiplies_folds_with_its_scale(family: str, start: str) -> None:
    lora = {**SMALL["lora"], "gating": "multiply", "start": start}
    model = trained(family, changes={"lora": lora, "adapter": None, "prefix": None})
    hold(model, by_name)
    expected = outputs(model, family, seed=5)
    unipelt.fold(model, batches(family), tolerance=1e-6)
    assert_close(outputs(model, family, seed=5), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("kept", ["prefix", "lora_query", "lora_value", "adapter"])
def test_gates_that_vary_stay(family: str, kept: str) -> None:
    model = trained(family)
    hold(model, lambda name: None if name.rpartition(".")[2] == kept else by_name(name))
    expected = outputs(model, family, seed=5)
    with unipelt.record_gates(model) as before:
        outputs(model, family, seed=5)
    report = unipelt.fold(model, batches(family), tolerance=1e-6)
    assert_close(outputs(model, family, seed=5), expected)
    with unipelt.record_gates(model) as after:
        outputs(model, family, seed=5)
    assert {name.rpartition(".")[2] for name in after} == {kept}
    for name, values in after.items():
        torch.testing.assert_close(values, before[name], atol=1e-6, rtol=1e-5)
    assert {gate.outcome for gate in report.gates if gate.name.endswith(kept)} == {"kept"}
    assert set(report.after.gates) == set(after)
    text = str(report)
    assert f"{report.outcomes['kept']} kept" in text
    assert len(text.splitlines()) == len(report.gates) + 3


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, {"gating": "mass"}) for family in ("bert", "gpt2", "mpnet")),
        *((family, {"softmax": "own"}) for family in ("bert", "gpt2")),
    ],
)
def test_closed_gates_take_their_submodules_along(family: str, kind: dict[str, str]) -> None:
    model = trained(family, changes={"prefix": {**SMALL["prefix"], **kind}})
    hold(model, lambda name: 1e-7)
    expected = outputs(model, family)
    report = unipelt.fold(model, batches(family), tolerance=1e-6, closed=1e-3)
    assert report.outcomes == {"merged": 0, "constant": 0, "dropped": len(report.gates), "kept": 0}
    assert report.after.deployed == 0
    torch.testing.assert_close(outputs(model, family), expected, atol=1e-5, rtol=1e-5)
    hooks = [
        {*module._forward_hooks.values(), *module._forward_pre_hooks.values()}
        for module in model.modules()
        if type(module).__module__.startswith(("torch", "transformers"))
    ]
    assert {hook.__name__ for found in hooks for hook in found} <= {"refuse_training", "wake_input"}
    assert not own_parameters(model)
    assert not any(hasattr(module, "unipelt_port") for module in model.modules())
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        model.config._attn_implementation
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "mpnet"])
def test_a_closed_prefix_goes_and_gates_beside_it_stay(family: str) -> None:
    base = tiny_model(family)
    model = unipelt.inject(
        copy.deepcopy(base), config(family, prefix={**SMALL["prefix"], "gating": "mass"}, train_head=False)
    )
    shake(model, std=0.3)
    hold(model, lambda name: 1e-7 if name.endswith("prefix") else None)
    expected = outputs(model, family)
    report = unipelt.fold(model, batches(family), tolerance=1e-6, closed=1e-3)
    assert {(gate.name.endswith("prefix"), gate.outcome) for gate in report.gates} == {
        (True, "dropped"),
        (False, "kept"),
    }
    torch.testing.assert_close(outputs(model, family), expected, atol=1e-5, rtol=1e-5)
    assert "prefix" not in report.after.deployed_submodules
    assert_same(what_is_there(unipelt.remove(model)), what_is_there(base))


def test_bounds_of_the_arguments_are_inside() -> None:
    """Gates at exactly one half, which never vary, are constant at a tolerance of 0 and are not below one half."""
    model = trained()
    hold(model, lambda name: 0.5)
    report = unipelt.fold(model, batches(), tolerance=0.0, closed=0.5)
    assert {(gate.mean, gate.std) for gate in report.gates} == {(0.5, 0.0)}
    assert report.outcomes == {"merged": 6, "constant": 6, "dropped": 0, "kept": 0}


def test_gates_are_measured_in_evaluation_mode() -> None:
    model = trained(dropout=0.5)
    want = unipelt.fold(copy.deepcopy(model), batches(), tolerance=0.0)
    torch.manual_seed(0)
    assert unipelt.fold(model.train(), batches(), tolerance=0.0) == want


def test_the_report_is_a_table() -> None:
    counts = unipelt.parameter_counts(unipelt.inject(tiny_model("bert"), "lora"))
    gates = (
        FoldedGate("bert.encoder.layer.11.unipelt.default.entry", "lora_query", 0.5, 0.01234, 0.25, 0.75, "merged"),
        FoldedGate("unipelt.default.prompt.entry", "prompt", 1 / 3, 0.25, 0.0, 1.0, "kept"),
    )
    report = FoldReport(gates, 1234, 0.05, 0.01, 3, replace(counts, deployed=5000), replace(counts, deployed=700))
    assert str(report).splitlines() == [
        "layer  gate          mean     std     min     max",
        "   11  lora_query  0.5000  0.0123  0.2500  0.7500  merged",
        "    -  prompt      0.3333  0.2500  0.0000  1.0000  kept",
        "2 gates over 1,234 examples: 1 merged, 0 constant, 0 dropped, 1 kept",
        "3 low-rank terms merged; beside the base 5,000 parameters before (deployed), 700 after",
    ]


def test_a_closed_prefix_that_takes_attention_stays() -> None:
    model = trained()
    hold(model, lambda name: 1e-4)
    expected = outputs(model)
    report = unipelt.fold(model, batches(), closed=0.01)
    became = {gate.name: gate.outcome for gate in report.gates}
    assert became == {"prefix": "constant", "lora_query": "dropped", "lora_value": "dropped", "adapter": "dropped"}
    torch.testing.assert_close(outputs(model), expected, atol=1e-3, rtol=1e-3)


def test_the_spread_is_that_of_the_data() -> None:
    model = trained()
    with unipelt.record_gates(model) as gates:
        for seed in (0, 1):
            outputs(model, seed=seed)
    report = unipelt.fold(model, batches(), tolerance=0.0)
    assert report.examples == 6
    for name, values in gates.items():
        found = [gate for gate in report.gates if gate.name == name]
        expected = values.detach().double()
        assert [gate.mean for gate in found] == pytest.approx(expected.mean(0).tolist(), rel=1e-5)
        assert [gate.std for gate in found] == pytest.approx(expected.std(0, correction=0).tolist(), rel=1e-4)
        assert [gate.minimum for gate in found] == pytest.approx(expected.amin(0).tolist())
        assert [gate.maximum for gate in found] == pytest.approx(expected.amax(0).tolist())


@pytest.mark.parametrize("left", [False, True])
def test_spread_over_real_tokens_counts_where_a_gate_is_per_token(left: bool) -> None:
    """The mean over tokens is the same in every text here, and padding's gates are far away."""
    model = trained("gpt2", changes={"prefix": None, "adapter": None, "layers": [0]})
    batch = tiny_batch("gpt2", left=left)
    gates = next(module for module in model.modules() if isinstance(module, Gates))
    values = torch.tensor([0.2, 0.8]).repeat(5)[:9].logit().repeat(3, 1)
    values = torch.where(batch["attention_mask"].bool(), values, torch.tensor(9.0))

    def fake(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return values.sigmoid().unsqueeze(-1).expand(output.shape)

    handle = gates.register_forward_hook(fake)
    report = unipelt.fold(model, [batch], tolerance=0.25)
    handle.remove()
    real = values.sigmoid()[batch["attention_mask"].bool()]
    for gate in report.gates:
        assert gate.std == pytest.approx(float(real.std(correction=0)), rel=1e-5)
        assert gate.maximum == pytest.approx(0.8)
        assert gate.outcome == "kept"


def test_a_decoder_behind_an_encoder_has_its_own_padding() -> None:
    model = trained("bart", changes={"encoder": False, "cross": False, "prefix": None})
    batch = tiny_batch("bart", tokens=6, lengths=(3, 6, 4))
    seen = {}
    for mask in (torch.tensor([[1] * 2 + [0] * 4, [1] * 6, [1] * 5 + [0]]), torch.ones(3, 6, dtype=torch.long)):
        report = unipelt.fold(copy.deepcopy(model), [{**batch, "decoder_attention_mask": mask}], tolerance=0.0)
        seen[int(mask.sum())] = report.gates[0].mean
    assert seen[13] != seen[18]


def test_two_examples_are_enough() -> None:
    batch = tiny_batch("bert")
    one, two = ({name: tensor[:count] for name, tensor in batch.items()} for count in (1, 2))
    with pytest.raises(FoldError, match="at least two examples, and batches held 1"):
        unipelt.fold(trained(), [one])
    assert unipelt.fold(trained(), [two]).examples == 2


def test_each_gate_knows_what_tells_real_tokens_of_its_input() -> None:
    """Gates of a cross-attention read the decoder's states, but its value's reads what the encoder gave."""

    def masks(family: str, **changes: Any) -> dict[str, str]:
        return {gate.name: gate.mask for gate in find_gates(trained(family, **changes))}

    assert set(masks("bert").values()) == set(masks("gpt2").values()) == {"attention_mask"}
    decoder = masks("bert", head="CausalLM", is_decoder=True, add_cross_attention=True)
    assert "cross.lora_query" in decoder
    assert decoder.pop("cross.lora_value") == "encoder_attention_mask"
    assert set(decoder.values()) == {"attention_mask"}
    both = masks("bart")
    assert both.pop("cross.lora_value") == "attention_mask"
    assert {mask for name, mask in both.items() if name.startswith(("decoder.", "cross."))} == {
        "decoder_attention_mask"
    }
    assert {mask for name, mask in both.items() if "." not in name} == {"attention_mask"}


def test_what_was_folded_is_remembered_apart_from_the_caller() -> None:
    model = trained()
    gate = find_gates(model)[0]
    constants: dict[str, dict[str, float | None]] = {gate.path: {gate.name: 0.5}}
    fold_constants(model, constants)
    constants[gate.path][gate.name] = 0.7
    folded = injection_of(model).folded
    assert folded is not None
    assert folded.constants == {gate.path: {gate.name: 0.5}}
    counts = unipelt.parameter_counts(model)
    assert counts.trained == 0
    assert not counts.submodules


@pytest.mark.parametrize("kept_in", ["float32", "base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_rounded_once(dtype: torch.dtype, kept_in: str) -> None:
    model: Any = unipelt.inject(tiny_model("bert").to(dtype), config("bert", adapter=None, prefix=None, dtype=kept_in))
    shake(model)
    hold(model, by_name)
    projection: Any = model.bert.encoder.layer[0].attention.self.value
    kind = torch.promote_types(dtype, torch.float32)
    own = parts(model.bert.encoder.layer[0])
    assert own["lora_value.A"].dtype == own["lora_value.B"].dtype == (dtype if kept_in == "base" else kind)
    weight, A, B = (
        tensor.detach().to(kind, copy=True) for tensor in (projection.weight, own["lora_value.A"], own["lora_value.B"])
    )
    report = unipelt.fold(model, batches(), tolerance=1e-2)
    constant = next(gate.mean for gate in report.gates if gate.name == "lora_value")
    assert torch.equal(projection.weight, (weight + constant * (B @ A)).to(dtype))


def test_autocast_does_not_reach_what_is_folded(tmp_path: Path) -> None:
    model = trained()
    hold(model, by_name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unipelt.fold(model, batches(), tolerance=1e-2)
    unipelt.save(model, tmp_path)
    loaded = unipelt.load(unipelt.remove(copy.deepcopy(model)), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    for (name, weight), other in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_terms_without_gates_are_merged_without_data() -> None:
    model = unipelt.inject(tiny_model("gpt2"), {**config("gpt2"), "preset": "unipelt-apl-nogate", **_ungated()})
    shake(model, std=0.3)
    expected = outputs(model, "gpt2")
    report = unipelt.fold(model)
    assert_close(outputs(model, "gpt2"), expected)
    assert (report.gates, report.examples, report.merged) == ((), 0, 6)
    assert "6 low-rank terms merged" in str(report)


def _ungated() -> dict[str, Any]:
    return {name: {**part, "gate": False} for name, part in SMALL.items()}


def test_a_weight_with_two_uses_keeps_its_gate() -> None:
    model = trained("deberta-v2")
    hold(model, by_name)
    expected = outputs(model, "deberta-v2")
    report = unipelt.fold(model, batches("deberta-v2"), tolerance=1e-6)
    assert {gate.outcome for gate in report.gates if gate.name == "lora_query"} == {"kept"}
    assert {gate.outcome for gate in report.gates if gate.name == "lora_value"} == {"merged"}
    assert_close(outputs(model, "deberta-v2"), expected)


def test_constants_that_cannot_be_meant_change_nothing() -> None:
    model = trained("deberta-v2")
    before = what_is_there(model)
    gates = {gate.name.rpartition(".")[2]: gate for gate in find_gates(model)}
    query, value = gates["lora_query"], gates["lora_value"]
    for gate, constant, match in (
        (query, 0.5, "this term serves one of two uses of a weight: it is not merged"),
        (value, 1.5, "a gate is above 0 and at most 1, not 1.5"),
        (value, 0.0, "a gate is above 0 and at most 1, not 0.0"),
    ):
        with pytest.raises(FoldError, match=f"'{gate.name}' at '{gate.path}': {match}"):
            fold_constants(model, {gate.path: {gate.name: constant}})
    assert_same(what_is_there(model), before)


def test_weights_that_are_not_in_memory_are_not_merged_into() -> None:
    model: Any = unipelt.inject(tiny_model("bert"), {"preset": "lora"})
    model.to("meta")
    with pytest.raises(FoldError, match=r"query\.weight: it is not in memory \(offloaded\)"):
        fold_constants(model, {})
    assert any(isinstance(module, LoRA) for module in model.modules())


def test_a_gate_that_was_never_computed_is_not_folded() -> None:
    model = trained()
    layer: Any = model.bert.encoder.layer[1]
    layer.forward = lambda hidden, *args, **kwargs: hidden  # as of a layer that is left out
    with pytest.raises(FoldError, match=r"the gates at 'bert\.encoder\.layer\.1\..*' were never computed"):
        unipelt.fold(model, batches())
    assert model.unipelt_injection.folded is None


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "mpnet", "deberta-v2"])
@pytest.mark.parametrize("partial", [False, True])
def test_save_and_load_bit_for_bit(family: str, partial: bool, tmp_path: Path) -> None:
    model = trained(family)
    hold(model, lambda name: None if partial and name.endswith(("prefix", "lora_query")) else by_name(name))
    base = copy.deepcopy(unipelt.remove(copy.deepcopy(model)))
    before = base.state_dict()
    unipelt.fold(model, batches(family), tolerance=1e-6)
    expected = outputs(model, family)
    unipelt.save(model, tmp_path / "one")
    assert "folded" in (tmp_path / "one" / "README.md").read_text()
    loaded = unipelt.load(base, tmp_path / "one")
    assert torch.equal(outputs(loaded, family), expected)
    assert what_is_there(loaded)["tensors"].keys() == what_is_there(model)["tensors"].keys()
    unipelt.save(loaded, tmp_path / "two")
    for name in ("model.safetensors", "unipelt.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    removed = unipelt.remove(loaded)
    for name, tensor in removed.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_base_again(family: str) -> None:
    model = tiny_model(family)
    before = what_is_there(model)
    unipelt.inject(model, config(family))
    shake(model, std=0.3)
    hold(model, lambda name: by_name(name) if "prefix" not in name else 1e-7)
    unipelt.fold(model, batches(family), tolerance=1e-6, closed=1e-3)
    assert_same(what_is_there(unipelt.remove(model)), before)
    unipelt.inject(model, config(family))


def test_what_trained_of_the_base_is_kept(tmp_path: Path) -> None:
    """BitFit's biases, and a projection that the caller trained besides, into which a term is merged."""
    model: Any = unipelt.inject(tiny_model("bert"), config("bert", bitfit=True))
    base = copy.deepcopy(unipelt.remove(copy.deepcopy(model)))
    model.bert.encoder.layer[1].attention.self.value.weight.requires_grad_(True)
    shake(model)
    hold(model, by_name)
    unfolded, expected = copy.deepcopy(model), outputs(model)
    unipelt.fold(model, batches(), tolerance=1e-6)
    assert_close(outputs(model), expected)
    unipelt.save(unfolded, tmp_path / "unfolded", deploy=True)
    unipelt.save(model, tmp_path / "folded")
    manifests = [json.loads((tmp_path / name / "unipelt.json").read_text()) for name in ("unfolded", "folded")]
    assert manifests[1].pop("folded")
    assert manifests[0] == manifests[1], "the same weights, of the same base"
    before = copy.deepcopy(base).state_dict()
    assert torch.equal(outputs(unipelt.load(base, tmp_path / "folded")), outputs(model))
    for name, tensor in unipelt.remove(base).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_copies_and_the_command_to_train() -> None:
    model = trained()
    hold(model, lambda name: None if name == "prefix" else by_name(name))
    unipelt.fold(model, batches(), tolerance=1e-6)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin), outputs(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    with pytest.raises(RuntimeError, match="a folded model does not train"):
        twin.train()(**tiny_batch("bert"))
    with pytest.raises(FoldError, match="folded already"):
        unipelt.fold(model, batches())
    with pytest.raises(InjectionError, match="carries submodules already"):
        unipelt.inject(model)
    with pytest.raises(CheckpointError, match="is folded"):
        unipelt.release_state_dict(model)


def _shared(model: Any) -> None:
    layers = model.bert.encoder.layer
    layers[1].attention.self.value.weight = layers[0].attention.self.value.weight


def _quantised(model: Any) -> None:
    leaf = model.bert.encoder.layer[2].attention.self.query
    leaf.weight = nn.Parameter(leaf.weight.to(torch.float8_e4m3fn), requires_grad=False)
    leaf.forward = lambda x: nn.functional.linear(x, leaf.weight.float(), leaf.bias)


def _subclass(model: Any) -> None:
    class Packed(nn.Parameter):
        pass

    leaf = model.bert.encoder.layer[2].attention.self.query
    leaf.weight = Packed(leaf.weight.detach(), requires_grad=False)


def _computed(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[2].attention.self.query)


def _infinite(model: Any) -> None:
    parts(model)["bert.encoder.layer.0.gate.adapter.bias"].fill_(torch.nan)


class Odd:
    """Not a mapping."""


@pytest.mark.parametrize(
    ("spoil", "given", "options", "match"),
    [
        (_shared, None, {}, "value.weight: it is shared with another module"),
        (_quantised, None, {}, r"query.weight: it is torch.float8_e4m3fn \(quantised"),
        (_subclass, None, {}, r"query.weight: it is Packed \(quantised or sharded\)"),
        (_computed, None, {}, "query.weight: it is no parameter of its own"),
        (_infinite, None, {}, "'adapter' at .* is not finite"),
        (None, [], {}, "at least two examples, and batches held 0"),
        (None, [Odd()], {}, "mappings of the model's inputs, not Odd"),
        (None, None, {"tolerance": -0.1}, "tolerance must be a number, 0 or above, not -0.1"),
        (None, None, {"tolerance": True}, "tolerance must be"),
        (None, None, {"tolerance": float("nan")}, "tolerance must be"),
        (None, None, {"closed": 1.0}, "closed must be a number, 0 or above and below 1, not 1.0"),
    ],
)
def test_refusals_change_nothing(spoil: Any, given: Any, options: Any, match: str) -> None:
    model = trained().train()
    hold(model, by_name)
    if spoil is not None:
        spoil(model)
    before = what_is_there(model)
    tensors = before["tensors"]
    with pytest.raises(FoldError, match=match):
        unipelt.fold(model, batches() if given is None else given, **options)
    after = what_is_there(model)
    for name, tensor in after.pop("tensors").items():
        assert torch.equal(tensor.float().nan_to_num(), tensors[name].float().nan_to_num()), name
    del before["tensors"]
    assert after == before
    assert model.unipelt_injection.folded is None


def test_a_failing_batch_changes_nothing() -> None:
    model = trained()
    before = what_is_there(model)
    with pytest.raises(IndexError):
        unipelt.fold(model, [{"input_ids": torch.full((2, 3), 10_000)}])
    assert_same(what_is_there(model), before)
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.fold(tiny_model("bert"), batches())
    with pytest.raises(FoldError, match="nothing to fold"):
        unipelt.fold(unipelt.inject(tiny_model("bert"), "adapter"), batches())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folded: folded.update({"nowhere": {"prefix": 0.5}}), "no gate 'prefix' at 'nowhere'"),
        (lambda folded: first(folded).update(other=0.5), "no gate 'other' at"),
        (lambda folded: first(folded).update(prefix=0.0), "must be above 0 and at most 1, or null, not 0.0"),
        (lambda folded: first(folded).update(prefix=1.5), "must be above 0 and at most 1"),
        (lambda folded: first(folded).update(prefix=float("nan")), "prefix is nan, which is no finite number"),
        (lambda folded: first(folded).update(prefix=True), "must be above 0 and at most 1"),
        (lambda folded: first(folded).update(prefix="0.5"), "must be above 0 and at most 1"),
        (lambda folded: first(folded).update(prefix=None), "takes attention and is not dropped"),
        (lambda folded: folded.update(x=0.5), "x must be a mapping, not 0.5"),
    ],
)
def test_a_spoilt_manifest_changes_nothing(change: Any, match: str, tmp_path: Path) -> None:
    model = trained()
    hold(model, by_name)
    unipelt.save(model, tmp_path, deploy=True)
    unipelt.fold(model, batches(), tolerance=1e-6)
    base = unipelt.remove(copy.deepcopy(model))
    unipelt.save(model, tmp_path)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    change(manifest["folded"])
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    before = what_is_there(base)
    with pytest.raises(CheckpointError, match=match):
        unipelt.load(base, tmp_path)
    assert_same(what_is_there(base), before)


def first(folded: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The constants of the first attention."""
    return folded["bert.encoder.layer.0.unipelt.default.entry"]


def test_generation_with_a_cache() -> None:
    model = trained("gpt2")
    hold(model, by_name)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**tiny_batch("gpt2", left=True), **options)
    unipelt.fold(model, batches("gpt2"), tolerance=1e-6)
    assert torch.equal(model.generate(**tiny_batch("gpt2", left=True), **options), expected)


def test_a_prompt_counts_where_gates_are_of_tokens() -> None:
    """It stands before the padded text, and a gate of a token reads it like a word."""
    model = trained(changes={"prefix": None, "gate": {"pooling": "token"}, "prompt": {"length": 5, "gate": False}})
    host = added_to(model.bert.encoder.layer[1]).entry.gates
    seen: list[Tensor] = []
    hook = host.register_forward_hook(lambda _, args, out: seen.append(out[..., 0]))
    outputs(model)
    hook.remove()
    mask = nn.functional.pad(tiny_batch("bert", 0)["attention_mask"], (5, 0), value=1).bool()
    assert not mask.all()
    want = seen[0][mask].double()
    assert want.std() > 1e-2
    report = unipelt.fold(model, batches()[:1], tolerance=0.0)
    got = next(gate for gate in report.gates if gate.path == "bert.encoder.layer.1.unipelt.default.entry")
    assert (got.mean, got.std) == pytest.approx((want.mean().item(), want.std(correction=0).item()), abs=1e-6)
