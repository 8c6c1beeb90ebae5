"""LayerNorm tuning: the same as training the norms themselves, gated or not, in every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_near,
    assert_pack_computes_as_single_models,
    assert_same,
    bits,
    logits,
    shake,
    tiny_batch,
    tiny_bert,
    what_is_there,
)
from inside import entries, parts
from tiny import FAMILIES, KINDS, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn

import unipelt
from unipelt.config.schema import ConfigError
from unipelt.hosts.norms import find_norms
from unipelt.submodules.ln_tuning import LNTuning
from unipelt.submodules.outputs import OutputSlice
from unipelt.submodules.room import own_parts, placed_terms
from unipelt.submodules.term import SharedParameters

EACH_FAMILY = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in FAMILIES]
GATED: dict[str, Any] = {"preset": "ln_tuning", "ln_tuning": {"gate": True}}


def with_norms_of(base: Any, model: Any) -> Any:
    """A copy of the base whose own norms have the values that a tuned model has beside its norms."""
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for placed in placed_terms(model):
            if placed.term.kind != "ln_tuning":
                continue
            for name, parameter in placed.term.function.norm.named_parameters():
                plain.get_submodule(placed.path).get_parameter(name).copy_(parameter)
    return plain


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_model_is_the_one_whose_own_norms_were_trained(family: str) -> None:
    base, batch = tiny_model(family), batch_of(family)
    model = unipelt.inject(copy.deepcopy(base), {"preset": "ln_tuning", "train_head": False})
    with torch.no_grad():
        want = base(**batch)[0]
        torch.testing.assert_close(model(**batch)[0], want)
        shake(model)
        trained = model(**batch)[0]
        assert (trained - want).abs().max() > 1e-3
        assert_near(trained, with_norms_of(base, model)(**batch)[0], 2e-5)
        unipelt.remove(model)
        assert torch.equal(model(**batch)[0], want)


# by family: the norms of the layers' states, and the parameters of each
NORMS = {"bert": (3 * 2, 2), "gpt2": (3 * 2, 2), "llama": (3 * 2, 1), "bart": (3 * 2 + 3 * 3, 2), "t5": (3 * 2 + 9, 1)}


@pytest.mark.parametrize("family", NORMS)
def test_the_count_is_norms_times_their_parameters(family: str) -> None:
    norms, each = NORMS[family]
    counts = unipelt.parameter_counts(unipelt.inject(tiny_model(family), "ln_tuning"))
    assert counts.submodules == counts.deployed_submodules == {"ln_tuning": norms * each * 32}
    gates = {"pooling": "token"} if family == "t5" else {}
    counts = unipelt.parameter_counts(unipelt.inject(tiny_model(family), {**GATED, "gate": gates}))
    assert sum(counts.gates.values()) == norms * (32 + 1)


def test_norms_of_queries_and_keys_are_no_norms_of_states() -> None:
    for family, names in {
        "qwen3": ["input_layernorm", "post_attention_layernorm"],
        "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],  # its q_norm is as wide as the states
    }.items():
        assert sorted(find_norms(tiny_model(family).model.layers[0], 32)) == names


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_a_gate_leads_from_the_frozen_norm_to_the_trained_one(family: str) -> None:
    base, batch = tiny_model(family), batch_of(family)
    model = unipelt.inject(copy.deepcopy(base), {**GATED, "train_head": False})
    shake(model)
    with torch.no_grad():
        for bias, want in ((-200.0, base), (200.0, with_norms_of(base, model))):
            for entry in entries(model):
                entry.weight.zero_()
                entry.bias.fill_(bias)
            assert_near(model(**batch)[0], want(**batch)[0], 2e-5)


def test_the_gate_of_a_norm_is_the_mean_over_real_tokens() -> None:
    model: Any = unipelt.inject(tiny_bert(), GATED)
    shake(model)
    seen: dict[str, Tensor] = {}
    norm: nn.Module = model.bert.encoder.layer[1].attention.output.LayerNorm
    norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    batch = tiny_batch()
    with unipelt.record_gates(model) as record:
        logits(model, batch)
    assert set(record) == {"ln_tuning_norm1", "ln_tuning_norm2"}
    entry: Any = model.bert.encoder.layer[1].unipelt["default"].ln_tuning_norm1.entry
    each = torch.sigmoid(seen["x"] @ entry.weight[0] + entry.bias[0])
    mask = batch["attention_mask"]
    torch.testing.assert_close(record["ln_tuning_norm1"][:, 1], ((each * mask).sum(1) / mask.sum(1)).detach())


@pytest.mark.parametrize("gate", [True, False])
def test_an_adapter_behind_the_same_norm_reads_and_passes_the_trained_norm(gate: bool) -> None:
    """BERT's adapter computes `LN(s + adapter(LN(s)))`: both norms are the trained ones."""
    base = tiny_bert()
    both: dict[str, Any] = {"preset": "adapter", "adapter": {"bottleneck": 6}, "train_head": False}
    model = unipelt.inject(copy.deepcopy(base), {**both, "ln_tuning": {"gate": gate}})
    shake(model)
    for entry in entries(model):
        with torch.no_grad():
            entry.weight.zero_()
            entry.bias.fill_(200.0)
    plain = unipelt.inject(with_norms_of(base, model), both)
    adapters = parts(model, "adapter")
    assert adapters
    for name, tensor in parts(plain, "adapter").items():
        tensor.copy_(adapters[name])
    assert_near(logits(model), logits(plain))


def test_saved_loaded_merged_and_removed(tmp_path: Path) -> None:
    for family in ("bert", "llama", "bart"):
        base, batch = tiny_model(family), batch_of(family)
        before = what_is_there(base)
        model = unipelt.inject(base, "ln_tuning")
        shake(model)
        with torch.no_grad():
            want = model(**batch)[0]
        unipelt.save(model, tmp_path / family)
        loaded = unipelt.load(tiny_model(family), tmp_path / family)
        other = copy.deepcopy(model)
        unipelt.merge(other)
        assert not any("unipelt" in name for name, _ in other.named_modules())
        with torch.no_grad():
            assert torch.equal(loaded(**batch)[0], want)
            assert_near(other(**batch)[0], want, 2e-5)
        unipelt.remove(model)
        assert_same(what_is_there(model), before)


def test_gates_are_not_merged_and_peft_folders_do_not_hold_it(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(), GATED)
    before = bits(model)
    with pytest.raises(unipelt.MergeError, match=r"the gate of ln_tuning_norm1 at .* depends on the text"):
        unipelt.merge(model)
    with pytest.raises(
        unipelt.CheckpointError, match=r"the gate of .*ln_tuning_norm1 depends on the text, and PEFT has no gates"
    ):
        unipelt.save_peft(model, tmp_path)
    both = unipelt.inject(tiny_bert(), {"preset": "lora", "ln_tuning": {"gate": False}})
    with pytest.raises(unipelt.CheckpointError, match=r"ln_tuning_norm1 is ln_tuning, which a PEFT folder"):
        unipelt.save_peft(both, tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_norms_do_not_decay_and_gates_do() -> None:
    model = unipelt.inject(tiny_bert(), GATED)
    groups = unipelt.parameter_groups(model, lr=1e-3, weight_decay=0.1, ln_tuning=1e-2)
    decays = {(group["name"], group["lr"], bool(group["weight_decay"])) for group in groups}
    assert decays >= {("ln_tuning", 1e-2, False), ("gate", 1e-3, True)}
    assert ("ln_tuning", 1e-2, True) not in decays
    kinds = [own.part.kind for own in own_parts(model) if own.part.kind != "gate"]
    assert kinds == ["ln_tuning"] * (3 * 2 * 2)


@pytest.mark.parametrize("gate", [True, False])
def test_a_pack_trains_norms_too(gate: bool) -> None:
    model = unipelt.inject(tiny_bert(), {**GATED, "ln_tuning": {"gate": gate}})
    assert_pack_computes_as_single_models(model, [tiny_batch(seed) for seed in (0, 1)])


@pytest.mark.parametrize(
    ("family", "gate", "message"),
    [
        ("t5", {}, "gate.pooling: masked_mean reads the mask of the attention, and a norm of this model comes before"),
        ("llama", {"shared": True}, "gate.shared: true computes the gates at the entry of the attention"),
    ],
)
def test_gates_that_a_norm_before_the_attention_cannot_have(family: str, gate: dict[str, Any], message: str) -> None:
    model = tiny_model(family)
    before = what_is_there(model)
    with pytest.raises(unipelt.InjectionError, match=message):
        unipelt.inject(model, {**GATED, "gate": gate})
    assert_same(what_is_there(model), before)
    unipelt.inject(tiny_model(family), {**GATED, "gate": {"pooling": "static"}})


@pytest.mark.parametrize("pooling", ["masked_mean", "mean", "token", "static"])
def test_only_a_mean_needs_the_mask_of_an_attention_that_comes_later(pooling: Any) -> None:
    def misfit(gate: bool = True, causal: bool = False, norm_first: bool = True, **gates: Any) -> str:
        config = unipelt.LNTuningConfig(gate=gate)
        return config.misfit(
            unipelt.GateConfig(pooling=pooling, **gates), causal=causal, generates=False, norm_first=norm_first
        )

    assert f"gate.pooling: {pooling} reads the mask" in misfit() if "mean" in pooling else not misfit()
    assert not misfit(gate=False)
    assert not misfit(norm_first=False)
    assert not misfit(causal=True)
    if pooling != "static":
        refusal = misfit(causal=True, shared=True)
        assert refusal.startswith("gate.shared: true computes the gates at the entry of the attention")
        assert refusal.endswith("take gate.shared: false, or ln_tuning.gate: false")
        assert not misfit(norm_first=False, shared=True)


class Shifted(nn.LayerNorm):
    """A norm with buffers."""

    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def test_the_copy_of_a_norm_has_its_own_values_and_nothing_else_of_the_host() -> None:
    norm, like = Shifted(8), torch.empty(0)
    x, kept = torch.randn(2, 8), {"_hf_hook": object(), "_old_forward": norm.forward, "unipelt_port": object()}
    want = norm(x)
    for name, value in {**kept, "forward": lambda x: x, "eps": norm.eps, "own": "kept"}.items():
        setattr(norm, name, value)
    spot = unipelt.TargetInfo("norm1", 8, 8, like, SharedParameters("ln_tuning"), norm, OutputSlice(1, 0, 8))
    tuned: Any = LNTuning(unipelt.LNTuningConfig(), spot)
    copied = tuned.norm
    assert torch.equal(copied(x), want)
    assert copied.own == "kept"
    assert not any(name in vars(copied) for name in (*kept, "forward"))
    assert copied.nothing is None
    for own, host in ((copied.shift, norm.shift), (copied.weight.data, norm.weight.data)):
        before = host.clone()
        own.add_(1)
        assert torch.equal(host, before)
    assert [name for name, parameter in copied.named_parameters() if parameter.requires_grad] == ["weight", "bias"]


def test_it_has_one_place() -> None:
    with pytest.raises(ConfigError, match=r"ln_tuning\.places must be norm, not 'query'"):
        unipelt.resolve({"ln_tuning": {"places": ["query"]}})
    with pytest.raises(ConfigError, match="places must name one or more of norm, none of them twice"):
        unipelt.resolve({"ln_tuning": {"places": []}})
    with pytest.raises(ConfigError, match=r"ia3\.places must be query or key"):
        unipelt.resolve({"ia3": {"places": ["norm"]}})
    model: Any = tiny_bert()
    for layer in model.bert.encoder.layer:
        layer.attention.output.LayerNorm = layer.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(unipelt.InjectionError, match="has no norm with a weight as wide as its states"):
        unipelt.inject(model, "ln_tuning")


def test_hooks_and_settings_of_the_host_stay_with_the_host() -> None:
    model: Any = tiny_bert()
    calls = []
    norm = model.bert.encoder.layer[0].output.LayerNorm
    norm.register_forward_hook(lambda module, args, out: calls.append(module))
    norm.eps = 0.5
    unipelt.inject(model, "ln_tuning")
    copied = model.bert.encoder.layer[0].unipelt["default"].ln_tuning_norm2.function.norm
    assert copied.eps == 0.5
    logits(model)
    assert calls == [norm]
    model.bfloat16()
    with torch.no_grad():
        model(**tiny_batch())


def test_half_precision_bases_keep_float32_norms_beside_them() -> None:
    base = tiny_model("llama").bfloat16()
    batch = batch_of("llama")
    with torch.no_grad():
        want = base(**batch)[0]
        model = unipelt.inject(base, "ln_tuning")
        assert {own.tensor.dtype for own in own_parts(model)} == {torch.float32}
        got = model(**batch)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.02, rtol=0)
