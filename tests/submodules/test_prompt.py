"""Prompt tuning, against the host itself on embeddings that the prompt was put before by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, shake, tiny_bert
from helpers import tiny_batch as bert_batch
from inside import added_to
from tiny import DECODERS, ENCODER_DECODERS, ENCODERS, tiny_batch, tiny_model
from torch import Tensor

import unipelt
from unipelt.pack import Pack, PackError

L = 4
QUICK = (
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "bloom",
    "opt",
    "llama",
    "gemma",
)
PROMPT: dict[str, Any] = {"preset": "prompt", "prompt": {"length": L}}


def prompt_of(model: Any) -> Any:
    """The learned vectors."""
    return next(module.embedding for module in model.modules() if isinstance(module, unipelt.Prompt))


def before(base: Any, prompt: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the host is given in place of a batch of ids and mask."""
    text = base.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    return {
        "inputs_embeds": torch.cat([prompt.expand(len(text), -1, -1), text], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(mask), L), mask], dim=1),
    }


def check(family: str) -> None:
    base, batch = tiny_model(family, "Model"), tiny_batch(family)
    model = unipelt.inject(copy.deepcopy(base), PROMPT)
    shake(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True)
        want = base(**before(base, prompt_of(model), batch), output_hidden_states=True)
        without = base(**batch)
    for own, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(own[real], other[:, L:][real], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0][real], want[0][:, L:][real], rtol=0, atol=1e-6)
    assert got[0].shape == without[0].shape
    assert (got[0] - without[0])[real].abs().max() > 1e-3
    head = tiny_model(family)  # which may pass by the base model
    want = head(**batch).logits
    unipelt.inject(head, {**PROMPT, "train_head": False})
    assert (head(**batch).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", QUICK)
def test_a_prompt_is_put_before_the_text(family: str) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in (*ENCODERS, *DECODERS) if family not in QUICK])
def test_a_prompt_is_put_before_the_text_in_every_other_family(family: str) -> None:
    check(family)


def test_heads_read_the_texts_own_tokens() -> None:
    """BERT's pooler and RoBERTa's head the first; GPT-2's the last; token types and positions are the text's."""
    base: Any = tiny_bert()
    batch = {**bert_batch(), "token_type_ids": torch.ones_like(bert_batch()["input_ids"])}
    model: Any = unipelt.inject(copy.deepcopy(base), {**PROMPT, "train_head": False})
    types = torch.nn.functional.pad(batch["token_type_ids"], (L, 0))
    with torch.no_grad():
        states = base.bert(**before(base, prompt_of(model), batch), token_type_ids=types)[0]
        want = base.classifier(base.bert.pooler(states[:, L:]))
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        same = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], positions).logits
        assert torch.equal(same, model(**batch).logits)
        for family, place in (("roberta", 0), ("gpt2", -1)):
            other = tiny_model(family, "SequenceClassification")
            batch = tiny_batch(family, lengths=(4,), tokens=4)
            model = unipelt.inject(copy.deepcopy(other), {**PROMPT, "train_head": False})
            states = other.base_model(**before(other, prompt_of(model), batch))[0]
            head = other.classifier(states[:, L:]) if place == 0 else other.score(states[:, place])
            torch.testing.assert_close(model(**batch).logits, head, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "TokenClassification"), ("bert", "MaskedLM"), ("llama", "CausalLM")]
)
def test_outputs_of_tokens_are_as_long_as_the_text(family: str, head: str) -> None:
    batch = tiny_batch(family)
    model: Any = unipelt.inject(tiny_model(family, head), PROMPT)
    out = model(**batch, labels=torch.ones_like(batch["input_ids"]))
    assert out.logits.shape[:2] == batch["input_ids"].shape
    out.loss.backward()
    assert prompt_of(model).grad.abs().min() > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad and "prompt" not in name} == {
        name for name in ("classifier.weight", "classifier.bias") if head == "TokenClassification"
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "opt", "gemma3_text"])
def test_generation_with_and_without_a_cache_and_padding(family: str) -> None:
    wide: dict[str, Any] = {} if family != "gemma3_text" else {"sliding_window": 32}
    model: Any = unipelt.inject(tiny_model(family, **wide), PROMPT)
    shake(model)
    ids = tiny_batch(family, lengths=(5, 5, 5), tokens=5)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert cached.shape == (3, 11)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[1:2, 2:], model.generate(ids[1:2, 2:], attention_mask=mask[1:2, 2:], **options))
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **options))
    with pytest.raises(ValueError, match="static cache"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", **options)


def test_masks_of_other_shapes_and_layers_by_themselves_are_refused() -> None:
    model: Any = unipelt.inject(tiny_bert(), PROMPT)
    with pytest.raises(RuntimeError, match="BertEncoder was called by itself"):
        model.bert.encoder(torch.zeros(1, 3, 32))
    ids = bert_batch()["input_ids"]
    with pytest.raises(ValueError, match=r"an attention_mask of \(examples, tokens\)"):
        model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]))


def test_it_starts_at_tokens_and_is_saved_loaded_counted_and_removed(tmp_path: Path) -> None:
    base = tiny_bert()
    there = {name: set(vars(module)) for name, module in base.named_modules()}
    first, table = bits(base), base.get_input_embeddings().weight
    model: Any = unipelt.inject(base, PROMPT)
    assert all((table == row).all(dim=1).any() for row in prompt_of(model))
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == counts.deployed_submodules == {"prompt": L * 32}
    shake(model)
    want = model(**bert_batch()).logits
    unipelt.save(model, tmp_path, deploy=True)
    loaded = unipelt.load(tiny_bert(), tmp_path)
    assert torch.equal(loaded(**bert_batch()).logits, want)
    assert torch.equal(copy.deepcopy(loaded)(**bert_batch()).logits, want)
    unipelt.remove(model)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == there
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**bert_batch()).logits, tiny_bert()(**bert_batch()).logits)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    manifest["unipelt"]["prompt"]["length"] = 1_000_000
    (tmp_path / "unipelt.json").write_text(json.dumps(manifest))
    with pytest.raises(unipelt.CheckpointError, match=r"prompt\.embedding is \(4, 32\) there and \(1000000, 32\) h"):
        unipelt.load(tiny_bert(), tmp_path)


def test_it_goes_with_other_submodules_and_with_folding() -> None:
    """Gates count its vectors as tokens, and padding as none."""
    config = {"preset": "unipelt-apl", "prompt": {"length": L}}
    model = unipelt.inject(tiny_bert(), config)
    shake(model, std=0.02)
    batch = bert_batch()
    want = model(**batch).logits
    wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    torch.testing.assert_close(model(**wider).logits, want, rtol=0, atol=1e-6)
    report = unipelt.fold(model, [batch], tolerance=0.5, closed=0.0)
    assert {gate.outcome for gate in report.gates} == {"merged", "constant"}
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=2e-2)


def test_gates_of_tokens_are_measured_over_real_ones() -> None:
    config = {"preset": "unipelt-al", "prompt": {"length": L}, "gate": {"pooling": "token"}}
    model = unipelt.inject(tiny_bert(), config)
    shake(model)
    batch = bert_batch()
    wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    found = [unipelt.fold(copy.deepcopy(model), [data], tolerance=0.0) for data in (batch, wider)]
    for one, other in zip(found[0].gates, found[1].gates, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-6)


def test_it_is_not_packed() -> None:
    """So its runs train one by one."""
    with pytest.raises(PackError, match=r"cannot be packed.*a model with a prompt"):
        Pack(unipelt.inject(tiny_bert(), PROMPT), tokens=12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = unipelt.inject(tiny_bert(), PROMPT).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(**bert_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
        grads.append(prompt_of(model).grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("family", ENCODER_DECODERS[:2])
def test_models_of_two_stacks_refuse_it_by_name(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(unipelt.InjectionError, match=f"'{family}' models cannot take a prompt"):
        unipelt.inject(model, PROMPT)
    assert not hasattr(model, "unipelt_injection")


def test_what_else_is_refused() -> None:
    with pytest.raises(unipelt.ConfigError, match=r"prompt\.length must be above 0"):
        unipelt.resolve({"preset": "prompt", "prompt": {"length": 0}})
    with pytest.raises(unipelt.CheckpointError, match="this model a prompt"):
        unipelt.release_state_dict(unipelt.inject(tiny_bert(), PROMPT))
    model: Any = tiny_bert()
    model.bert.prompt = torch.nn.Linear(2, 2)  # a name that is free
    unipelt.remove(unipelt.inject(model, PROMPT))
    model.bert.unipelt = torch.nn.Linear(2, 2)
    with pytest.raises(unipelt.InjectionError, match="bert has an attribute 'unipelt' of its own"):
        unipelt.inject(model, PROMPT)
    assert isinstance(model.bert.prompt, torch.nn.Linear)
    assert isinstance(model.bert.unipelt, torch.nn.Linear)
    model = tiny_bert()
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(unipelt.InjectionError, match="the embeddings are quantised"):
        unipelt.inject(model, PROMPT)
    assert (
        unipelt.resolve("lora").to_dict()
        == unipelt.UniPELTConfig.from_dict(unipelt.resolve("lora").to_dict()).to_dict()
    )
    assert "prompt" not in unipelt.resolve("lora").to_dict()


# Gates


def gated(**gate: Any) -> dict[str, Any]:
    return {"preset": "prompt", "prompt": {"length": L, "gate": True}, "gate": gate, "train_head": False}


def gate_of(model: Any) -> Any:
    return next(module.entry for module in model.modules() if isinstance(module, unipelt.Prompt))


def by_hand(base: Any, model: Any, batch: dict[str, Tensor], gate: Tensor) -> Tensor:
    """What the host gives behind `gate * P`, (B,) and (L, E); the text's states."""
    text = base.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    inputs = torch.cat([gate[:, None, None] * prompt_of(model), text], dim=1)
    states: Tensor = base(inputs_embeds=inputs, attention_mask=torch.nn.functional.pad(mask, (L, 0), value=1))[0]
    return states[:, L:]


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize("pooling", ["masked_mean", "mean", "static"])
def test_a_gate_scales_the_prompt_by_the_text_alone(family: str, pooling: str) -> None:
    base, batch = tiny_model(family, "Model"), tiny_batch(family)
    model: Any = unipelt.inject(copy.deepcopy(base), gated(pooling=pooling, temperature=2.0))
    shake(model, std=0.3)
    gates, real = gate_of(model), batch["attention_mask"].bool()
    with torch.no_grad():
        text = base.get_input_embeddings()(batch["input_ids"])
        logits = (text @ gates.weight[0] if gates.has_input else torch.zeros(real.shape)) + gates.bias[0]
        values = torch.sigmoid(logits / 2)
        rows = [row[seen].mean() for row, seen in zip(values, real, strict=True)]
        want = torch.stack(rows) if pooling == "masked_mean" else values.mean(dim=1)
        with unipelt.record_gates(model) as record:
            got = model(**batch)[0]
        torch.testing.assert_close(record["prompt"], want[:, None], rtol=0, atol=1e-6)
        assert (want.std() > 1e-3) is not (pooling == "static")
        torch.testing.assert_close(got[real], by_hand(base, model, batch, want)[real], rtol=0, atol=1e-6)
        assert torch.equal(model(inputs_embeds=text, attention_mask=batch["attention_mask"])[0][real], got[real])
        gates.bias.fill_(-1e4)
        closed = by_hand(base, model, batch, torch.zeros(len(real)))
        torch.testing.assert_close(model(**batch)[0][real], closed[real], rtol=0, atol=1e-6)
        assert (closed - base(**batch)[0])[real].abs().max() > 1e-3, "vectors of zeros take attention"


@pytest.mark.parametrize(
    "gate",
    [
        {},
        {"network": "mlp", "hidden": 3},
        {"network": "recurrent", "hidden": 3},
        {"network": "transformer", "hidden": 3},
        {"activation": "tanh"},
    ],
    ids=str,
)
def test_a_gates_prediction_depends_on_no_padding_and_its_parameters_train(gate: dict[str, Any]) -> None:
    model: Any = unipelt.inject(tiny_bert(), gated(**gate))
    batch = bert_batch()
    with unipelt.record_gates(model) as record:
        model(**batch)
    assert record["prompt"].mean().item() == pytest.approx(0.0 if "activation" in gate else 0.5, abs=0.1)
    shake(model, std=0.3)
    with unipelt.record_gates(model) as record:
        want = model(**batch, labels=torch.tensor([0, 1, 1]))
        wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
        torch.testing.assert_close(model(**wider).logits, want.logits, rtol=0, atol=1e-6)
        floats = {**wider, "attention_mask": wider["attention_mask"].float()}
        torch.testing.assert_close(model(**floats).logits, want.logits, rtol=0, atol=1e-6)
        row = {name: tensor[:1, : int(batch["attention_mask"][0].sum())] for name, tensor in batch.items()}
        torch.testing.assert_close(model(**row).logits, want.logits[:1], rtol=0, atol=1e-6)
    assert record["prompt"].shape == (10, 1)
    want.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {
        f"bert.unipelt.default.prompt.{name}" for name, _ in added_to(model.bert).prompt.named_parameters()
    }
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_static_gate_of_a_causal_model_with_a_cache_folded_and_in_peft(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, "Model")
    model: Any = unipelt.inject(tiny_model(family), gated(pooling="static"))
    shake(model, std=0.5)
    batch = tiny_batch(family, lengths=(5, 3, 5), tokens=5, left=True)
    gate = torch.sigmoid(gate_of(model).bias).expand(3)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True).hidden_states[-1]
        base.load_state_dict({name: p for name, p in model.base_model.state_dict().items() if "prompt" not in name})
        torch.testing.assert_close(got[real], by_hand(base, model, batch, gate)[real], rtol=0, atol=1e-6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with unipelt.record_gates(model) as record:
        cached = model.generate(**batch, **options)
    assert record["prompt"].shape == (3, 1)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    want = model(**batch).logits
    with pytest.raises(unipelt.CheckpointError, match=r"prompt has a gate, and PEFT has none; unipelt\.fold"):
        unipelt.save_peft(model, tmp_path / "peft")
    report = unipelt.fold(model, [batch], tolerance=0.0, closed=0.9)
    assert report.outcomes["constant"] == len(report.gates) == 1
    assert report.gates[0].std == 0
    assert report.after.gates == {}
    assert report.after.deployed == report.before.deployed - 1
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)
    unipelt.save(model, tmp_path / "folded")
    assert torch.equal(unipelt.load(tiny_model(family), tmp_path / "folded")(**batch).logits, model(**batch).logits)
    unipelt.save_peft(model, tmp_path / "peft")
    assert torch.equal(unipelt.load_peft(tiny_model(family), tmp_path / "peft")(**batch).logits, model(**batch).logits)


def test_a_gate_that_varies_is_kept_by_folding_and_one_that_hardly_does_goes_into_the_prompt() -> None:
    model: Any = unipelt.inject(tiny_bert(), gated())
    shake(model, std=0.3)
    batch = bert_batch()
    want = model(**batch).logits
    kept = copy.deepcopy(model)
    assert unipelt.fold(kept, [batch], tolerance=0.0).outcomes["kept"] == 1
    assert torch.equal(kept(**batch).logits, want)
    with torch.no_grad():
        gate_of(model).weight.mul_(1e-4)
        gate_of(model).bias.fill_(-20.0)
    want = model(**batch).logits
    report = unipelt.fold(model, [batch])
    assert report.outcomes["constant"] == 1, "closed, it still takes attention"
    assert " - " in str(report)
    assert gate_of(model) is None
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)
    unipelt.remove(model)
    assert torch.equal(model(**batch).logits, tiny_bert()(**batch).logits)


def test_a_gated_prompt_is_counted_saved_loaded_and_removed(tmp_path: Path) -> None:
    base = tiny_model("albert")  # whose embeddings are narrower than its states
    first = bits(base)
    config = {**gated(network="mlp", hidden=60), "prompt": {"length": 40, "gate": True}}
    model: Any = unipelt.inject(base, config)
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == {"prompt": 40 * 16}
    assert counts.gates == {"prompt": 61, "network": 60 * 17}
    assert counts.trained == counts.deployed == 40 * 16 + 61 + 60 * 17
    shake(model)
    batch = tiny_batch("albert")
    want = model(**batch).logits
    unipelt.save(model, tmp_path, deploy=True)
    assert "gated prompt" in (tmp_path / "README.md").read_text()
    loaded = unipelt.load(tiny_model("albert"), tmp_path)
    assert torch.equal(loaded(**batch).logits, want)
    assert torch.equal(copy.deepcopy(loaded)(**batch).logits, want)
    unipelt.remove(model)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())
    assert len(first) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "gate", [{}, {"pooling": "mean"}, {"network": "recurrent"}, {"network": "mlp"}, {"activation": "tanh"}], ids=str
)
def test_causal_models_refuse_gates_that_read_the_text(family: str, gate: dict[str, Any]) -> None:
    model = tiny_model(family)
    with pytest.raises(unipelt.InjectionError, match=r"would see the future; take gate\.pooling: static"):
        unipelt.inject(model, gated(**gate))
    assert not hasattr(model, "unipelt_injection")


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"pooling": "token"}, r"gate\.pooling: token .* a prompt is in front of all tokens; take gate\.pooling: mask"),
        ({"shared": True}, r"gate\.shared: true .* a prompt is in front of all layers; take gate\.shared: false"),
        ({"shared": True, "activation": "softmax"}, r"gate\.shared: true .* take gate\.shared: false"),
    ],
)
def test_gates_of_tokens_and_of_layers_are_refused(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(unipelt.ConfigError, match=message):
        unipelt.resolve(gated(**gate))
    assert unipelt.resolve({"preset": "prompt", "prompt": {"gate": False}}) == unipelt.resolve("prompt")
    assert unipelt.resolve("prompt").to_dict()["prompt"] == {"length": 20}
