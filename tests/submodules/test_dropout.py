"""Dropout of LoRA, before A, and of an adapter, in its bottleneck: while training, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, logits, shake, small, tiny_batch, tiny_bert
from inside import added_to
from tiny import tiny_batch as batch_of
from tiny import tiny_model
from torch import Tensor, nn

import unipelt
from unipelt.config.schema import ConfigError

BOTH: dict[str, Any] = {"lora": {"dropout": 0.4}, "adapter": {"dropout": 0.3}}
GATES: tuple[dict[str, Any], ...] = ({}, {"shared": True}, {"pooling": "static"}, {"network": "mlp", "hidden": 3})


def train_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """In training mode, without gradients."""
    with torch.no_grad():
        out: Tensor = model.train()(**batch).logits
    model.eval()
    return out


@pytest.mark.parametrize("part", ["lora", "adapter"])
def test_a_default_is_not_written_and_a_probability_is_checked(part: str) -> None:
    assert "dropout" not in unipelt.resolve("unipelt-apl").to_dict()[part]
    config = unipelt.resolve({"preset": "unipelt-apl", part: {"dropout": 0.1}})
    assert config.to_dict()[part]["dropout"] == 0.1
    assert unipelt.UniPELTConfig.from_dict(config.to_dict()) == config
    for wrong in (1.0, -0.1, 7):
        with pytest.raises(ConfigError, match=rf"{part}\.dropout must be at least 0 and below 1, not"):
            unipelt.resolve({"preset": part, part: {"dropout": wrong}})


@pytest.mark.parametrize("start", ["zero", "pissa"])
def test_lora_drops_what_a_reads(start: str) -> None:
    lora = {"rank": 3, "alpha": 6.0, "dropout": 0.4, "start": start}
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": lora})
    shake(model)
    term = added_to(model.bert.encoder.layer[0]).lora_query
    x, out = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    low, high = (
        (term.A, term.B) if start == "zero" else (torch.cat([term.A, term.A0]), torch.cat([term.B, -term.B0], 1))
    )
    assert_near(term.eval()(x, out, None), out + 2.0 * x @ low.t() @ high.t(), 1e-6)
    torch.manual_seed(5)
    got = term.train()(x, out, None)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    assert (dropped == 0).any()
    assert_near(got, out + 2.0 * dropped @ low.t() @ high.t(), 1e-6)


def test_decomposed_lora_drops_what_a_reads() -> None:
    """And scales the projection of x itself."""
    model: Any = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": {"decomposed": True, "dropout": 0.4}})
    shake(model)
    layer = model.bert.encoder.layer[0]
    function, query = added_to(layer).lora_query.function, layer.attention.self.query
    x = torch.randn(2, 5, 32)
    weight, update = query.weight, function.scale * function.B @ function.A
    scale = function.magnitude / (weight + update).norm(dim=1)
    torch.manual_seed(5)
    got = query(x) + function.train()(x, nn.functional.linear(x, weight, query.bias))
    torch.manual_seed(5)
    want = scale * (x @ weight.t() + nn.functional.dropout(x, 0.4) @ update.t()) + query.bias
    model.eval()
    assert_near(got - query(x), want - nn.functional.linear(x, weight, query.bias), 1e-5)


@pytest.mark.parametrize("gate", [False, True])
def test_an_adapter_drops_in_its_bottleneck(gate: bool) -> None:
    model: Any = unipelt.inject(
        tiny_bert(), {"preset": "adapter", "adapter": {"bottleneck": 9, "gate": gate, "dropout": 0.3}}
    )
    shake(model)
    term = added_to(model.bert.encoder.layer[0]).adapter
    x, y, half = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.full((2, 1, 1), 0.5)
    down = term.entry.extract(term.gate_name) if gate else term.down
    torch.manual_seed(5)
    got = term.train().add(x, y, half if gate else None, down(x))
    torch.manual_seed(5)
    inner = nn.functional.dropout(down(x).relu(), 0.3)
    assert_near(got, y + (0.5 if gate else 1.0) * term.up(inner), 1e-6)
    assert_near(term.eval().add(x, y, None, down(x)), y + term.up(down(x).relu()), 1e-6)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("family", ["bert", "llama", "bart", "gpt2"])
def test_gates_read_what_is_not_dropped(family: str, gate: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all that is dropped is dropped, LoRA adds nothing, and its gates are what they were."""
    if family in ("llama", "gpt2") and "network" not in gate and gate != {"pooling": "static"}:
        gate = {**gate, "pooling": "token"}
    base, batch = tiny_model(family), batch_of(family)
    config = {"preset": "lora", "lora": {"gate": True, "dropout": 0.4, "places": "all-linear"}, "gate": gate}
    model = unipelt.inject(copy.deepcopy(base), {**config, "train_head": False})
    shake(model)
    with unipelt.record_gates(model) as without:
        assert (logits(model, batch) - logits(base, batch)).abs().max() > 1e-3
    monkeypatch.setattr(
        nn.functional, "dropout", lambda x, p=0.5, training=True, inplace=False: 0.0 * x if training and p == 0.4 else x
    )
    with unipelt.record_gates(model) as record:
        got = train_logits(model, batch)
    assert_near(got, logits(base, batch), 1e-6)
    assert record.keys() == without.keys()
    first = min(record)
    assert record[first][0].shape == without[first][0].shape


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_out_of_training_it_changes_nothing(family: str, gate: bool, tmp_path: Path) -> None:
    """The same parts, numbers and counts as without, in one file or the other; and the same when folded."""
    preset = "unipelt-al" if gate else "unipelt-al-nogate"
    batch = batch_of(family)
    plain = unipelt.inject(tiny_model(family), small(preset))
    shake(plain)
    model = unipelt.inject(tiny_model(family), small(preset, **BOTH))
    shake(model)
    assert unipelt.parameter_counts(model) == unipelt.parameter_counts(plain)
    want = logits(model, batch)
    assert not torch.equal(train_logits(model, batch), want)
    assert torch.equal(logits(model, batch), want)
    unipelt.save(model, tmp_path)
    back = unipelt.load(tiny_model(family), tmp_path)
    assert torch.equal(logits(back, batch), want)
    assert not torch.equal(train_logits(back, batch), want)
    torch.manual_seed(3)
    first = train_logits(model, batch)
    torch.manual_seed(3)
    assert torch.equal(train_logits(back, batch), first)
    unipelt.fold(model, [batch], tolerance=1.0, closed=0.0)
    assert_near(logits(model, batch), want, 1e-5 if not gate else 0.2)


def test_without_a_dropout_no_dropout_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    real = nn.functional.dropout

    def noted(x: Tensor, p: float = 0.5, *rest: Any, **options: Any) -> Tensor:
        calls.append(p)
        return real(x, p, *rest, **options)

    monkeypatch.setattr(nn.functional, "dropout", noted)
    train_logits(tiny_bert(), tiny_batch())
    without = len(calls)
    train_logits(unipelt.inject(tiny_bert(), "unipelt-apl"), tiny_batch())
    assert len(calls) == 2 * without


def test_dropped_updates_train_in_a_checkpointed_pass() -> None:
    """The second computation, in the backward pass, drops the same numbers."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = unipelt.inject(tiny_model("llama"), small("unipelt-al", **BOTH)).train()
        shake(model)
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(7)
        model(**batch_of("llama")).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
