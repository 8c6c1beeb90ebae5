"""Further submodules: their equations, written out again on a model without hooks; and one of the user's own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shake, tiny_batch, tiny_bert
from inside import entries
from safetensors.torch import load_file, save_file
from tiny import DECODERS, FURTHER, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn

import unipelt
from unipelt.config.parts import Place
from unipelt.config.schema import ConfigError
from unipelt.config.submodule import SUBMODULES
from unipelt.hosts.families import FAMILIES
from unipelt.submodules.register import MODULES, register_submodule
from unipelt.submodules.room import own_parameters, own_parts, placed_terms
from unipelt.submodules.term import FunctionTerm


@dataclass(frozen=True)
class Host:
    """A place in a layer: the module, and which of its outputs are meant; None for all."""

    path: str
    rows: tuple[int, ...] | None = None


def hosts(layer: str, own: str, output: str, up: str, down: str, *projections: str) -> dict[str, Host]:
    query, key, value = projections or ("query", "key", "value")
    return {
        "query": Host(f"{layer}.{own}.{query}"),
        "key": Host(f"{layer}.{own}.{key}"),
        "value": Host(f"{layer}.{own}.{value}"),
        "attention": Host(f"{layer}.{output}"),
        "up": Host(f"{layer}.{up}"),
        "down": Host(f"{layer}.{down}"),
    }


_GPT2 = hosts("transformer.h.1", "attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", *["c_attn"] * 3)
_NEOX = hosts(
    "gpt_neox.layers.1",
    "attention",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    *["query_key_value"] * 3,
)
_HEADS = [tuple(24 * head + 8 * part + place for head in range(4) for place in range(8)) for part in range(3)]
HOSTS: dict[str, dict[str, Host]] = {
    "bert": hosts(
        "bert.encoder.layer.1", "attention.self", "attention.output.dense", "intermediate.dense", "output.dense"
    ),
    "gpt2": {
        **_GPT2,
        **{
            name: replace(_GPT2[name], rows=tuple(range(start, start + 32)))
            for name, start in (("query", 0), ("key", 32), ("value", 64))
        },
    },
    "gpt_neox": {
        **_NEOX,
        **{name: replace(_NEOX[name], rows=_HEADS[part]) for part, name in enumerate(("query", "key", "value"))},
    },
    "llama": hosts(
        "model.layers.1", "self_attn", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "q_proj", "k_proj", "v_proj"
    ),
    "t5": hosts(
        "encoder.block.1.layer",
        "0.SelfAttention",
        "0.SelfAttention.o",
        "1.DenseReluDense.wi",
        "1.DenseReluDense.wo",
        *"qkv",
    ),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": nn.functional.gelu}


def dense(x: Tensor, linear: Any) -> Tensor:
    return x @ linear.weight.t() + linear.bias


def kronecker(x: Tensor, linear: Any) -> Tensor:
    left = linear.shared[0].left
    weight = sum(torch.kron(left[i], linear.s[i] @ linear.t[i]) for i in range(len(left)))
    return x @ weight + linear.bias


def term(name: str, part: Any, function: Any, x: Tensor, y: Tensor) -> Tensor:
    """The equations, from the papers."""
    if name == "ia3":
        return function.offset * y
    if name == "red":
        return function.offset * y + function.shift
    f = ACTIVATIONS[part.activation]
    if name == "houlsby":
        return dense(f(dense(y, function.down)), function.up)
    if name == "parallel":
        return part.scale * dense(f(dense(x, function.down)), function.up)
    assert name == "compacter"
    return kronecker(f(kronecker(y, function.down)), function.up)


class Wrapped(nn.Module):
    """A module, and what is done to its input and to its output."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.first: Callable[[Tensor], Tensor] = lambda x: x
        self.then: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y

    @property
    def weight(self) -> Tensor:
        """T5 looks at its type."""
        weight: Tensor = self.host.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.then(x, self.host(x))


def written_out(family: str, base: Any, model: Any, name: str, part: Any, mask: Tensor) -> Any:
    """The base with the terms of `model`, an injected copy, computed by wrapped modules; only layer 1 has any."""
    plain = copy.deepcopy(base)
    seen: dict[str, Tensor] = {}
    terms = {(placed.path, placed.term.name): placed.term for placed in placed_terms(model)}
    assert len(terms) == len(part.places)

    def wrap(path: str) -> Wrapped:
        there = plain.get_submodule(path)
        if not isinstance(there, Wrapped):
            there = Wrapped(there)
            plain.set_submodule(path, there)
        return there

    def gated(entry: Any, x: Tensor, change: Tensor) -> Tensor:
        if entry is None:
            return change
        opened = torch.sigmoid(x @ entry.weight[0] + entry.bias[0])
        if family not in DECODERS:
            opened = (opened * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return opened.unsqueeze(-1) * change

    for place in part.places:
        host = HOSTS[family]["down" if place in ("activation", "feed_forward") else place]
        ours: Any = terms[host.path, f"{name}_{place}"]
        assert (ours.entry is not None) is part.gate
        if place == "activation":

            def first(x: Tensor, ours: Any = ours) -> Tensor:
                return x + gated(ours.entry, x, term(name, part, ours.function, x, x))

            wrap(host.path).first = first
            continue
        if place == "feed_forward":
            wrap(HOSTS[family]["up"].path).first = lambda x: seen.setdefault("x", x)

        def then(x: Tensor, y: Tensor, ours: Any = ours, host: Host = host, place: str = place) -> Tensor:
            x = seen.pop("x") if place == "feed_forward" else x
            y = y.clone()
            rows = slice(None) if host.rows is None else list(host.rows)
            own = y[..., rows]
            y[..., rows] = own + gated(ours.entry, x, term(name, part, ours.function, x, own))
            return y

        wrapped, before = wrap(host.path), wrap(host.path).then
        wrapped.then = lambda x, y, before=before, then=then: then(x, before(x, y))  # type: ignore[misc]
    return plain


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("family", HOSTS)
def test_a_term_is_what_its_paper_says(family: str, name: str, gate: bool) -> None:
    base, batch = tiny_model(family), batch_of(family)
    part = {**FURTHER[name], "gate": gate}
    model = copy.deepcopy(base)
    unipelt.inject(model, {"preset": name, name: part, "layers": [1], "decoder": family in DECODERS, "cross": False})
    shake(model, std=0.3)
    found = unipelt.resolve({"preset": name, name: part}).part(name)
    plain = written_out(family, base, model, name, found, batch["attention_mask"])
    heads = {key: value for key, value in model.state_dict().items() if key in base.state_dict()}
    missing = plain.load_state_dict(heads, strict=False)
    assert set(missing.unexpected_keys) <= {key for key in heads if any(h.path in key for h in HOSTS[family].values())}
    with torch.no_grad():
        want, got, without = plain(**batch)[0], model(**batch)[0], base(**batch)[0]
    torch.testing.assert_close(got, want, atol=2e-5 * max(1.0, want.abs().max().item()), rtol=0)
    assert (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", FURTHER)
def test_a_closed_gate_is_the_model_without_the_term(name: str) -> None:
    base, batch = tiny_bert(), tiny_batch()
    model = copy.deepcopy(base)
    unipelt.inject(model, {"preset": name, name: {**FURTHER[name], "gate": True}, "train_head": False})
    shake(model)
    gates = entries(model)
    assert len(gates) == 3 * len(unipelt.resolve(name).part(name).places)
    with torch.no_grad():
        for entry in gates:
            entry.bias.fill_(-200.0)
        assert torch.equal(model(**batch).logits, base(**batch).logits)
        for entry in gates:
            entry.bias.fill_(0.0)
        assert not torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("name", ["ia3", "red", "houlsby"])
def test_a_term_reads_what_lora_has_changed_merged_or_not(name: str) -> None:
    part = {**FURTHER[name], "gate": False, "places": ["query", "value"]}
    model = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"rank": 3}, name: part})
    shake(model, std=0.3)
    want = model(**tiny_batch()).logits
    assert unipelt.fold(model).merged == 6
    torch.testing.assert_close(model(**tiny_batch()).logits, want)


@pytest.mark.parametrize("name", ["ia3", "red", "parallel"])
def test_what_starts_as_the_model_itself(name: str) -> None:
    base, batch = tiny_bert(), tiny_batch()
    model = unipelt.inject(copy.deepcopy(base), {"preset": name, name: {**FURTHER[name], "gate": True}})
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_gates_are_recorded_by_submodule_and_place() -> None:
    model = unipelt.inject(tiny_bert(), {"preset": "unipelt-ap", "ia3": {}, "parallel": {"bottleneck": 4}})
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**tiny_batch())
    names = {"ia3_key", "ia3_value", "ia3_activation", "parallel_feed_forward", "adapter", "prefix"}
    assert set(record) == names
    assert all(record[name].shape == (3, 3) for name in names)
    assert unipelt.parameter_counts(model).gates == {
        name: 3 * ((48 if name == "ia3_activation" else 32) + 1) for name in names
    }


def test_compacters_left_factors_are_one_for_all_layers() -> None:
    model = unipelt.inject(tiny_bert(), {"preset": "compacter", "compacter": FURTHER["compacter"]})
    left = [name for name in own_parameters(model) if name.endswith("left")]
    assert left == ["bert.encoder.unipelt.default.compacter_shared.left"]
    assert [own.part.kind for own in own_parts(model) if own.full_name in left] == ["compacter"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(left[0]).zero_()
        assert not torch.equal(other(**tiny_batch()).logits, model(**tiny_batch()).logits), "a copy has its own"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ia3": {"places": []}}, "places must name one or more of query, key,"),
        ({"ia3": {"places": ["key", "key"]}}, "none of them twice"),
        ({"ia3": {"places": ["head"]}}, "must be query or key or"),
        ({"houlsby": {"bottleneck": 0}}, "houlsby.bottleneck must be above 0"),
        ({"parallel": {"scale": -1}}, "parallel.scale must be above 0"),
        ({"compacter": {"bottleneck": 10}}, "compacter.terms must divide the bottleneck, 10: 4 does not"),
        ({"houlsby": {"width": 3}}, "unknown key 'houlsby.width'"),
        ({"houlsby": 3}, "houlsby must be a mapping"),
        ({"ia4": {}}, "unknown key 'ia4'; did you mean 'ia3'"),
        ({"more": []}, "unknown key 'more'"),
    ],
)
def test_configurations_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unipelt.resolve(values)


def test_configurations_as_objects() -> None:
    several = (unipelt.ParallelConfig(bottleneck=8), unipelt.IA3Config())
    config = unipelt.UniPELTConfig(more=several)
    assert [part.name for part in config.more] == ["ia3", "parallel"]
    assert config == unipelt.UniPELTConfig(more=several[::-1])
    assert unipelt.UniPELTConfig.from_dict(config.to_dict()) == config
    assert config.updated({"ia3": None}).more == several[:1]
    assert unipelt.resolve({"preset": "lora", "ia3": {}}).has_submodules
    with pytest.raises(ConfigError, match="names a submodule twice: ia3, ia3"):
        unipelt.UniPELTConfig(more=(unipelt.IA3Config(), unipelt.IA3Config()))
    for wrong in ((unipelt.LoRAConfig(),), "ia3"):
        with pytest.raises(ConfigError, match="more "):
            unipelt.UniPELTConfig(more=wrong)  # type: ignore[arg-type]


def test_a_width_that_the_terms_do_not_divide_is_refused_and_nothing_is_left() -> None:
    model = tiny_bert()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"compacter\.terms must divide the width of its place, 32"):
        unipelt.inject(model, {"preset": "compacter", "compacter": {"terms": 3, "bottleneck": 6}})
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_description_that_does_not_say_where_is_named() -> None:
    own = unipelt.Stack("encoder.layer", unipelt.Attention("attention.self", "query", "value"), norm="output.LayerNorm")
    bert = FAMILIES["bert"]
    try:
        FAMILIES["bert"] = unipelt.Family((own,))
        unipelt.remove(unipelt.inject(tiny_bert(), "unipelt-apl"))
        for method, missing in (("ia3", "key"), ("houlsby", "output"), ("parallel", "up")):
            with pytest.raises(unipelt.InjectionError, match=f"give it '{missing}'"):
                unipelt.inject(tiny_bert(), method)
    finally:
        FAMILIES["bert"] = bert


@pytest.mark.parametrize("name", ["houlsby", "parallel", "compacter"])
def test_a_checkpoint_that_says_it_is_huge_is_refused_before_memory_is_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unipelt.save(unipelt.inject(tiny_bert(), {"preset": name, name: FURTHER[name]}), tmp_path)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    manifest["unipelt"][name]["bottleneck"] = 1_000_000
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    model = tiny_bert()
    monkeypatch.setattr("unipelt.checkpoint.load.inject_as", lambda *args, **options: pytest.fail("memory was taken"))
    with pytest.raises(
        unipelt.CheckpointError,
        match=rf"does not fit its own configuration: \S+\.unipelt\.default\.{name}\S+ is \(.*(1000000|500000).*\) here",
    ):
        unipelt.load(model, tmp_path)
    assert not hasattr(model, "unipelt_injection")


def test_shared_factors_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unipelt.save(unipelt.inject(tiny_bert(), {"preset": "compacter", "compacter": FURTHER["compacter"]}), tmp_path)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    manifest["unipelt"]["compacter"] |= {"bottleneck": 32, "terms": 32}
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    for name in [name for name in tensors if "function" in name]:
        side = name.rpartition(".")[2]
        size = {"s": (32, 1, 1), "t": (32, 1, 1), "bias": (32,)}[side]
        tensors[name] = torch.zeros(size)
    save_file(tensors, weights)
    manifest["weights"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("unipelt.checkpoint.load.inject_as", lambda *args, **options: pytest.fail("memory was taken"))
    with pytest.raises(
        unipelt.CheckpointError, match=r"compacter_shared\.left is \(2, 2, 2\) there and \(32, 32, 32\) here"
    ):
        unipelt.load(tiny_bert(), tmp_path)


def test_a_gating_network_that_is_said_to_be_huge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unipelt.save(unipelt.inject(tiny_bert(), {"preset": "unipelt-al", "gate": {"network": "mlp"}}), tmp_path)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    manifest["unipelt"]["gate"]["hidden"] = 1_000_000
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("unipelt.checkpoint.load.inject_as", lambda *args, **options: pytest.fail("memory was taken"))
    with pytest.raises(unipelt.CheckpointError, match=r"entry\.\S+ is \(.*\) there and \(.*1000000.*\) here"):
        unipelt.load(tiny_bert(), tmp_path)


# A submodule of the user's own


@dataclass(frozen=True)
class ShiftConfig(unipelt.SubmoduleConfig):
    places: tuple[Place, ...] = ("value", "down")
    start: float = 0.5


class Shift(nn.Module):
    def __init__(self, config: ShiftConfig, spot: unipelt.Spot) -> None:
        super().__init__()
        self.shift = nn.Parameter(spot.weight.new_full((spot.outputs,), config.start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.shift.expand_as(y)


@pytest.fixture
def shift() -> Any:
    register_submodule("shift", ShiftConfig, Shift)
    yield
    del MODULES[SUBMODULES.pop("shift")]


def test_a_submodule_of_ones_own(shift: Any, tmp_path: Path) -> None:
    base: Any = tiny_bert()
    batch = tiny_batch()
    model: Any = copy.deepcopy(base)
    unipelt.inject(model, {"preset": "lora", "shift": {"gate": False, "places": ["value"]}, "train_head": False})
    with torch.no_grad():
        for layer in base.bert.encoder.layer:
            layer.attention.self.value.bias += 0.5
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
    unipelt.remove(model)

    unipelt.inject(model, {"preset": "lora", "shift": {}})
    shake(model)
    counts = unipelt.parameter_counts(model)
    assert counts.submodules["shift"] == 3 * 2 * 32
    assert counts.gates == {"shift_value": 3 * 33, "shift_down": 3 * 49}
    want = model(**batch).logits
    unipelt.save(model, tmp_path)
    loaded = unipelt.load(tiny_bert(), tmp_path)
    assert torch.equal(loaded(**batch).logits, want)
    assert sum(isinstance(module, FunctionTerm) for module in loaded.modules()) == 6
    assert "gated shift" in (tmp_path / "README.md").read_text()


def test_a_checkpoint_with_an_unknown_submodule_names_it(shift: Any, tmp_path: Path) -> None:
    unipelt.save(unipelt.inject(tiny_bert(), {"preset": "lora", "shift": {}}), tmp_path)
    config = SUBMODULES.pop("shift")
    try:
        with pytest.raises(unipelt.CheckpointError, match="unknown key 'shift'"):
            unipelt.load(tiny_bert(), tmp_path)
    finally:
        SUBMODULES["shift"] = config


def test_names_and_classes_that_cannot_be_registered(shift: Any) -> None:
    assert register_submodule("shift", ShiftConfig, Shift) is ShiftConfig
    for name in ("lora", "gate", "layers", "peft", "head", "two words", "ia3"):
        with pytest.raises(ValueError, match="name"):
            register_submodule(name, ShiftConfig, Shift)
    with pytest.raises(ValueError, match="inherits from SubmoduleConfig"):
        register_submodule("other", dict, Shift)  # type: ignore[arg-type]

    @dataclass(frozen=True)
    class Nowhere(unipelt.SubmoduleConfig):
        pass

    with pytest.raises(ValueError, match=r"Nowhere\(\) must give a configuration: places must name"):
        register_submodule("nowhere", Nowhere, Shift)
