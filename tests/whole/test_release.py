"""Weights of the authors' release: the same numbers as its program, and every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SIZES, logits, shake, tiny_batch, tiny_bert
from safetensors import safe_open
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import unipelt
from unipelt import CheckpointError

REFERENCES = (
    "adapter",
    "bitfit",
    "finetune",
    "lora",
    "prefix",
    "unipelt_al",
    "unipelt_ap",
    "unipelt_apl",
    "unipelt_apl_nogate",
    "unipelt_pl",
)
SMALL = {"adapter": {"bottleneck": 6}, "prefix": {"length": 4, "hidden": 10}, "lora": {"rank": 3, "alpha": 5.0}}


def injected(preset: str = "unipelt-apl", model: Any = None, **changes: object) -> Any:
    config = unipelt.resolve(preset)
    config = config.updated({name: part for name, part in SMALL.items() if getattr(config, name)}).updated(changes)
    model = unipelt.inject(tiny_bert() if model is None else model, config)
    shake(model)
    return model


# --- the same numbers as the authors' program


def read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}


def rebuild(sizes: dict[str, Any], attention: str, pooling: str = "mean") -> BertForSequenceClassification:
    """The release's model for a file, with other weights."""
    dims, pelt, mode = sizes["dims"], sizes["pelt"], sizes["mode"]
    torch.manual_seed(0)
    rest: dict[str, Any] = {"num_labels": sizes["num_labels"], "attn_implementation": attention}
    config = BertConfig(**dims, **rest, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gate = mode.get("gate", False)
    adapter = {"bottleneck": dims["hidden_size"] // pelt["reduction"], "gate": gate}
    prefix = {"length": pelt["prefix_len"], "hidden": pelt["mid_dim"], "gate": gate}
    lora = {"rank": pelt["lora_r"], "alpha": pelt["lora_alpha"], "gate": gate}
    method = {
        "adapter": adapter if mode.get("adapter") else None,
        "prefix": prefix if mode.get("prefix") else None,
        "lora": lora if mode.get("lora") else None,
        "bitfit": mode.get("bias", False),
        "train_base": not mode,
        "gate": {"pooling": pooling},
        # the release trains a head with an adapter and in fine-tuning only
        "train_head": not mode or mode.get("adapter", False),
    }
    return unipelt.inject(BertForSequenceClassification(config).eval(), method)  # type: ignore[return-value]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_the_release(reference_dir: Path, name: str, attention: str) -> None:
    sizes, tensors = read(reference_dir, name)
    model = rebuild(sizes, attention)
    unipelt.load_release_state_dict(model, part(tensors, "param"))
    batch = {key: tensors[key] for key in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    assert (batch["attention_mask"] == 0).any(), "without padding, pooling would be untested"
    gates = part(tensors, "gate")
    if gates:
        with unipelt.record_gates(model) as record:
            out = model(**batch, output_hidden_states=True)
        found = {f"{gate}.{layer}": value for gate in record for layer, value in enumerate(record[gate].unbind(1))}
        assert set(found) == set(gates)
        for gate, value in gates.items():
            torch.testing.assert_close(found[gate], value, atol=1e-5, rtol=0)
    else:
        out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.logits, tensors["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, tensors["loss"].squeeze(), atol=1e-5, rtol=0)
    hidden = part(tensors, "hidden")
    assert len(out.hidden_states) == len(hidden)
    for index, states in enumerate(out.hidden_states):
        torch.testing.assert_close(states, hidden[f"{index}"], atol=1e-5, rtol=0)

    out.loss.backward()
    expected = part(tensors, "grad")
    adapter = next((key.split(".adapters.")[1].split(".")[0] for key in expected if ".adapters." in key), "adapter")
    gradients = unipelt.release_state_dict(model, adapter, gradients=True)
    assert set(gradients) == set(expected), "the release trains just these tensors"
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        # a key's bias has no effect, so that its gradient is nothing but rounding: it is held against the largest
        size = gradient.abs().max()
        scale = size if size > 1e-6 * largest else largest
        assert (gradients[key] - gradient).abs().max() <= 1e-4 * scale, key
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == sum(gradient.numel() for gradient in expected.values())


@pytest.mark.parametrize("name", REFERENCES)
def test_the_releases_files_come_back_out(reference_dir: Path, name: str) -> None:
    sizes, tensors = read(reference_dir, name)
    model = rebuild(sizes, "sdpa")
    given = part(tensors, "param")
    unipelt.load_release_state_dict(model, given)
    adapter = next((key.split(".adapters.")[1].split(".")[0] for key in given if ".adapters." in key), "adapter")
    again = unipelt.release_state_dict(model, adapter)
    assert set(again) <= set(given)
    for key, tensor in again.items():
        assert torch.equal(tensor, given[key]), key
    for key in set(given) - set(again):
        assert "prefix_gate" in key or "prefix_central_gate" in key or key.endswith("position_ids"), key


def test_masked_pooling_is_not_the_releases(reference_dir: Path) -> None:
    sizes, tensors = read(reference_dir, "unipelt_apl")
    model = rebuild(sizes, "sdpa", pooling="masked_mean")
    unipelt.load_release_state_dict(model, part(tensors, "param"))
    with torch.no_grad():
        out = model(**{key: tensors[key] for key in ("input_ids", "attention_mask", "token_type_ids")})
    assert (out.logits - tensors["logits"]).abs().max() > 1e-3


# --- the release's names


def test_names_and_shapes_are_the_releases() -> None:
    named = unipelt.release_state_dict(injected(), "sst-2")
    layer = "bert.encoder.layer.2"
    shapes = {
        "bert.encoder.prefix_enc_embed.weight": (4, 32),
        "bert.encoder.prefix_embed_MLP.0.weight": (10, 32),
        "bert.encoder.prefix_embed_MLP.0.bias": (10,),
        "bert.encoder.prefix_embed_MLP.2.weight": (3 * 2 * 32, 10),
        "bert.encoder.prefix_embed_MLP.2.bias": (3 * 2 * 32,),
        f"{layer}.attention.self.prefix_gate.weight": (1, 32),
        f"{layer}.attention.self.prefix_gate.bias": (1,),
        f"{layer}.attention.self.query.lora_A": (3, 32),
        f"{layer}.attention.self.value.lora_B": (32, 3),
        f"{layer}.attention.self.query.lora_gate.weight": (1, 32),
        f"{layer}.attention.self.value.lora_gate.bias": (1,),
        f"{layer}.output.adapters.sst-2.adapter_down.0.weight": (6, 32),
        f"{layer}.output.adapters.sst-2.adapter_down.0.bias": (6,),
        f"{layer}.output.adapters.sst-2.adapter_up.weight": (32, 6),
        f"{layer}.output.adapters.sst-2.adapter_up.bias": (32,),
        f"{layer}.output.adapters.sst-2.gate.weight": (1, 32),
        f"{layer}.output.adapters.sst-2.gate.bias": (1,),
        f"{layer}.output.LayerNorm.weight": (32,),
        f"{layer}.attention.self.query.weight": (32, 32),
        "classifier.weight": (2, 32),
    }
    for name, shape in shapes.items():
        assert tuple(named[name].shape) == shape, name
    # a layer: 16 of BERT's own, 4 gates and an adapter of 2 tensors a part, LoRA of 4; the network has 5
    assert len(named) == len(tiny_bert().state_dict()) + 3 * (4 * 2 + 4 + 4) + 5


@pytest.mark.parametrize(
    "preset",
    [name for name, config in unipelt.PRESETS.items() if not (config.more or config.prompt or name == "unipelt")],
)
@pytest.mark.parametrize("adapter", ["adapter", "sst-2", "0"])
def test_there_and_back(preset: str, adapter: str) -> None:
    model = injected(preset)
    other = injected(preset, tiny_bert(seed=9))
    flags = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
    named = unipelt.release_state_dict(model, adapter)
    shuffled = dict(sorted(named.items(), key=lambda item: item[0][::-1]))
    assert unipelt.load_release_state_dict(other, shuffled) is other
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == flags
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("preset", [name for name, config in unipelt.PRESETS.items() if config.more])
def test_what_the_release_does_not_have_is_named(preset: str) -> None:
    model = injected(preset)
    for call in (unipelt.release_state_dict, lambda model: unipelt.load_release_state_dict(model, {})):
        with pytest.raises(
            unipelt.CheckpointError, match=f"and this model '{model.unipelt_injection.config.more[0].name}'"
        ):
            call(model)


def test_a_model_without_a_head_goes_there_and_back() -> None:
    model, other = (injected(model=BertModel(BertConfig(**SIZES)).eval()) for _ in range(2))  # type: ignore[arg-type]
    named = unipelt.release_state_dict(model)
    assert "encoder.prefix_enc_embed.weight" in named
    unipelt.load_release_state_dict(other, {**named, "embeddings.position_ids": torch.arange(40)[None]})
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_each_gate_gets_its_own_numbers() -> None:
    model = injected()
    named = unipelt.release_state_dict(model)
    marks = {
        "prefix": "prefix_gate.",
        "lora_query": "query.lora_gate.",
        "lora_value": "value.lora_gate.",
        "adapter": ".gate.",
    }
    for place, mark in enumerate(marks.values()):
        for name in [name for name in named if mark in name]:
            layer = int(name.split("layer.")[1].split(".")[0])
            number = place - 1.5 + layer / 10 if name.endswith("bias") else 0.0
            named[name] = torch.full_like(named[name], number)
    unipelt.load_release_state_dict(model, named)
    with unipelt.record_gates(model) as record, torch.no_grad():
        model(**tiny_batch())
    for place, gate in enumerate(marks):
        expected = torch.sigmoid(place - 1.5 + torch.arange(3) / 10).expand(3, 3)
        torch.testing.assert_close(record[gate], expected)


def test_what_comes_out_is_a_copy() -> None:
    model = injected()
    before = logits(model)
    for tensor in unipelt.release_state_dict(model).values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert torch.equal(logits(model), before)


def test_gradients_come_out_by_the_same_names() -> None:
    model = injected()
    assert unipelt.release_state_dict(model, gradients=True) == {}
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    gradients = unipelt.release_state_dict(model, gradients=True)
    named = unipelt.release_state_dict(model)
    assert all(gradients[name].shape == named[name].shape for name in gradients)
    assert "bert.pooler.dense.weight" not in gradients, "what is frozen has none"
    assert torch.equal(gradients["classifier.weight"], model.classifier.weight.grad)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(gradient.numel() for gradient in gradients.values()) == trained


# --- tensors that the release saved and never used

GATE = {"weight": torch.full((1, 32), 9.0), "bias": torch.full((1,), 9.0)}


def dead(gate: str) -> dict[str, Tensor]:
    return {f"bert.encoder.layer.{i}.attention.self.{gate}.{n}": t for i in range(3) for n, t in GATE.items()}


@pytest.mark.parametrize(
    ("preset", "gates"),
    [
        ("unipelt-al", ["prefix_gate"]),
        ("lora", ["prefix_gate"]),
        ("adapter", ["prefix_gate", "prefix_central_gate"]),
        ("bitfit", ["prefix_gate", "prefix_central_gate"]),
        ("fine-tuning", ["prefix_central_gate"]),
    ],
)
def test_gates_that_were_never_used_are_known(preset: str, gates: list[str]) -> None:
    model = injected(preset)
    expected = logits(model)
    named = unipelt.release_state_dict(model)
    named["bert.embeddings.position_ids"] = torch.arange(40)[None]
    for gate in gates:
        named |= dead(gate)
    other = injected(preset, tiny_bert(seed=9))
    unipelt.load_release_state_dict(other, named)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize(
    ("preset", "gate"),
    [
        ("prefix", "prefix_gate"),
        ("unipelt-ap-nogate", "prefix_gate"),
        ("unipelt-apl", "prefix_central_gate"),
        ("prefix", "prefix_central_gate"),
        ("lora", "prefix_central_gate"),
        ("bitfit", "some_gate"),
    ],
)
def test_gates_that_may_have_been_used_are_refused(preset: str, gate: str) -> None:
    # a gated prefix into an ungated one would compute something else without a word
    model = injected(preset)
    refuse(model, {**unipelt.release_state_dict(model), **dead(gate)}, f"layer.0.attention.self.{gate}.weight")


# --- tensors that do not fit


def refuse(model: torch.nn.Module, named: dict[str, Tensor], *said: str) -> None:
    """These tensors, moved so that each would show if it were loaded, are an error and change nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        unipelt.load_release_state_dict(model, {name: tensor + 1 for name, tensor in named.items()})  # type: ignore[arg-type]
    for words in said:
        assert words in str(caught.value), f"{words!r} is not in {str(caught.value)!r}"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


QUERY = "bert.encoder.layer.1.attention.self.query"


def _unknown(named: dict[str, Tensor]) -> None:
    named["bert.encoder.layer.1.attention.self.key.lora_A"] = torch.zeros(3, 32)


def _missing(named: dict[str, Tensor]) -> None:
    del named[f"{QUERY}.lora_A"]


def _missing_base(named: dict[str, Tensor]) -> None:
    del named["bert.embeddings.word_embeddings.weight"]


def _missing_gate(named: dict[str, Tensor]) -> None:
    del named[f"{QUERY}.lora_gate.bias"]


def _transposed(named: dict[str, Tensor]) -> None:
    named[f"{QUERY}.lora_A"] = named[f"{QUERY}.lora_A"].T


def _flat(named: dict[str, Tensor]) -> None:
    named[f"{QUERY}.lora_gate.weight"] = named[f"{QUERY}.lora_gate.weight"].squeeze(0)  # it would broadcast


def _short(named: dict[str, Tensor]) -> None:
    named["bert.encoder.prefix_enc_embed.weight"] = named["bert.encoder.prefix_enc_embed.weight"][:1]


def _other_position_ids(named: dict[str, Tensor]) -> None:
    named["bert.embeddings.my_position_ids"] = torch.arange(40)[None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unknown, ("no place", "key.lora_A")),
        (_missing, ("missing", f"{QUERY}.lora_A")),
        (_missing_base, ("missing", "word_embeddings")),
        (_missing_gate, ("missing", f"{QUERY}.lora_gate.bias")),
        (_transposed, ("another shape", f"{QUERY}.lora_A", "(32, 3)")),
        (_flat, ("another shape", f"{QUERY}.lora_gate.weight", "(32,)")),
        (_short, ("another shape", "prefix_enc_embed", "(1, 32)")),
        (_other_position_ids, ("no place", "my_position_ids")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], None], said: tuple[str, ...]
) -> None:
    model = injected()
    named = unipelt.release_state_dict(model)
    change(named)
    refuse(model, named, *said)


@pytest.mark.parametrize(
    ("preset", "other", "said"),
    [
        ("unipelt-apl", "unipelt-al", "prefix_gate"),
        ("unipelt-al", "unipelt-apl", "missing"),
        ("unipelt-apl", "unipelt-apl-nogate", "gate"),
        ("unipelt-apl-nogate", "unipelt-apl", "gate"),
        ("adapter", "lora", "adapters"),
        ("fine-tuning", "unipelt-apl", "missing"),
    ],
)
def test_weights_of_another_method_are_refused(preset: str, other: str, said: str) -> None:
    refuse(injected(other), unipelt.release_state_dict(injected(preset)), said)


def test_two_adapters_are_refused() -> None:
    model = injected("adapter")
    named = unipelt.release_state_dict(model, "sst-2") | unipelt.release_state_dict(model, "rte")
    refuse(model, named, "several adapters", "rte, sst-2")


def test_many_names_are_cut_short() -> None:
    model = injected("bitfit")
    strange = {f"strange.{index}": torch.zeros(1) for index in range(9)}
    named = unipelt.release_state_dict(model)
    refuse(model, {**named, **strange}, "9 of", "in this model: strange.0, ", "strange.4 and 4 more; inject")
    del strange["strange.8"], strange["strange.7"], strange["strange.6"]
    refuse(model, {**named, **strange}, "6 of", "strange.4 and 1 more; inject")
    del strange["strange.5"]
    refuse(model, {**named, **strange}, "5 of", "strange.4; inject")


def test_the_adapter_is_called_adapter_unless_told() -> None:
    model = injected("adapter")
    assert list(unipelt.release_state_dict(model)) == list(unipelt.release_state_dict(model, "adapter"))


def test_a_prefix_with_a_softmax_of_its_own_is_refused() -> None:
    model = unipelt.inject(tiny_bert(), {"preset": "prefix", "prefix": {"softmax": "own"}})
    with pytest.raises(CheckpointError, match="a prefix in the text's softmax, and this model's has one of its own"):
        unipelt.release_state_dict(model)


def test_a_folded_model_is_refused() -> None:
    model = injected("lora")
    named = unipelt.release_state_dict(model)
    unipelt.fold(model)
    with pytest.raises(CheckpointError, match="folded"):
        unipelt.release_state_dict(model)
    with pytest.raises(CheckpointError, match="folded"):
        unipelt.load_release_state_dict(model, named)


def test_other_models_are_refused(tmp_path: Path) -> None:
    bare = tiny_bert()
    for call in (lambda: unipelt.release_state_dict(bare), lambda: unipelt.load_release_state_dict(bare, {})):
        with pytest.raises(ValueError, match="inject"):
            call()
    roberta = unipelt.inject(RobertaForSequenceClassification(RobertaConfig(**SIZES)), "bitfit")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="roberta"):
        unipelt.release_state_dict(roberta)
    unipelt.save(injected(), tmp_path, deploy=True)
    deployed = unipelt.load(tiny_bert(), tmp_path)
    with pytest.raises(CheckpointError, match="deployed"):
        unipelt.release_state_dict(deployed)
    with pytest.raises(CheckpointError, match="deployed"):
        unipelt.load_release_state_dict(deployed, unipelt.release_state_dict(injected()))
