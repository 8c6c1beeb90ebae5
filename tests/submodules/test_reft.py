"""ReFT: its two equations at chosen tokens, whatever the padding, and the same with a cache as without."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_near,
    assert_pack_computes_as_single_models,
    assert_same,
    edit,
    logits,
    refused,
    shake,
    tiny_batch,
    tiny_bert,
    what_is_there,
)
from inside import entries
from tiny import CACHE, DECODERS, FAMILIES, KINDS, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor
from transformers import DynamicCache, StaticCache

import unipelt
from unipelt.config.schema import ConfigError
from unipelt.submodules.chosen_tokens import ChosenTokens
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.reft import orthonormal_rows
from unipelt.submodules.room import placed_terms

EACH_FAMILY = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in FAMILIES]
ENDS: dict[str, Any] = {"gate": True, "rank": 2, "first": 2, "last": 1}


def method(gates: dict[str, Any] | None = None, **reft: Any) -> dict[str, Any]:
    return {"preset": "reft", "reft": {**ENDS, **reft}, "train_head": False, "gate": gates or {}}


def gram_schmidt(basis: Tensor) -> Tensor:
    """Orthonormal rows by the textbook."""
    rows: list[Tensor] = []
    for row in basis:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def edited_by(function: Any, h: Tensor) -> Tensor:
    """The term of equation 2 (LoReFT) or 3 (DiReFT) for states (..., D)."""
    if hasattr(function, "basis"):
        rows = gram_schmidt(function.basis)
        return (h @ function.weight.t() + function.bias - h @ rows.t()) @ rows
    return (h @ function.down.t() + function.bias) @ function.up


def chosen(mask: Tensor, first: int, last: int) -> Tensor:
    """The first and last real tokens of each text, by a loop: (B, T)."""
    found = torch.zeros_like(mask)
    for row, real in zip(found, mask, strict=True):
        places = real.nonzero().flatten().tolist()
        for place in {*places[:first], *places[max(0, len(places) - last) :]}:
            row[place] = 1
    return found


def written_out(base: Any, model: Any, edited: Tensor, real: Tensor, averages: bool) -> Any:
    """The base, whose layers' outputs are edited by hooks of this test."""
    plain = copy.deepcopy(base)
    for placed in placed_terms(model):

        def hook(module: Any, args: Any, out: Any, term: Any = placed.term) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            gate = torch.ones(())
            if term.entry is not None:
                gate = torch.sigmoid(h @ term.entry.weight[0] + term.entry.bias[0])
                gate = (gate * real).sum(1, keepdim=True) / real.sum(1, keepdim=True) if averages else gate
                gate = gate.unsqueeze(-1)
            h = torch.where(edited.bool().unsqueeze(-1), h + gate * edited_by(term.function, h), h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        plain.get_submodule(placed.path).register_forward_hook(hook)
    return plain


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("variant", ["loreft", "direft"])
@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "bart", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "t5"))]
)
def test_the_edit_is_the_papers_at_the_chosen_tokens(family: str, variant: str, gate: bool, left: bool) -> None:
    base, batch = tiny_model(family), batch_of(family, left=left)
    last = 0 if family in DECODERS else 1
    asked = {**method(variant=variant, gate=gate, last=last), "layers": [0, 2], "decoder": family in DECODERS}
    model = unipelt.inject(copy.deepcopy(base), asked)
    shake(model, std=0.3)
    mask = batch["attention_mask"]
    plain = written_out(base, model, chosen(mask, 2, last), mask, family not in DECODERS)
    with torch.no_grad():
        want, got, before = plain(**batch)[0], model(**batch)[0], base(**batch)[0]
    if family in DECODERS:  # nothing reads the states of padding, and they are random
        want, got, before = (out * mask.unsqueeze(-1) for out in (want, got, before))
    assert_near(got, want, 2e-5)
    assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_family_starts_as_itself_and_is_restored(family: str) -> None:
    base, batch = tiny_model(family), batch_of(family)
    with torch.no_grad():
        want = base(**batch)[0]
        model = unipelt.inject(base, method(last=0))
        assert_near(model(**batch)[0], want, 2e-5)
        shake(model, std=0.3)
        assert (model(**batch)[0] - want).abs().max() > 1e-3
        unipelt.remove(model)
        assert torch.equal(model(**batch)[0], want)


def test_the_same_edit_everywhere_needs_no_mask() -> None:
    base, batch = tiny_bert(), tiny_batch()
    model = unipelt.inject(copy.deepcopy(base), method(positions="all", gate=False))
    shake(model, std=0.3)
    plain = written_out(base, model, torch.ones_like(batch["attention_mask"]), batch["attention_mask"], False)
    assert_near(logits(model), logits(plain))


def test_padding_changes_nothing_and_short_texts_are_edited_once() -> None:
    model = unipelt.inject(tiny_bert(), method(first=4, last=4, gate=False))
    shake(model, std=0.3)
    batch = tiny_batch(lengths=(5, 9, 2))
    whole = logits(model, batch)
    for index, length in enumerate((5, 9, 2)):
        alone = {name: tensor[index : index + 1, :length] for name, tensor in batch.items()}
        assert_near(logits(model, alone), whole[index : index + 1])
        assert_near(logits(model, {"input_ids": alone["input_ids"]}), whole[index : index + 1])


def test_rows_are_orthonormal_and_span_the_basis() -> None:
    basis = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    rows = orthonormal_rows(basis)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows, gram_schmidt(basis))
    torch.testing.assert_close(orthonormal_rows(rows), rows)  # every R is its own basis
    assert torch.autograd.gradcheck(orthonormal_rows, (basis,))


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_the_count_is_two_projections_and_a_bias(variant: str) -> None:
    for family, layers in (("bert", 3), ("gpt2", 3), ("bart", 6)):
        counts = unipelt.parameter_counts(unipelt.inject(tiny_model(family), method(variant=variant, last=0)))
        assert counts.submodules == counts.deployed_submodules == {"reft": layers * (2 * 2 * 32 + 2)}
        assert counts.gates.keys() <= {"reft_layer", "decoder.reft_layer"}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bart", "t5"])
def test_generation_with_a_cache_is_generation_without(family: str, gate: bool) -> None:
    model: Any = unipelt.inject(tiny_model(family), method({"pooling": "token"}, first=3, last=0, gate=gate))
    shake(model, std=0.3)
    batch = batch_of(family, left=True)
    batch.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    found = [
        model.generate(**batch, **options, use_cache=cached, output_scores=True, return_dict_in_generate=True)
        for cached in (True, False)
    ]
    for cached, whole in zip(found[0].scores, found[1].scores, strict=True):
        assert_near(cached, whole, 2e-5)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_text_in_two_passes_is_the_text_in_one(cut: int) -> None:
    model: Any = unipelt.inject(tiny_model("llama"), method(first=3, last=0))
    shake(model, std=0.3)
    for left in (False, True):
        batch = batch_of("llama", left=left)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            cache = DynamicCache(config=model.config)
            got = [
                model(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    **{CACHE: cache},
                    use_cache=True,
                ).logits
                for part in (slice(0, cut), slice(cut, 9))
            ]
        real = mask.unsqueeze(-1)
        assert_near(torch.cat(got, dim=1) * real, want * real, 2e-5)


def test_passes_whose_tokens_are_not_known_are_refused() -> None:
    model = tiny_model("gpt2")
    before = what_is_there(model)
    with pytest.raises(unipelt.InjectionError, match=r"reft\.last: 1 edits the last tokens .* still grows"):
        unipelt.inject(model, method())
    with pytest.raises(unipelt.InjectionError, match=r"reft\.last: 1"):
        unipelt.inject(tiny_model("bart"), method())
    assert_same(what_is_there(model), before)
    ids = torch.randint(5, 60, (1, 4))
    classifier = unipelt.inject(tiny_model("gpt2", "SequenceClassification"), method(gate=False))
    cache = DynamicCache(config=classifier.config)
    with torch.no_grad():
        classifier(input_ids=ids, **{CACHE: cache}, use_cache=True)
        with pytest.raises(ValueError, match="the last 1 tokens of a text are edited, and with a cache"):
            classifier(input_ids=ids, **{CACHE: cache}, use_cache=True)
    model = unipelt.inject(tiny_model("llama"), method(last=0))
    with pytest.raises(ValueError, match="a static cache does not tell how many tokens it holds"):
        model(input_ids=ids, **{CACHE: StaticCache(config=model.config, max_cache_len=8)})
    window: Any = unipelt.inject(tiny_model("mistral"), method(first=7, last=0))
    with pytest.raises(ValueError, match=r"take a smaller reft\.first"):
        window.generate(**batch_of("mistral", left=True), max_new_tokens=3, eos_token_id=None, pad_token_id=1)


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_saved_loaded_copied_and_pickled(variant: str, tmp_path: Path) -> None:
    base, batch = tiny_bert(), tiny_batch()
    before = what_is_there(base)
    model = unipelt.inject(base, method(variant=variant))
    shake(model, std=0.3)
    want = logits(model, batch)
    unipelt.save(model, tmp_path)
    for other in (unipelt.load(tiny_bert(), tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), want)
    with pytest.raises(unipelt.MergeError, match=r"the gate of reft_layer at .* depends on the text"):
        unipelt.merge(model)
    unipelt.remove(model)
    assert_same(what_is_there(model), before)
    ungated = unipelt.inject(base, method(gate=False))
    with pytest.raises(unipelt.MergeError, match=r"reft_layer at bert\.encoder\.layer\.0 is no linear function"):
        unipelt.merge(ungated)
    with pytest.raises(unipelt.CheckpointError, match=r"carries no LoRA, no \(IA\)3, no LayerNorm"):
        unipelt.save_peft(ungated, tmp_path / "peft")


def test_a_closed_gate_and_other_submodules() -> None:
    base = tiny_bert()
    model = unipelt.inject(copy.deepcopy(base), {**method(), "lora": {"rank": 2}, "ln_tuning": {}})
    shake(model)
    with torch.no_grad():
        for entry in entries(model):
            entry.bias.fill_(-200.0)
    assert torch.equal(logits(model), logits(base))
    with unipelt.record_gates(model) as record:
        logits(model)
    assert {"reft_layer", "ln_tuning_norm1", "ln_tuning_norm2", "lora_query", "lora_value"} == set(record)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_training_step_with_gradient_checkpointing_is_one_without(reentrant: bool) -> None:
    found: list[dict[str, Any]] = []
    for checkpointed in (False, True):
        model = unipelt.inject(tiny_bert(), method())
        shake(model, std=0.3)
        model.train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(**tiny_batch()).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    assert all(grad.abs().max() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        assert_near(found[1][name], grad)


def test_a_pack_edits_each_replicas_own_tokens() -> None:
    model = unipelt.inject(tiny_bert(), method())
    assert_pack_computes_as_single_models(model, [tiny_batch(0), tiny_batch(1, lengths=(9, 2, 4))])


@pytest.mark.parametrize("variant", ["loreft", "direft"])
@pytest.mark.parametrize("dtype", ["float32", "base"])
def test_half_precision_starts_as_the_base_and_trains(dtype: str, variant: str) -> None:
    base, batch = tiny_model("llama").bfloat16(), batch_of("llama")
    with torch.no_grad():
        want = base(**batch).logits
    model: Any = unipelt.inject(base, {**method(variant=variant, last=0), "dtype": dtype})
    assert torch.equal(model(**batch).logits, want)
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32 if dtype == "float32" else torch.bfloat16}
    model(**batch).logits.float().square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "reft.rank must be above 0"),
        ({"first": -1}, "reft.first must be 0 or more, not -1"),
        ({"first": 0, "last": 0}, "reft.first and last are both 0, so no token is edited"),
        ({"variant": "rereft"}, "reft.variant must be loreft or direft"),
        ({"places": ["down"]}, "reft.places must be layer, not 'down'"),
        ({"places": []}, "reft.places must name one or more of layer, none of them twice"),
    ],
)
def test_configurations_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unipelt.resolve({"reft": values})


def test_a_rank_above_the_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reft\.rank must be at most the width of the states, 32, not 33"):
        unipelt.inject(tiny_bert(), method(rank=33))
    unipelt.save(unipelt.inject(tiny_bert(), method()), tmp_path)
    edit(tmp_path, "unipelt.reft.rank", 33)
    refused(unipelt.load, tmp_path, "does not fit this model: reft.rank must be at most the width of the states, 32")


def test_a_shared_gate_is_refused() -> None:
    """With gradient checkpointing it would get no gradient, because the layer computes it and ReFT comes after it."""
    model = tiny_bert()
    with pytest.raises(unipelt.InjectionError, match=r"take gate\.shared: false, or reft\.gate: false"):
        unipelt.inject(model, {"preset": "unipelt-apl", "reft": {}, "gate": {"shared": True}})
    assert not hasattr(model, "unipelt_injection")
    unipelt.inject(model, {"preset": "unipelt-apl", "reft": {"gate": False}, "gate": {"shared": True}})


def test_tokens_are_chosen_by_their_place_in_the_text() -> None:
    """Beside a cache, too: `cached` tokens came before, and the mask may show fewer of them (a window)."""
    x, two = torch.zeros(2, 3, 4), ChosenTokens(2, 0)
    found = two.mask(AttentionPass(mask=None), x)
    assert found.dtype == x.dtype
    assert found.tolist() == [[[1], [1], [0]]] * 2
    assert ChosenTokens(0, 1).mask(AttentionPass(mask=None), x.double()).tolist() == [[[0], [0], [1]]] * 2
    assert two.mask(AttentionPass(mask=None, cached=1), x).flatten(1).tolist() == [[1, 0, 0]] * 2
    seen = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.0, 0.25, 0.25]])  # two of them are in the cache
    for cached, want in ((2, [[0, 1, 1], [0, 0, 0]]), (7, [[0, 1, 1], [0, 0, 0]])):
        assert two.mask(AttentionPass(mask=None, weights=seen, cached=cached), x).flatten(1).tolist() == want
    with pytest.raises(ValueError, match="this attention sees 2 of 7 tokens in the cache, fewer than the first 3"):
        ChosenTokens(3, 0).mask(AttentionPass(mask=None, weights=seen, cached=7), x)
    with pytest.raises(RuntimeError, match="a term edits chosen tokens, and the layer's attention was not called"):
        two.mask(AttentionPass(), x)
    with pytest.raises(ValueError, match="a static cache does not tell how many tokens it holds"):
        two.mask(AttentionPass(mask=None, cached=None), x)
