"""Replicas of one model trained at once: each as by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import shake, tiny_batch, tiny_bert
from tiny import METHODS, tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import unipelt
from unipelt.pack import Pack, PackError, Replica, _Folding, kept_values, losses

RATES = (1e-2, 3e-3, 1e-3)
EPSILON = 1e-5  # or a step on a gradient that is nothing but rounding is as long as any
LENGTHS = ((5, 9, 7), (3, 8, 4), (9, 2, 6))


def starts(model: Any) -> list[dict[str, Tensor]]:
    """Where each of three replicas starts; none of them where the model is."""
    found = []
    for seed in range(len(RATES)):
        other = copy.deepcopy(model)
        shake(other, seed + 1)
        found.append(kept_values(other))
    return found


def alone(model: Any, values: dict[str, Tensor]) -> Any:
    """A model by itself that starts there."""
    other = copy.deepcopy(model)
    other.load_state_dict(values, strict=False)
    return other


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """A batch of each replica, padded to the longest of all."""
    return [tiny_batch(seed + index, lengths) for index, lengths in enumerate(LENGTHS)]


def join(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([batch[name] for batch in several]) for name in several[0]}


LABELS = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]])
REAL = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
"""The second replica's last example only fills its batch."""


def loss_of(model: Any, batch: dict[str, Tensor], index: int) -> Tensor:
    real = REAL[index]
    logits = model(**{name: tensor[real] for name, tensor in batch.items()}).logits
    return nn.functional.cross_entropy(logits, LABELS[index][real])


def values_of(model: Any) -> dict[str, Tensor]:
    return kept_values(model)


# Each as by itself


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_each_by_itself(method: str, attention: str) -> None:
    model = unipelt.inject(tiny_bert(attn_implementation=attention), method)
    pack = Pack(model, tokens=9)
    begun = starts(model)
    replicas = [pack.add(values) for values in begun]
    several = losses(pack(join(batches())), LABELS, REAL)
    pack.backward(several)
    for index, (values, batch) in enumerate(zip(begun, batches(), strict=True)):
        single = alone(model, values)
        loss = loss_of(single, batch, index)
        loss.backward()
        torch.testing.assert_close(several[index], loss)
        compare_gradients(pack, replicas[index], single)


def compare_gradients(pack: Pack, replica: Replica, single: Any) -> None:
    assert replica.decayed.grad is not None
    assert replica.plain.grad is not None
    flat = torch.cat([replica.decayed.grad, replica.plain.grad])
    trained = {name: parameter for name, parameter in single.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in trained.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(pack.places[name].of(flat), expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "albert", "camembert"])
def test_other_encoders(family: str) -> None:
    model = unipelt.inject(tiny_model(family), "unipelt-apl")
    pack = Pack(model, tokens=9)
    begun = starts(model)
    for values in begun:
        pack.add(values)
    packed = pack(join(batches()))
    for index, (values, batch) in enumerate(zip(begun, batches(), strict=True)):
        torch.testing.assert_close(packed[index], alone(model, values)(**batch).logits, rtol=1e-4, atol=1e-5)


def test_scores() -> None:
    model = unipelt.inject(tiny_bert(1, problem_type="regression"), "lora")
    pack = Pack(model, tokens=9)
    begun = starts(model)
    for values in begun:
        pack.add(values)
    scores = LABELS * 2.5
    several = losses(pack(join(batches())), scores, torch.ones_like(REAL))
    for index, batch in enumerate(batches()):
        expected = alone(model, begun[index])(**batch, labels=scores[index]).loss
        torch.testing.assert_close(several[index], expected)


def optimizer_of(replica: Replica, rate: float) -> torch.optim.Optimizer:
    groups = [{"params": [replica.decayed], "weight_decay": 0.1}, {"params": [replica.plain], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, eps=EPSILON)


def test_trajectories_are_those_of_each_by_itself_while_places_change() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    decayed = {name for name in kept_values(model) if not name.endswith("bias")}
    pack = Pack(model, tokens=9, decayed=decayed)
    begun = starts(model)
    replicas = [pack.add(values) for values in begun]
    optimizers = [optimizer_of(replica, rate) for replica, rate in zip(replicas, RATES, strict=True)]
    going, steps = [0, 1, 2], {0: 6, 1: 3, 2: 6}
    for step in range(6):
        if step == steps[1]:
            gone = replicas[1].tensors()
            pack.remove(replicas[1])
            kept = {name: tensor.clone() for name, tensor in gone.items()}
            going = [0, 2]
        several = batches(10 * step)
        logits = pack(join([several[index] for index in going]))
        pack.backward(losses(logits, LABELS[going], REAL[going]))
        for index in going:
            nn.utils.clip_grad_norm_(replicas[index].parameters, 0.1)
            optimizers[index].step()
    torch.testing.assert_close(replicas[1].tensors(), kept, rtol=0, atol=0)

    for index, replica in enumerate(replicas):
        single = alone(model, begun[index])
        trained = {name: parameter for name, parameter in single.named_parameters() if parameter.requires_grad}
        groups = [
            {"params": [trained[name] for name in trained if name in decayed], "weight_decay": 0.1},
            {"params": [trained[name] for name in trained if name not in decayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=RATES[index], eps=EPSILON)
        for step in range(steps[index]):
            optimizer.zero_grad()
            loss_of(single, batches(10 * step)[index], index).backward()
            norm = nn.utils.clip_grad_norm_(trained.values(), 0.1)
            assert norm > 0.1, "or nothing is clipped"
            optimizer.step()
        found = replica.tensors()
        moved = max((found[name] - begun[index][name]).abs().max().item() for name in found)
        assert moved > RATES[index]
        for name, value in values_of(single).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_some_of_the_replicas_in_any_order() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    pack = Pack(model, tokens=9)
    replicas = [pack.add(values) for values in starts(model)]
    several = batches()
    with torch.no_grad():
        whole = pack(join(several))
        part = pack(join([several[2], several[0]]), [replicas[2], replicas[0]])
    torch.testing.assert_close(part, whole[[2, 0]], rtol=1e-5, atol=1e-6)


def test_all_of_the_replicas_by_name_train() -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    pack = Pack(model, tokens=9)
    replicas = [pack.add(values) for values in starts(model)]
    found = []
    for asked in (None, list(replicas)):
        pack.backward(losses(pack(join(batches()), asked), LABELS, REAL))
        found.append([replica.plain.grad.clone() for replica in replicas if replica.plain.grad is not None])
    assert len(found[0]) == len(found[1]) == 3
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_what_decays_what_does_not_and_what_is_frozen_lie_apart() -> None:
    model = unipelt.inject(tiny_bert(), {"preset": "unipelt-al", "train_head": False})
    values = kept_values(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained < values.keys(), "the head is kept all the same"
    decayed = {name for name in trained if not name.endswith("bias")} | {
        "classifier.weight",
        "bert.pooler.dense.weight",
    }
    pack = Pack(model, tokens=9, decayed=decayed)
    replicas = [pack.add(values), pack.add(values)]
    expected = {name: -(-value.numel() // 64) * 64 for name, value in values.items()}
    replica = replicas[1]
    assert replica.decayed.numel() == sum(expected[name] for name in trained & decayed)
    assert replica.plain.numel() == sum(expected[name] for name in trained - decayed)
    assert replica.row.numel() == sum(expected.values())
    with torch.no_grad():
        replica.decayed.fill_(7.0)
        replica.plain.fill_(8.0)
    for name, tensor in replica.tensors().items():
        if name in trained:
            assert (tensor == (7.0 if name in decayed else 8.0)).all(), name
        else:
            assert torch.equal(tensor, values[name]), name
    for name, tensor in replica.tensors(replicas[0].row).items():
        assert torch.equal(tensor, values[name]), name


def test_the_model_is_left_as_it_was() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    before = copy.deepcopy(model.state_dict())
    model.train()
    pack = Pack(model, tokens=9)
    replica = pack.add(starts(model)[0])
    pack.backward(losses(pack(join(batches()[:1])), LABELS[:1], REAL[:1]))
    optimizer_of(replica, 0.1).step()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_dropout_differs_between_replicas() -> None:
    model = unipelt.inject(tiny_bert(dropout=0.3), "unipelt-apl")
    pack = Pack(model, tokens=9)
    values = starts(model)[0]
    for _ in range(2):
        pack.add(values)
    same = join([batches()[0]] * 2)
    torch.testing.assert_close(*pack(same), rtol=1e-5, atol=1e-6)
    model.train()
    first, second = pack(same)
    assert (first - second).abs().max() > 1e-3


def test_half_precision() -> None:
    model = unipelt.inject(tiny_bert(), "unipelt-apl")
    pack = Pack(model, tokens=9)
    begun = starts(model)
    for values in begun:
        pack.add(values)
    with torch.autocast("cpu", torch.bfloat16):
        packed = pack(join(batches()))
        single = alone(model, begun[1])(**batches()[1]).logits
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed[1], single, rtol=0.05, atol=0.05)
    pack.backward(losses(packed, LABELS, REAL))
    assert pack.replicas[1].plain.grad is not None
    assert pack.replicas[1].plain.grad.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_one_call_a_layer(dropout: float) -> None:
    model = unipelt.inject(tiny_bert(dropout=dropout), "unipelt-apl")
    pack = Pack(model, tokens=9)
    for values in starts(model):
        pack.add(values)
    model.train()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        pack(join(batches()))
    calls = {event.key: event.count for event in record.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == model.config.num_hidden_layers
    # and the base's own products are of all examples at once
    assert calls["aten::native_layer_norm"] == 1 + 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("by_head", [False, True])
def test_attention_in_a_map_takes_every_kind_of_mask(by_head: bool) -> None:
    """A custom model may call attention without a mask, or with one mask for all heads and texts."""
    query = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    attend = nn.functional.scaled_dot_product_attention
    masks = [None, torch.randn(3 if by_head else 1, 1, 5, 5), torch.randn(5, 5)]
    for mask in masks:
        with _Folding():
            found = torch.vmap(lambda each, mask=mask: attend(each, each, 2 * each, attn_mask=mask, scale=0.3))(query)
        want = torch.stack([attend(each, each, 2 * each, attn_mask=mask, scale=0.3) for each in query])
        torch.testing.assert_close(found, want)


# What is refused


def test_refuses_what_would_come_out_differently() -> None:
    config = {"preset": "unipelt-apl", "gate": {"pooling": "mean"}}
    with pytest.raises(PackError, match="average over padding"):
        Pack(unipelt.inject(tiny_bert(), config), tokens=9)
    Pack(unipelt.inject(tiny_bert(), {**config, "preset": "lora"}), tokens=9)  # without a gate nothing is averaged
    for family in ("gpt2", "bart"):
        with pytest.raises(PackError, match="only encoders"):
            Pack(unipelt.inject(tiny_model(family, "SequenceClassification"), "lora"), tokens=9)
    for family in ("deberta-v2", "modernbert"):
        with pytest.raises(PackError, match="cannot be packed"):
            Pack(unipelt.inject(tiny_model(family), "adapter"), tokens=9)


@pytest.mark.parametrize(
    ("words", "said"), [("", "RuntimeError"), ("\n \nno rule\nfor this", "no rule")], ids=["without words", "lines"]
)
def test_refuses_a_model_whose_code_fails_in_a_map(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("unipelt.pack._forward", fail)
    model = unipelt.inject(tiny_bert(), "lora").train()
    with pytest.raises(PackError, match=f"cannot be packed, its runs must be trained one by one: {said}$"):
        Pack(model, tokens=9)
    assert model.training


def test_refuses_what_it_cannot_do() -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            setattr(module, "gradient_checkpointing", True)  # noqa: B010  (modules declare no such attribute)
    with pytest.raises(PackError, match="gradient checkpointing"):
        Pack(model, tokens=9)
    with pytest.raises(PackError, match="kept in float32"):
        Pack(unipelt.inject(tiny_bert().bfloat16(), {"preset": "lora", "dtype": "base"}), tokens=9)
    with pytest.raises(ValueError, match="carries no submodules"):
        Pack(tiny_bert(), tokens=9)
    other = unipelt.inject(tiny_bert(), "lora")
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(PackError, match="flex_attention"):
        Pack(other, tokens=9)


def test_refuses_what_does_not_fit() -> None:
    model = unipelt.inject(tiny_bert(), "lora")
    pack = Pack(model, tokens=9)
    values = starts(model)[0]
    name = next(iter(values))
    with pytest.raises(PackError, match=r"is missing$"):
        pack.add({key: tensor for key, tensor in values.items() if key != name})
    with pytest.raises(PackError, match=r"another is none of them$"):
        pack.add({**values, "another": torch.zeros(1)})
    with pytest.raises(PackError, match=r"and in this pack \("):
        pack.add({**values, name: torch.zeros(1, 2, 3)})
    assert pack.replicas == []
    pack.add(values)
    with pytest.raises(ValueError, match="is for 3 replicas, and there are 1"):
        pack(join(batches()))


def test_texts_longer_than_the_model_takes_are_not_tried() -> None:
    Pack(unipelt.inject(tiny_bert(), "lora"), tokens=1000)
