"""Other gates than the paper's: per token, static, shared, behind networks, of other form."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, shake, tiny_batch, tiny_bert
from inside import added_to, gradients_of_parts, parts
from tiny import FURTHER, WITH_PREFIX, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn

import unipelt
from unipelt.config.schema import ConfigError
from unipelt.submodules.gate import Gates
from unipelt.submodules.room import ROOM

GATES: dict[str, dict[str, Any]] = {
    "token": {"pooling": "token"},
    "static": {"pooling": "static"},
    "mlp": {"network": "mlp", "hidden": 6},
    "recurrent": {"network": "recurrent", "hidden": 6},
    "transformer": {"network": "transformer", "hidden": 6},
    "shared": {"shared": True},
    "shared over padding": {"shared": True, "pooling": "mean"},
    "shared tokens": {"shared": True, "pooling": "token"},
    "shared transformer": {"shared": True, "network": "transformer"},
    "softmax": {"shared": True, "activation": "softmax"},
    "tanh": {"activation": "tanh", "start": 0.2},
    "temperature": {"temperature": 3.0, "start": 0.8},
}
BY_EXAMPLE = [name for name in GATES if name not in ("token", "shared tokens", "shared over padding")]
METHOD: dict[str, Any] = {"preset": "unipelt-apl", "prefix": {"length": 4, "hidden": 8}, "lora": {"rank": 3}}


def make(gate: dict[str, Any], family: str = "bert", **changes: Any) -> Any:
    model = tiny_model(family)
    method = METHOD if family in WITH_PREFIX else {"preset": "unipelt-al", "lora": {"rank": 3}}
    unipelt.inject(model, {**method, "gate": gate, **FURTHER, **changes})
    shake(model)
    return model


# What a gate is


def numbers(layer: nn.Module, names: tuple[str, ...]) -> tuple[Tensor | None, Tensor]:
    """The weights of gates, (G, h), and their biases, (G,); no weights where they have no input."""
    own = parts(layer, "gate")
    weights = [own[f"gate.{name}.weight"] for name in names if f"gate.{name}.weight" in own]
    return torch.cat(weights) if weights else None, torch.cat([own[f"gate.{name}.bias"] for name in names])


def expected(layer: nn.Module, config: unipelt.GateConfig, x: Tensor, mask: Tensor) -> Tensor:
    """(B, G), averaged over real tokens where there is one a token: written out for one text at a time."""
    entry = added_to(layer).entry
    network = entry.network
    weight, bias = numbers(layer, entry.gates.names)
    rows = []
    for text, real in zip(x, mask.bool(), strict=True):
        tokens = text[real]
        states = tokens
        if config.network == "mlp":
            states = torch.tanh(network.inner(tokens))
        elif config.network == "recurrent":
            state = torch.zeros(config.hidden)
            for token in tokens:
                update = torch.sigmoid(network.update(token))
                state = (1 - update) * state + update * network.candidate(token)
            states = state[None]
        elif config.network == "transformer":
            embedded = network.embed(tokens)
            query, key, value = network.attend(embedded).split(config.hidden, dim=-1)
            weights = torch.softmax(query @ key.t() / math.sqrt(config.hidden), dim=-1)
            states = (embedded + weights @ value).mean(0, keepdim=True)
        assert (weight is None) == (config.pooling == "static")
        scores = bias[None] if weight is None else states @ weight.t() + bias
        scores = scores / config.temperature
        opened = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softmax": lambda s: torch.softmax(s, -1)}[
            config.activation
        ](scores)
        rows.append(opened.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "kind", [name for name in GATES if name not in ("token", "shared tokens", "shared over padding")]
)
def test_a_gate_is_what_its_configuration_says(kind: str) -> None:
    model, batch = make(GATES[kind]), tiny_batch()
    config = unipelt.GateConfig(**GATES[kind])
    with unipelt.record_gates(model) as record, torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        for index, layer in enumerate(model.bert.encoder.layer):
            names = added_to(layer).entry.gates.names
            want = expected(layer, config, states[index], batch["attention_mask"])
            got = torch.stack([record[name][:, index] for name in names], dim=1)
            torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
            assert set(names) >= {"prefix", "lora_query", "lora_value"}
            assert ("adapter" in names) == config.shared


def test_gates_of_tokens_are_recorded_by_their_mean_over_the_pass() -> None:
    model, batch = make(GATES["token"]), tiny_batch(lengths=(9, 9, 9))
    with unipelt.record_gates(model) as record, torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    layer: Any = model.bert.encoder.layer[1]
    names = added_to(layer).entry.gates.names
    weight, bias = numbers(layer, names)
    assert weight is not None
    want = torch.sigmoid(states[1] @ weight.t() + bias).mean(1)
    torch.testing.assert_close(torch.stack([record[name][:, 1] for name in names], dim=1), want)


# What it does


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in ("bert", "mpnet") for kind in GATES),
        *((family, kind) for family in ("albert", "deberta-v2", "modernbert") for kind in ("shared", "token")),
    ],
)
def test_every_kind_of_gate_keeps_the_promises(family: str, kind: str, tmp_path: Path) -> None:
    base, model, batch = tiny_model(family), make(GATES[kind], family), batch_of(family)
    want = logits(model, batch)
    if "padding" not in kind:
        wider = {name: nn.functional.pad(tensor, (0, 6), value=name == "input_ids") for name, tensor in batch.items()}
        torch.testing.assert_close(logits(model, wider), want, atol=2e-5, rtol=0)
    unipelt.save(model, tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_model(family), tmp_path), batch), want)
    assert torch.equal(logits(copy.deepcopy(model), batch), want)
    model.train()
    model(**batch).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.any(), name
    assert all(gradient is not None and gradient.any() for gradient in gradients_of_parts(model).values())
    unipelt.remove(model.eval())
    assert torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("family", [name for name in ("bert", "mpnet", "albert", "modernbert") if name in WITH_PREFIX])
@pytest.mark.parametrize("kind", ["token", "shared", "shared tokens", "transformer"])
def test_equal_gates_act_as_static_ones_do(family: str, kind: str) -> None:
    """With weights at zero a gate is sigmoid(bias), however it is computed and brought to where it acts."""
    mass = {"prefix": {"length": 4, "hidden": 8, "gating": "mass"}}
    model, static = make(GATES[kind], family, **mass), make(GATES["static"], family, **mass)
    with torch.no_grad():
        for name, part in parts(model, "gate").items():
            if name.endswith(".weight") and ".gate.network." not in name:
                part.zero_()
        own = parts(model)
        for name, part in parts(static).items():
            part.copy_(own[name])
        for name, parameter in static.named_parameters():
            if ROOM not in name.split("."):
                parameter.copy_(model.get_parameter(name))
    batch = batch_of(family)
    torch.testing.assert_close(logits(model, batch), logits(static, batch), atol=1e-5, rtol=0)


def test_the_gate_of_a_token_scales_that_tokens_adapter() -> None:
    method = {"preset": "adapter", "adapter": {"gate": True}, "gate": GATES["token"]}
    model: Any = unipelt.inject(tiny_bert(), method)
    shake(model)
    layer = model.bert.encoder.layer[0]
    own, adapter = parts(layer), added_to(layer).adapter
    x = torch.randn(2, 5, 32)
    gate = torch.sigmoid(x @ own["gate.adapter.weight"][0] + own["gate.adapter.bias"])
    low = torch.relu(x @ own["adapter.down.weight"].t() + own["adapter.down.bias"])
    want = gate[..., None] * (low @ own["adapter.up.weight"].t() + own["adapter.up.bias"])
    torch.testing.assert_close(adapter(x, torch.zeros_like(x), None), want)


# Where gates begin


@pytest.mark.parametrize(
    ("gate", "start"), [({}, 0.5), ({"start": 0.9}, 0.9), ({"start": 0.1, "temperature": 4.0}, 0.1)]
)
def test_gates_begin_where_they_should(gate: dict[str, Any], start: float) -> None:
    model = unipelt.inject(tiny_bert(), {**METHOD, "gate": gate})
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**tiny_batch())
    for values in record.values():
        assert values.mean().item() == pytest.approx(start, abs=0.02)


@pytest.mark.parametrize("gate", [{}, {"start": 0.8}, {"shared": True}, {"pooling": "static"}, {"temperature": 3.0}])
def test_a_prefixs_gate_begins_where_it_should(gate: dict[str, Any]) -> None:
    """And the others where they would without it."""
    prefix = {**METHOD["prefix"], "gating": "mass", "gate_start": 0.03}
    model = unipelt.inject(tiny_bert(), {**METHOD, "gate": gate, "prefix": prefix})
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**tiny_batch())
    starts = {name: values.mean().item() for name, values in record.items()}
    assert starts.pop("prefix") == pytest.approx(0.03, abs=0.005)
    assert set(starts) == {"lora_query", "lora_value", "adapter"}
    assert list(starts.values()) == pytest.approx([gate.get("start", 0.5)] * 3, abs=0.02)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_so_do_the_prefixes_of_every_stack(family: str) -> None:
    parts = {"adapter": None, "lora": None, "prefix": {"length": 3, "hidden": 8, "gating": "mass", "gate_start": 0.03}}
    model = unipelt.inject(tiny_model(family), {"preset": "unipelt-apl", **parts})
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**batch_of(family))
    assert len(record) == (3 if family == "bart" else 1)
    assert all(values.mean().item() == pytest.approx(0.03, abs=0.01) for values in record.values())


def test_a_prefix_that_begins_closed_is_nearly_not_there() -> None:
    """Under `mass`; under `scale` its keys of zeros take attention all the same (the paper's footnote 3)."""
    base = tiny_bert()
    moved = {}
    for gating in ("mass", "scale"):
        prefix = {"length": 5, "hidden": 8, "gate": True, "gating": gating, "gate_start": 1e-4}
        model = unipelt.inject(copy.deepcopy(base), {"preset": "prefix", "prefix": prefix})
        moved[gating] = (logits(model, tiny_batch()) - logits(base, tiny_batch())).abs().max().item()
    assert moved["mass"] < 1e-3 * moved["scale"]


@pytest.mark.parametrize("family", ["bert", "bart", "llama", "gpt2"])
def test_a_prefix_with_a_softmax_of_its_own_begins_as_nearly_nothing(family: str) -> None:
    """However open its gate: its values are near zero, and it takes nothing from the text."""
    base, batch = tiny_model(family), batch_of(family)
    moved = {}
    for softmax in ("own", "shared"):
        prefix = {"length": 5, "hidden": 8, "gate": True, "softmax": softmax}
        model = unipelt.inject(copy.deepcopy(base), {"preset": "prefix", "prefix": prefix})
        moved[softmax] = (logits(model, batch) - logits(base, batch)).abs().max().item()
    assert moved["own"] < 0.02 * moved["shared"]


def test_its_gate_may_be_below_zero() -> None:
    """Since it has no logarithm, in a decoder either."""
    prefix = {"length": 5, "hidden": 8, "softmax": "own"}
    config = {"preset": "prefix", "prefix": {**prefix, "gate": True}, "gate": {"activation": "tanh", "start": -0.5}}
    base, batch = tiny_model("llama"), batch_of("llama")
    model = unipelt.inject(copy.deepcopy(base), config)
    shake(model, std=0.3)
    with unipelt.record_gates(model) as record:
        opened = logits(model, batch)
    assert record["prefix"].min() < 0
    assert (opened - logits(base, batch)).abs().max() > 1e-2


def test_a_zero_start_is_the_model_itself() -> None:
    base = tiny_bert()
    model = unipelt.inject(copy.deepcopy(base), {"preset": "unipelt-al", "gate": {"activation": "tanh"}, **FURTHER})
    assert torch.equal(logits(model, tiny_batch()), logits(base, tiny_batch()))
    model(**tiny_batch()).logits.sum().backward()
    moved = [name for name, gradient in gradients_of_parts(model).items() if gradient is not None and gradient.any()]
    assert any(".gate.adapter." in name for name in moved), "gates learn from there"


# Parameters


def test_counts() -> None:
    """tiny_bert is 32 wide with 3 layers."""
    counts = {
        name: unipelt.parameter_counts(unipelt.inject(tiny_bert(), {**METHOD, "gate": gate})).gates
        for name, gate in GATES.items()
    }
    names = ("adapter", "prefix", "lora_query", "lora_value")
    assert counts["token"] == counts["shared"] == counts["tanh"] == dict.fromkeys(names, 3 * 33)
    assert counts["static"] == dict.fromkeys(names, 3)
    networks = 2 * 3  # one at attention's entry, one of the adapter
    assert counts["mlp"] == {**dict.fromkeys(names, 3 * 7), "network": networks * (32 * 6 + 6)}
    assert counts["recurrent"] == {**dict.fromkeys(names, 3 * 7), "network": networks * 2 * (32 * 6 + 6)}
    assert counts["transformer"]["network"] == networks * (32 * 6 + 6 + 6 * 18 + 18)
    assert counts["shared transformer"]["network"] == 3 * (32 * 16 + 16 + 16 * 48 + 48)


# Penalties


def test_penalties() -> None:
    model, batch = make({}), tiny_batch()
    with unipelt.record_gates(model, detach=False) as record:
        model(**batch)
    gates = torch.cat([values.flatten() for values in record.values()])
    entropy = torch.distributions.Bernoulli(gates).entropy().mean()
    torch.testing.assert_close(unipelt.gate_penalty(record, "entropy"), entropy)
    torch.testing.assert_close(unipelt.gate_penalty(record, "sparsity"), gates.mean())
    unipelt.gate_penalty(record, "sparsity").backward()
    touched = {name for name, gradient in gradients_of_parts(model).items() if gradient is not None and gradient.any()}
    biases = {name for name in parts(model, "gate") if name.endswith(".bias")}
    assert len(biases) == 3 * len(record)
    assert biases <= touched
    with pytest.raises(ValueError, match="kind must be entropy or sparsity"):
        unipelt.gate_penalty(record, "l2")  # type: ignore[arg-type]
    with unipelt.record_gates(make(GATES["tanh"], prefix=None)) as record, pytest.raises(KeyError):
        unipelt.gate_penalty(record, "entropy")


def test_gates_recorded_for_reading_have_no_graph() -> None:
    model = make({})
    with unipelt.record_gates(model) as record:
        model(**tiny_batch())
    assert not any(values.requires_grad for values in record.values())


# Refused


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"activation": "softmax"}, "needs shared: true"),
        ({"start": 0.0}, "start must be above 0 and below 1 under sigmoid, not 0.0"),
        ({"activation": "tanh", "start": 1.0}, "start must be above -1 and below 1 under tanh"),
        ({"activation": "softmax", "shared": True, "start": 0.5}, "start must be nothing, since gates sum to 1"),
        ({"pooling": "static", "network": "mlp"}, "static gates have no input"),
        ({"pooling": "static", "shared": True}, "static gates have no input"),
        ({"pooling": "token", "network": "recurrent"}, "reads all of a text, so its pooling is masked_mean"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"hidden": 0}, "hidden must be above 0"),
        ({"network": "lstm"}, "network must be linear or mlp or recurrent or transformer"),
    ],
)
def test_gates_that_cannot_be_meant(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unipelt.resolve({"preset": "unipelt-apl", "gate": gate})


def test_a_prefixs_gate_has_the_bounds_of_all_gates() -> None:
    for start, activation, message in (
        (0.0, "sigmoid", "prefix.gate_start must be above 0 and below 1 under sigmoid, not 0.0"),
        (-1.0, "tanh", "prefix.gate_start must be above -1 and below 1 under tanh"),
        (0.5, "softmax", "prefix.gate_start must be nothing, since gates sum to 1"),
    ):
        gate = {"activation": activation, "shared": activation == "softmax"}
        with pytest.raises(ConfigError, match=message):
            unipelt.resolve({"preset": "unipelt-apl", "gate": gate, "prefix": {"gate_start": start}})


def test_tanh_has_no_logarithm() -> None:
    with pytest.raises(ConfigError, match="gating mass takes its logarithm"):
        unipelt.resolve({"preset": "unipelt-ap", "gate": {"activation": "tanh"}, "prefix": {"gating": "mass"}})
    model = tiny_model("llama")
    with pytest.raises(unipelt.InjectionError, match="by its logarithm, and tanh may be below 0"):
        unipelt.inject(model, {"preset": "unipelt-ap", "gate": {"activation": "tanh"}})
    assert not any(isinstance(module, Gates) for module in model.modules())


@pytest.mark.parametrize("network", ["recurrent", "transformer"])
def test_a_causal_layer_does_not_read_a_whole_text(network: str) -> None:
    with pytest.raises(ConfigError, match="a causal layer would see the future"):
        unipelt.inject(tiny_model("llama"), {"preset": "unipelt-apl", "gate": {"network": network}})


def test_a_softmax_over_one_gate_is_refused() -> None:
    method = {"preset": "adapter", "adapter": {"gate": True}, "gate": {"shared": True, "activation": "softmax"}}
    with pytest.raises(ConfigError, match="a softmax over one gate, adapter, is always 1"):
        unipelt.inject(tiny_bert(), method)


@pytest.mark.parametrize("kind", ["shared", "tanh"])
def test_what_is_not_folded(kind: str) -> None:
    model = make(GATES[kind])
    with pytest.raises(unipelt.FoldError, match="shared gates, and gates that are not between 0 and 1"):
        unipelt.fold(model, [tiny_batch()])


@pytest.mark.parametrize("kind", ["static", "mlp", "temperature"])
def test_what_is_folded(kind: str) -> None:
    model = unipelt.inject(tiny_bert(), {**METHOD, "gate": GATES[kind]})
    shake(model, std=0.02)
    want = logits(model, tiny_batch())
    report = unipelt.fold(model, [tiny_batch(), tiny_batch(seed=3)], tolerance=0.05)
    assert report.outcomes["kept"] == 0
    torch.testing.assert_close(logits(model, tiny_batch()), want, atol=5e-3, rtol=0)


def test_fields_that_came_later_are_written_only_where_they_differ() -> None:
    assert unipelt.resolve("unipelt-apl").to_dict()["gate"] == {"pooling": "masked_mean"}
    config = unipelt.resolve({"preset": "unipelt-apl", "gate": {"network": "mlp", "hidden": 16}})
    assert config.to_dict()["gate"] == {"pooling": "masked_mean", "network": "mlp"}
    assert unipelt.resolve(config.to_dict()) == config
    back = config.updated({"gate": {"network": "linear"}})
    assert back == unipelt.resolve("unipelt-apl")
