"""Recording gates: the right numbers in the right places, and nothing where nobody asked."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tiny
import torch
from helpers import SIZES, shake, tiny_batch, tiny_bert
from inside import parts
from torch import Tensor, nn

import unipelt
from unipelt import GateRecord

GATES = {
    "unipelt-ap": {"adapter", "prefix"},
    "unipelt-apl": {"adapter", "prefix", "lora_query", "lora_value"},
    "unipelt-al": {"adapter", "lora_query", "lora_value"},
    "unipelt-pl": {"prefix", "lora_query", "lora_value"},
}
WITH_GATES = {*GATES, "unipelt-mam", "unipelt"}


def gated(preset: str = "unipelt-apl", **changes: object) -> Any:
    model = unipelt.inject(tiny_bert(), {"preset": preset, **changes})
    shake(model)
    return model


def expected_gates(model: Any, preset: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the slow reference says."""
    config = unipelt.resolve(preset)
    method = reference.Method(
        adapter=config.adapter is not None,
        prefix=config.prefix is not None,
        lora=config.lora is not None,
        adapter_gate=config.adapter is not None,
        prefix_gate=config.prefix is not None,
        lora_gate=config.lora is not None,
    )
    weights = reference.from_release(unipelt.release_state_dict(model))
    types = torch.zeros_like(batch["input_ids"])
    heads = SIZES["num_attention_heads"]
    return reference.classify(weights, method, batch["input_ids"], batch["attention_mask"], types, heads).gates


def rows(record: GateRecord) -> set[tuple[int, ...]]:
    return {tuple(values.shape) for values in record.values()}


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called))
        for module in model.modules()
    ]


@pytest.mark.parametrize("preset", GATES)
def test_values_are_the_papers(preset: str) -> None:
    model, batch = gated(preset), tiny_batch()
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**batch)
    assert set(record) == GATES[preset]
    assert len(record) == len(GATES[preset])
    for name, values in expected_gates(model, preset, batch).items():
        assert record[name].shape == (3, 3)
        assert values.std() > 1e-4, "gates that do not vary test nothing"
        torch.testing.assert_close(record[name], values, atol=1e-5, rtol=0)


def test_rows_are_examples_in_order_and_columns_layers() -> None:
    model = gated()
    batches = [tiny_batch(0), tiny_batch(1, lengths=(4, 6), tokens=6), tiny_batch(2, lengths=(11,), tokens=12)]
    with unipelt.record_gates(model) as record, torch.no_grad():
        for batch in batches:
            model(**batch)
    expected = [expected_gates(model, "unipelt-apl", batch) for batch in batches]
    for name in GATES["unipelt-apl"]:
        assert record[name].shape == (6, 3)
        torch.testing.assert_close(record[name], torch.cat([gates[name] for gates in expected]), atol=1e-5, rtol=0)


def test_only_layers_that_carry_the_gate_have_a_column() -> None:
    whole, model = gated(), gated(layers=[2, 0])
    for module in (whole, model):
        for name, part in parts(module, "gate").items():
            layer = int(name.split("layer.")[1].split(".")[0])
            part.fill_(float(layer) if name.endswith("bias") else 0.0)
    for module, layers in ((whole, [0.0, 1.0, 2.0]), (model, [0.0, 2.0])):
        with unipelt.record_gates(module) as record, torch.no_grad():
            module(**tiny_batch())
        for name in GATES["unipelt-apl"]:
            torch.testing.assert_close(record[name], torch.sigmoid(torch.tensor(layers)).expand(3, -1))


def test_nothing_is_recorded_outside_a_block() -> None:
    model = gated()
    before = hooks(model)
    attributes = [set(vars(module)) for module in model.modules()]
    model(**tiny_batch())
    with unipelt.record_gates(model) as record:
        assert hooks(model) != before
        model(**tiny_batch())
    kept = {name: values.clone() for name, values in record.items()}
    assert hooks(model) == before
    for _ in range(2):
        model(**tiny_batch(seed=1))
    assert rows(record) == {(3, 3)}
    assert all(torch.equal(record[name], values) for name, values in kept.items())
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_a_block_that_raises_leaves_no_hooks() -> None:
    model = gated()
    before = hooks(model)
    records = []

    def fail() -> None:
        with unipelt.record_gates(model) as record:
            records.append(record)
            model(**tiny_batch())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert hooks(model) == before
    assert rows(records[0]) == {(3, 3)}, "what was recorded can still be read"


def test_recording_changes_nothing() -> None:
    gradients, losses = [], []
    for recorded in (False, True):
        model = gated()
        batch = {**tiny_batch(), "labels": torch.tensor([0, 1, 1])}
        if recorded:
            with unipelt.record_gates(model):
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*losses)
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_graph_is_kept() -> None:
    model = gated().train()
    with unipelt.record_gates(model) as record:
        out = model(**tiny_batch())
    assert out.logits.requires_grad
    for values in record.values():
        assert not values.requires_grad
        assert values.grad_fn is None
        assert values.dtype == torch.float32
        assert ((values > 0) & (values < 1)).all()
    assert not any(value.requires_grad for calls in record._calls.values() for layers in calls for value in layers)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_that_raises_leaves_no_row(layer: int) -> None:
    model = gated()

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError("half-way")

    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**tiny_batch())
        handle = model.bert.encoder.layer[layer].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            model(**tiny_batch(1))
        handle.remove()
        assert rows(record) == {(3, 3)}
        model(**tiny_batch(2))
    for name, values in expected_gates(model, "unipelt-apl", tiny_batch(2)).items():
        assert record[name].shape == (6, 3)
        torch.testing.assert_close(record[name][3:], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_a_pass(reentrant: bool) -> None:
    model = gated().train()
    # Transformers has renamed it
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    passes = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1

    model.bert.encoder.layer[0].attention.self.register_forward_pre_hook(count)
    with unipelt.record_gates(model) as record:
        for seed in range(2):
            model(**tiny_batch(seed), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert passes == 4, "without recomputation this would test nothing"
    expected = [expected_gates(model, "unipelt-apl", tiny_batch(seed)) for seed in range(2)]
    for name in GATES["unipelt-apl"]:
        assert record[name].shape == (6, 3)
        torch.testing.assert_close(record[name], torch.cat([gates[name] for gates in expected]), atol=1e-5, rtol=0)


def test_blocks_nest() -> None:
    model = gated()
    before = hooks(model)
    with torch.no_grad(), unipelt.record_gates(model) as outer:
        model(**tiny_batch(0))
        with unipelt.record_gates(model) as inner:
            model(**tiny_batch(1))
        model(**tiny_batch(2))
    assert hooks(model) == before
    assert rows(outer) == {(9, 3)}
    assert rows(inner) == {(3, 3)}
    for name, values in inner.items():
        assert torch.equal(outer[name][3:6], values)


def test_a_part_of_the_model_called_alone_is_not_recorded() -> None:
    model = gated()
    with unipelt.record_gates(model) as record, torch.no_grad():
        model.bert(**tiny_batch())
        model(**tiny_batch())
        model.bert(**tiny_batch())
    assert rows(record) == {(3, 3)}


def test_a_pass_that_leaves_the_encoder_out_has_no_row_for_it() -> None:
    batch = tiny.tiny_batch("bart")
    model = unipelt.inject(tiny.tiny_model("bart"), "unipelt-apl")
    with unipelt.record_gates(model) as record, torch.no_grad():
        encoded = model(**batch).encoder_last_hidden_state
        model(encoder_outputs=(encoded,), **{name: batch[name] for name in ("attention_mask", "decoder_input_ids")})
    for name, values in record.items():
        assert len(values) == (6 if name.startswith(("decoder.", "cross.")) else 3)


def test_a_layer_that_puts_all_texts_in_one_row_has_a_row_for_each() -> None:
    batch = tiny.tiny_batch("opt", lengths=(9, 9, 9))
    model = unipelt.inject(tiny.tiny_model("opt"), "unipelt-apl")
    shake(model)
    seen = []
    for module in model.modules():
        if type(module).__name__ == "Adapter":
            module.register_forward_hook(lambda module, args, output: seen.append(output.dim()))
    with unipelt.record_gates(model) as together, torch.no_grad():
        model(**batch)
    assert 2 in seen
    with unipelt.record_gates(model) as one_by_one, torch.no_grad():
        for text in range(3):
            model(**{name: tensor[text : text + 1] for name, tensor in batch.items()})
    for name, values in together.items():
        assert len(values) == 3
        torch.testing.assert_close(values, one_by_one[name], msg=name)
        assert len(values.unique(dim=0)) == 3


def test_a_call_without_input_is_the_models_to_refuse() -> None:
    model = gated()
    with unipelt.record_gates(model) as record:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()
        model(**tiny_batch())
    assert rows(record) == {(3, 3)}


def test_a_deployed_model_has_the_same_gates(tmp_path: Any) -> None:
    model = gated()
    unipelt.save(model, tmp_path, deploy=True)
    records = []
    for each in (model, unipelt.load(tiny_bert(), tmp_path)):
        with unipelt.record_gates(each) as record, torch.no_grad():
            each(**tiny_batch())
        records.append(record)
    for name, values in records[0].items():
        assert torch.equal(records[1][name], values)


def test_penalties_at_the_bounds_of_gates() -> None:
    """Closed gates have no entropy; gates below 0 have none either, and are refused."""
    for activation in ("sigmoid", "tanh"):
        model = gated("unipelt-al", gate={"activation": activation})
        for name, part in parts(model, "gate").items():
            part.fill_(-200.0 if name.endswith("bias") else 0.0)
        with unipelt.record_gates(model) as record, torch.no_grad():
            model(**tiny_batch())
        closed = activation == "sigmoid"
        assert unipelt.gate_penalty(record, "sparsity") == (0.0 if closed else 1.0)
        if closed:
            assert 0 < unipelt.gate_penalty(record, "entropy") < 1e-4
        else:
            with pytest.raises(ValueError, match="entropy is of gates between 0 and 1, and these are tanh's"):
                unipelt.gate_penalty(record, "entropy")


def test_reading_what_is_not_there_is_told() -> None:
    model = gated("unipelt-ap")
    with unipelt.record_gates(model) as record:
        with pytest.raises(KeyError, match="call the model"):
            record["adapter"]
        model(**tiny_batch())
        with pytest.raises(KeyError, match=r"'lora_query'.*prefix, adapter"):
            record["lora_query"]
        assert "lora_query" not in record
    assert list(record) == ["prefix", "adapter"]


@pytest.mark.parametrize("preset", [None, *(name for name in unipelt.PRESETS if name not in WITH_GATES)])
def test_models_without_gates_are_refused(preset: str | None) -> None:
    model = tiny_bert()
    if preset is not None:
        unipelt.inject(model, preset)
    before = hooks(model)
    with pytest.raises(ValueError, match="no gates"), unipelt.record_gates(model):
        pass
    assert hooks(model) == before
