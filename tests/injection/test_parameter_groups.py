"""Groups for an optimizer: every parameter that trains is in one, at the learning rate of its part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import logits, shake, small, tiny_batch, tiny_bert
from inside import parts

import unipelt
from unipelt.checkpoint.manifest import WEIGHTS


def by_name(model: Any, groups: list[dict[str, Any]]) -> dict[str, tuple[str, float, float]]:
    """Return the part, the learning rate and the weight decay of every parameter that is in a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, name
            found[name] = (group["name"], group["lr"], group["weight_decay"])
    return found


def ends(found: dict[str, tuple[str, float, float]], layer: str = "layer.1.") -> dict[str, tuple[str, float, float]]:
    """Return what is in the head and in one layer, by the end of the name."""
    return {
        name.rpartition(layer)[2].replace("unipelt.default.", ""): value
        for name, value in found.items()
        if layer in name or "layer." not in name
    }


def test_each_part_has_its_rate_and_matrices_alone_decay() -> None:
    model = unipelt.inject(tiny_bert(), small("unipelt-apl"))
    shake(model)
    other = copy.deepcopy(model)
    groups = unipelt.parameter_groups(
        model, lr=1e-3, weight_decay=0.01, gate=2e-3, head=3e-3, lora_b=4e-3, adapter=5e-3, prefix=6e-3
    )
    assert ends(by_name(model, groups)) == {
        "entry.gate_weight": ("gate", 2e-3, 0.01),
        "entry.bias": ("gate", 2e-3, 0.0),
        "entry.row_weight": ("lora", 1e-3, 0.01),
        "lora_query.B": ("lora_b", 4e-3, 0.01),
        "lora_value.B": ("lora_b", 4e-3, 0.01),
        "adapter.entry.gate_weight": ("gate", 2e-3, 0.01),
        "adapter.entry.gate_bias": ("gate", 2e-3, 0.0),
        "adapter.entry.row_weight": ("adapter", 5e-3, 0.01),
        "adapter.entry.row_bias": ("adapter", 5e-3, 0.0),
        "adapter.up.weight": ("adapter", 5e-3, 0.01),
        "adapter.up.bias": ("adapter", 5e-3, 0.0),
        "bert.encoder.prefix_network.embedding": ("prefix", 6e-3, 0.01),
        "bert.encoder.prefix_network.w1.weight": ("prefix", 6e-3, 0.01),
        "bert.encoder.prefix_network.w1.bias": ("prefix", 6e-3, 0.0),
        "bert.encoder.prefix_network.w2.weight": ("prefix", 6e-3, 0.01),
        "bert.encoder.prefix_network.w2.bias": ("prefix", 6e-3, 0.0),
        "classifier.weight": ("head", 3e-3, 0.01),
        "classifier.bias": ("head", 3e-3, 0.0),
    }
    assert by_name(model, groups).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len({(group["name"], group["lr"], group["weight_decay"]) for group in groups})
    # the split of a parameter changes no number, and no name in a checkpoint
    assert torch.equal(logits(model), logits(other))
    assert parts(model).keys() == parts(other).keys()
    assert all(torch.equal(value, parts(other)[name]) for name, value in parts(model).items())


def test_one_rate_for_all_splits_nothing(tmp_path: Any) -> None:
    model = unipelt.inject(tiny_bert(), small("unipelt-apl"))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    found = ends(by_name(model, unipelt.parameter_groups(model, lr=1e-3, gate=1e-3)))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert found["entry.weight"] == ("lora", 1e-3, 0.0)
    assert found["adapter.entry.weight"] == ("adapter", 1e-3, 0.0)
    assert {rate for _, rate, _ in found.values()} == {1e-3}
    unipelt.save(model, tmp_path / "one")
    unipelt.parameter_groups(model, lr=1e-3, gate=1e-2)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} != before
    unipelt.save(model, tmp_path / "other")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_what_trains_of_the_base_has_the_rate_of_the_rest() -> None:
    model = unipelt.inject(tiny_bert(), "bitfit")
    found = by_name(model, unipelt.parameter_groups(model, lr=1e-3, weight_decay=0.1, head=1e-2))
    assert found.pop("classifier.weight") == ("head", 1e-2, 0.1)
    assert found.pop("classifier.bias") == ("head", 1e-2, 0.0)
    assert len(found) > 10
    assert set(found.values()) == {("base", 1e-3, 0.0)}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lr": 0}, "lr must be a learning rate above 0, not 0"),
        ({"lr": True}, "lr must be a learning rate above 0, not True"),
        ({"gate": -1e-3}, "gate must be a learning rate above 0, not -0.001"),
        ({"head": float("inf")}, "head must be a learning rate above 0, not inf"),
        ({"lora": "1e-3"}, "lora must be a learning rate above 0, not '1e-3'"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or above, not -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or above, not nan"),
        ({"weight_decay": "0.1"}, "weight_decay must be 0 or above, not '0.1'"),
        ({"prefix": 1e-3}, "this model has no submodule 'prefix'; it has lora"),
    ],
)
def test_rates_that_cannot_be_meant_are_refused(rates: dict[str, Any], message: str) -> None:
    model = unipelt.inject(tiny_bert(), small("lora", lora={"gate": True}))
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        unipelt.parameter_groups(model, **{"lr": 1e-3, **rates})
    assert str(caught.value) == message
    assert [name for name, _ in model.named_parameters()] == before


def test_a_step_moves_each_part_by_its_rate() -> None:
    model = unipelt.inject(tiny_bert(), small("unipelt-apl"))
    shake(model)
    before = {name: value.clone() for name, value in parts(model).items()}
    optimizer = torch.optim.SGD(unipelt.parameter_groups(model, lr=1e-3, gate=1e-1))
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    gradients: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad
    optimizer.step()
    moved = parts(model)
    layer = "bert.encoder.layer.0."
    entry = f"{layer}unipelt.default.entry."
    for name in ("gate", "row"):
        want = (1e-1 if name == "gate" else 1e-3) * gradients[f"{entry}{name}_weight"]
        first = "gate.prefix.weight" if name == "gate" else "lora_query.A"
        rows = len(before[f"{layer}{first}"].reshape(-1, 32))
        torch.testing.assert_close(
            (before[f"{layer}{first}"] - moved[f"{layer}{first}"]).reshape(-1, 32), want[:rows], atol=1e-7, rtol=1e-4
        )


def test_the_number_of_trained_parameters_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.print_trainable_parameters(model)
    unipelt.inject(model, "lora")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = 3 * 4 * 8 * 32 + 2 * 33
    unipelt.print_trainable_parameters(model)
    want = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == want
