"""Mixtures of terms: routers, random experts and their means, attention over trained experts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, shake, small, tiny_batch, tiny_bert
from inside import parts
from tiny import CACHE, DECODERS, tiny_model
from tiny import tiny_batch as batch_of
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import unipelt
from unipelt.config.mixture import MixtureConfig
from unipelt.config.schema import ConfigError
from unipelt.injection.inject import inject_as
from unipelt.injection.state import injection_of
from unipelt.pack import Pack, PackError, kept_values
from unipelt.report import kinds
from unipelt.submodules.mixture import Mixture, MixtureTerm
from unipelt.submodules.room import own_parts, placed_terms, rooms

SIZES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "gate": False},
    "adapter": {"bottleneck": 5, "gate": False},
    "houlsby": {"bottleneck": 5, "gate": False, "activation": "gelu"},
}
LABELS = torch.tensor([0, 1, 1])


def method(kind: str, gate: bool = False, **mixture: Any) -> dict[str, Any]:
    return {"preset": kind, kind: {**SIZES[kind], "gate": gate, "mixture": mixture}}


def injected(kind: str, family: str = "bert", gate: bool = False, seed: int = 1, **mixture: Any) -> Any:
    model = tiny_bert() if family == "bert" else tiny_model(family)
    shake(unipelt.inject(model, method(kind, gate, **mixture)), seed=seed, std=0.3)
    return model


def checkpoint(model: Any, reentrant: bool = False) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def terms(model: nn.Module) -> list[MixtureTerm]:
    return [placed.term for placed in placed_terms(model) if isinstance(placed.term, MixtureTerm)]


def written_out(mixture: Mixture, x: Tensor, y: Tensor, mask: Tensor, by_example: bool) -> Tensor:
    """The weights of the experts token by token, and the sum of the terms, from the papers."""
    real = mask.unsqueeze(-1).float()
    seen = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True) if by_example else x
    result = torch.zeros_like(y)
    experts = [expert(x, y) for expert in mixture.experts]
    for example in range(len(x)):
        for token in range(x.shape[1]):
            scores = mixture.router @ seen[example, 0 if by_example else token]
            best = scores.argsort(descending=True)[: mixture.config.top_k or len(experts)]
            shares = scores.exp() / scores.exp().sum() if len(best) == 1 else scores.exp() / scores[best].exp().sum()
            for index in best:
                result[example, token] += shares[index] * experts[int(index)][example, token]
    return result


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("router", ["token", "example"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_router_weighs_the_experts(kind: str, router: str, top_k: int | None) -> None:
    model = injected(kind, experts=3, router=router, top_k=top_k)
    term = terms(model)[-1]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    term.function.register_forward_hook(lambda module, args, out: seen.append((args[0], args[1], out)))
    batch = tiny_batch()
    logits(model, batch)
    ((x, y, got),) = seen
    with torch.no_grad():
        want = written_out(term.function, x, y, batch["attention_mask"], router == "example")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("router", ["token", "example", "random"])
@pytest.mark.parametrize("kind", SIZES)
def test_padding_changes_nothing(kind: str, router: str) -> None:
    model = injected(kind, gate=True, experts=3, router=router)
    short = tiny_batch(lengths=(5,), tokens=5)
    padded = {name: nn.functional.pad(tensor, (0, 4)) for name, tensor in short.items()}
    padded["input_ids"][:, 5:] = 7
    torch.testing.assert_close(logits(model, padded), logits(model, short), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ["token", "example", "random"])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_layer_sees_no_later_token(family: str, kind: str, router: str) -> None:
    assert family in DECODERS
    model = injected(kind, family, gate=True, experts=3, router=router)
    batch = batch_of(family, lengths=(9, 9))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 6:] = 9
    assert torch.equal(logits(model, batch)[:, :6], logits(model, other)[:, :6])
    assert not torch.equal(logits(model, batch)[:, 6:], logits(model, other)[:, 6:])
    with torch.no_grad():
        first = model(**{name: tensor[:, :5] for name, tensor in batch.items()}, use_cache=True)
        rest = model(
            input_ids=batch["input_ids"][:, 5:],
            attention_mask=batch["attention_mask"],
            **{CACHE: first.past_key_values},
        ).logits
    torch.testing.assert_close(rest, logits(model, batch)[:, 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bart", "t5", "deberta-v2"])
def test_other_families(family: str) -> None:
    base = tiny_model(family)
    model = copy.deepcopy(base)
    for router in ("token", "example", "random"):
        changes = {"lora": {"rank": 2, "mixture": {"experts": 2, "router": router}}}
        shake(unipelt.inject(model, {"preset": "lora", **changes, "adapter": {"mixture": {"router": router}}}))
        assert (logits(model, batch_of(family)) - logits(base, batch_of(family))).abs().max() > 1e-4
        unipelt.remove(model)
        assert torch.equal(logits(model, batch_of(family)), logits(base, batch_of(family)))


def test_one_kind_of_expert_is_that_term() -> None:
    """Equal experts under a full softmax are one term, whatever the router says."""
    plain = unipelt.inject(tiny_bert(), {"preset": "lora", "lora": SIZES["lora"]})
    shake(plain)
    model = unipelt.inject(tiny_bert(), method("lora", experts=3))
    values = parts(plain, "lora")
    with torch.no_grad():
        for name, tensor in parts(model, "lora").items():
            if not name.endswith("router"):
                start, _, end = name.partition(".function.experts.")
                tensor.copy_(values[f"{start}.{end[2:]}"])
        model.get_parameter("classifier.weight").copy_(plain.get_parameter("classifier.weight"))
        model.get_parameter("classifier.bias").copy_(plain.get_parameter("classifier.bias"))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


def test_counts_by_a_closed_formula() -> None:
    width, rank, wide = 32, 2, 5
    low, bottleneck = 2 * width * rank, 2 * width * wide + wide + width
    formulas = {
        ("lora", "token"): 3 * 2 * 4 * (low + width),
        ("lora", "random"): 3 * 2 * 4 * low,
        ("adapter", "example"): 3 * 4 * (bottleneck + width),
        ("adapter", "random"): 3 * 4 * bottleneck,
        ("houlsby", "token"): 3 * 4 * (2 * bottleneck + width + 48),
    }
    for (kind, router), count in formulas.items():
        counts = unipelt.parameter_counts(unipelt.inject(tiny_bert(), method(kind, router=router)))
        assert counts.submodules == counts.deployed_submodules == {kind: count}, (kind, router)


@pytest.mark.parametrize(
    ("kind", "mixture", "trained", "deployed"),
    [
        ("lora", {"experts": 4}, 4 * 294_912 + 24 * 4 * 768, 0),
        ("adapter", {"experts": 4, "router": "random"}, 4 * 894_528, 0),
        ("adapter", {"experts": 3, "router": "attention"}, 12 * 3 * 768**2, 3 * 894_528),
    ],
)
def test_counts_on_bert_base(kind: str, mixture: dict[str, Any], trained: int, deployed: int) -> None:
    """The numbers of docs/submodules.md. `deployed` is what remains and does not train."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
        config = unipelt.resolve({"preset": kind, kind: {"mixture": mixture}})
        counts = unipelt.parameter_counts(inject_as(model, config, deployed=False, head=None))
    assert counts.submodules == {kind: trained}
    assert counts.deployed_submodules == {kind: trained + deployed}


@pytest.mark.parametrize("kind", SIZES)
def test_random_experts_are_one_term_after_training(kind: str, tmp_path: Path) -> None:
    """AdaMix: the means of the experts, saved, loaded and counted as a term of ordinary size."""
    model = injected(kind, gate=True, experts=3, router="random")
    before, state = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = unipelt.merge_experts(model)
    assert plain is model
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    ordinary = unipelt.resolve({"preset": kind, kind: {**SIZES[kind], "gate": True}})
    assert injection_of(model).config == ordinary
    assert unipelt.parameter_counts(model) == unipelt.parameter_counts(unipelt.inject(tiny_bert(), ordinary))
    name = {"lora": "lora_value", "adapter": "adapter", "houlsby": "houlsby_down"}[kind]
    end = {"lora": "B"}.get(kind, "up.weight")
    where = "bert.encoder.layer.2."
    (mean,) = [v for path, v in parts(model).items() if path.startswith(where) and path.endswith(end) and name in path]
    experts = [v for path, v in state.items() if path.startswith(where) and f".{name}.function.experts" in path]
    experts = [v for v in experts if v.shape == mean.shape]
    assert len(experts) == 3
    torch.testing.assert_close(mean, sum(experts) / 3)
    unipelt.save(model, tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(model))
    assert torch.equal(logits(unipelt.remove(model)), logits(tiny_bert())), "the head too is as it came"
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.merge_experts(model)


def test_merged_experts_keep_the_record_of_the_model(tmp_path: Path) -> None:
    """The flags of trained parameters, the earlier flags of the base, and the form of saving stay as before."""
    also = "bert.embeddings.LayerNorm.weight"
    model = unipelt.inject(tiny_bert(), method("lora", experts=3, router="random"))
    model.get_parameter(also).requires_grad_(True)
    shake(model, std=0.3)
    unipelt.save(model, tmp_path)
    base = tiny_bert()
    base.get_parameter("bert.pooler.dense.bias").requires_grad_(False)
    model = unipelt.load(base, tmp_path)
    before = logits(model)
    head = model.get_parameter("classifier.weight")
    head.grad = torch.ones_like(head)
    model.get_parameter("classifier.bias").requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters() if ".unipelt." not in name}
    unipelt.merge_experts(model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters() if ".unipelt." not in name}
    assert all(parameter.grad is None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "unipelt.json").read_text())["unfrozen"] == [also]
    torch.testing.assert_close(logits(unipelt.load(tiny_bert(), tmp_path)), before, atol=1e-5, rtol=1e-5)
    unipelt.remove(model)
    came = dict(tiny_bert().named_parameters())
    assert all(torch.equal(came[name], parameter) for name, parameter in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["bert.pooler.dense.bias"]


def test_random_experts_change_from_call_to_call_while_training() -> None:
    model = injected("houlsby", experts=4, router="random").train()
    batch = tiny_batch()
    torch.manual_seed(0)
    first, second = logits(model, batch), logits(model, batch)
    torch.manual_seed(0)
    assert torch.equal(logits(model, batch), first)
    assert not torch.equal(first, second)
    function = terms(model)[0].function
    torch.manual_seed(3)
    pairs = set()
    for _ in range(40):
        drawn = function.drawn(torch.device("cpu"))
        chosen = []
        for child in ("down", "up"):
            same = [
                all(torch.equal(drawn[f"{child}.{n}"], p) for n, p in expert.get_submodule(child).named_parameters())
                for expert in function.experts
            ]
            assert sum(same) == 1, "a weight and its bias are of one expert"
            chosen.append(same.index(True))
        pairs.add(tuple(chosen))
    assert len(pairs) > 10, "the two projections are drawn by themselves"


@pytest.mark.parametrize("router", ["token", "example", "random"])
def test_checkpointed_layers_have_the_same_gradients(router: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = injected("adapter", experts=3, router=router, top_k=None if router == "random" else 2)
        model.train()
        if checkpointed:
            checkpoint(model)
        torch.manual_seed(5)
        model(**tiny_batch(), labels=LABELS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("experts.2" in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_router_gets_a_gradient(top_k: int) -> None:
    model = injected("lora", experts=3, top_k=top_k).train()
    model(**tiny_batch(), labels=LABELS).loss.backward()
    routers = [p for name, p in model.named_parameters() if name.endswith("router")]
    assert len(routers) == 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def balance(model: Any, mask: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    """The load-balancing loss of all mixtures, written out."""
    seen: list[tuple[Mixture, Tensor]] = []
    for term in terms(model):
        term.function.register_forward_hook(lambda module, args, out: seen.append((module, args[0])))
    logits(model, batch)
    losses = []
    for mixture, x in seen:
        real = x[mask.bool()] if mask is not None else x.flatten(0, 1)
        shares = torch.softmax(real @ mixture.router.t(), dim=-1)
        top = shares.topk(mixture.config.top_k or 0).indices
        load = torch.nn.functional.one_hot(top, shares.shape[-1]).sum(1).float().mean(0) / top.shape[-1]
        losses.append(mixture.config.balance * shares.shape[-1] * (load * shares.mean(0)).sum())
    return torch.stack(losses).mean()


def test_the_load_balancing_loss_is_in_the_models_loss_if_asked() -> None:
    batch = tiny_batch()
    model = injected("lora", experts=4, top_k=2, balance=0.5)
    plain = unipelt.inject(tiny_bert(), method("lora", experts=4, top_k=2))
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            ours.copy_(theirs)
    want = plain.train()(**batch, labels=LABELS).loss
    got = model.train()(**batch, labels=LABELS).loss
    torch.testing.assert_close(got - want, balance(copy.deepcopy(model), batch["attention_mask"], batch))
    assert got - want > 0.4
    assert torch.equal(model.eval()(**batch, labels=LABELS).loss, plain.eval()(**batch, labels=LABELS).loss)
    assert model.train()(**batch).loss is None
    with pytest.raises(RuntimeError, match="leave return_dict=False out"):
        model(**batch, labels=LABELS, return_dict=False)
    unipelt.remove(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_load_balancing_loss_under_checkpointing() -> None:
    found = []
    for checkpointed in (False, True):
        model = injected("adapter", experts=4, top_k=2, balance=3.0).train()
        if checkpointed:
            checkpoint(model)
        model(**tiny_batch(), labels=LABELS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)
    checkpoint(model, reentrant=True)
    with pytest.raises(RuntimeError, match="no gradient under gradient checkpointing with use_reentrant=True"):
        model(**tiny_batch(), labels=LABELS)


@pytest.mark.parametrize("router", ["token", "example", "random"])
def test_a_checkpoint_holds_the_mixture(router: str, tmp_path: Path) -> None:
    model = injected("adapter", gate=True, experts=3, router=router)
    unipelt.save(model, tmp_path)
    loaded = unipelt.load(tiny_bert(), tmp_path)
    adapter = injection_of(loaded).config.adapter
    assert adapter is not None
    assert adapter.mixture == MixtureConfig(experts=3, router=router)  # type: ignore[arg-type]
    assert torch.equal(logits(loaded), logits(model))
    assert f"gated mixture of 3 adapter (router {router})" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("router", ["token", "example", "random"])
def test_replicas_of_a_mixture_are_packed(router: str) -> None:
    model = injected("lora", gate=True, experts=3, router=router).eval()
    pack = Pack(model, tokens=9)
    values = {name: value + 0.1 for name, value in kept_values(model).items()}
    pack.add(kept_values(model))
    pack.add(values)
    batch = tiny_batch()
    with torch.no_grad():
        both = pack({name: torch.stack([tensor, tensor]) for name, tensor in batch.items()})
    torch.testing.assert_close(both[0], logits(model, batch), atol=1e-5, rtol=1e-5)
    model.load_state_dict({**model.state_dict(), **values})
    torch.testing.assert_close(both[1], logits(model, batch), atol=1e-5, rtol=1e-5)
    model.train()
    assert pack({name: torch.stack([tensor, tensor]) for name, tensor in batch.items()}).isfinite().all()


def test_what_a_mixture_refuses(tmp_path: Path) -> None:
    model = injected("lora", experts=3)
    with pytest.raises(unipelt.MergeError, match=r"lora_query at .* is no linear function"):
        unipelt.merge(model)
    with pytest.raises(unipelt.MergeError, match="no mixture with the router random"):
        unipelt.merge_experts(model)
    with pytest.raises(unipelt.CheckpointError, match=r"lora_\w+ is a mixture of experts, which a PEFT folder"):
        unipelt.save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(unipelt.FoldError, match="nothing to fold"):
        unipelt.fold(model)
    with pytest.raises(unipelt.CheckpointError, match="another"):
        unipelt.release_state_dict(model)
    with pytest.raises(unipelt.CheckpointError, match="a mixture of adapters"):
        unipelt.release_state_dict(injected("adapter", experts=3))
    with pytest.raises(unipelt.MergeError, match=r"call unipelt\.merge_experts"):
        unipelt.merge(injected("lora", experts=3, router="random"))
    with pytest.raises(ValueError, match="PEFT has no place for that; take balance 0"):
        unipelt.save(injected("lora", experts=3, top_k=1, balance=0.1), tmp_path, peft=True)
    with pytest.raises(PackError, match="without the load-balancing loss"):
        Pack(injected("lora", experts=3, top_k=1, balance=0.1), tokens=9)
    with pytest.raises(unipelt.InjectionError, match="does not know the padding of its text; take cross: false"):
        unipelt.inject(tiny_model("bart"), method("lora", top_k=1, balance=0.1))


def test_lora_of_random_experts_reaches_the_weights_and_peft(tmp_path: Path) -> None:
    model = injected("lora", experts=3, router="random")
    want = logits(model)
    unipelt.save_peft(unipelt.merge_experts(model), tmp_path)
    torch.testing.assert_close(logits(unipelt.load_peft(tiny_bert(), tmp_path)), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(unipelt.merge(model)), want, atol=1e-5, rtol=1e-5)


def test_what_was_frozen_beside_merged_experts_stays_frozen() -> None:
    mixed = {**SIZES["adapter"], "mixture": {"experts": 2, "router": "random"}}
    model: Any = unipelt.inject(tiny_bert(), small("unipelt-ap-nogate", adapter=mixed))
    for own in own_parts(model):
        own.parameter.requires_grad_(own.part.kind != "prefix")
    unipelt.merge_experts(model)
    assert {(own.part.kind, own.parameter.requires_grad) for own in own_parts(model)} == {
        ("prefix", False),
        ("adapter", True),
    }


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_experts_that_were_frozen_stay_frozen(kind: str) -> None:
    mixed = {**SIZES[kind], "mixture": {"experts": 2, "router": "random"}}
    model: Any = unipelt.inject(tiny_bert(), small("unipelt-al-nogate", **{kind: mixed}))
    for own in own_parts(model):
        own.parameter.requires_grad_(own.part.kind != kind)
    want = logits(model.eval())
    unipelt.merge_experts(model)
    flags = {(own.part.kind, own.parameter.requires_grad) for own in own_parts(model)}
    assert flags == {(other, other != kind) for other in ("adapter", "lora")}
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=1e-5)
    again: Any = unipelt.inject(tiny_bert(), small("unipelt-al-nogate", **{kind: mixed}))
    parts = [own for own in own_parts(again) if own.part.kind == kind]
    for own in parts[1:]:
        own.parameter.requires_grad_(False)
    unipelt.merge_experts(again)
    assert any(own.parameter.requires_grad for own in own_parts(again) if own.part.kind == kind), "one expert trained"


def test_decomposed_updates_of_random_experts_become_one() -> None:
    lora = {"rank": 2, "gate": False, "decomposed": True}
    model: Any = unipelt.inject(
        tiny_bert(), {"preset": "lora", "lora": {**lora, "mixture": {"experts": 3, "router": "random"}}}
    )
    shake(model, std=0.3)
    want = logits(model)
    unipelt.merge_experts(model)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    assert injection_of(model).config == unipelt.resolve({"preset": "lora", "lora": lora})


@pytest.mark.parametrize("router", ["example", "random"])
def test_a_mixture_in_pefts_form(router: str, tmp_path: Path) -> None:
    model = injected("adapter", gate=True, experts=3, router=router)
    unipelt.save(model, tmp_path, peft=True)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 1}, "experts must be from 2 to 64, not 1"),
        ({"experts": 1_000_000}, "experts must be from 2 to 64"),
        ({"top_k": 5}, "top_k must be from 1 to 4, the number of experts, not 5"),
        ({"router": "random", "top_k": 2}, "the router random chooses no experts"),
        ({"router": "random", "balance": 0.1}, "balance is of the routers token and example"),
        ({"balance": 0.1}, "balance needs a top_k below experts"),
        ({"top_k": 2, "balance": -1.0}, "balance must be from 0 to 1000"),
        ({"router": "words"}, "router must be token or example or random or attention"),
        ({"expert": 3}, "unknown key 'lora.mixture.expert'; did you mean 'experts'"),
    ],
)
def test_configurations_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unipelt.resolve({"preset": "lora", "lora": {"mixture": values}})


def test_configurations_of_one_term_do_not_change() -> None:
    for preset, config in unipelt.PRESETS.items():
        assert "mixture" not in str(config.to_dict()), preset
    with pytest.raises(ConfigError, match="start: pissa is of one update"):
        unipelt.resolve({"preset": "lora", "lora": {"start": "pissa", "mixture": {}}})
    with pytest.raises(ConfigError, match=r"lora\.mixture\.router: attention is over trained submodules.*fuse_tasks"):
        unipelt.inject(tiny_bert(), method("lora", router="attention"))


def test_a_mixture_is_reported_as_one() -> None:
    assert kinds(unipelt.resolve(method("lora")).to_dict()) == ["lora-mixture"]
    assert kinds(small(ia3={"mixture": {}}).to_dict()) == ["adapter", "prefix", "lora", "ia3-mixture"]


def test_mixtures_in_a_batch_of_several_tasks() -> None:
    tasks = unipelt.Tasks(tiny_bert())
    for router in ("token", "example", "random"):
        shake(tasks.add(router, method("adapter", gate=True, experts=3, router=router)), std=0.3)
    shake(tasks.add("plain", "lora"))
    order = ["example", "plain", "token", "random", "example"]
    batch = tiny_batch(lengths=(5, 9, 7, 4, 3))
    found = logits(tasks, batch, tasks=order)
    for row, name in enumerate(order):
        alone = logits(tasks[name], {key: tensor[row : row + 1] for key, tensor in batch.items()})
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    tasks.add("balanced", method("adapter", top_k=2, balance=0.1))
    with pytest.raises(unipelt.InjectionError, match="its load-balancing loss belongs to the tokens of one task"):
        tasks(**batch, tasks=["balanced", *order[1:]])


def test_nothing_is_left_of_a_pass_that_failed() -> None:
    model = injected("lora", experts=4, top_k=2, balance=0.5).train()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1000]]))
    passes = {room.passes for _, room in rooms(model)}
    assert len(passes) == 1
    assert not passes.pop()._losses


# Attention over trained tasks


def fused(kind: str = "adapter", gate: bool = False, count: int = 3) -> tuple[unipelt.Tasks, Any]:
    tasks = unipelt.Tasks(tiny_bert())
    for seed in range(count):
        shake(tasks.add(f"task{seed}", {"preset": kind, kind: SIZES[kind]}), seed=seed, std=0.3)
    model = unipelt.fuse_tasks(tasks, "fused", list(tasks), gate=gate)
    return tasks, model


@pytest.mark.parametrize("kind", SIZES)
def test_attention_over_trained_submodules(kind: str) -> None:
    tasks, model = fused(kind)
    shake(model, std=0.3)
    term = terms(model)[-1]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    term.function.register_forward_hook(lambda module, args, out: seen.append((args[0], args[1], out)))
    logits(model)
    ((x, y, got),) = seen
    mixture = term.function
    with torch.no_grad():
        outputs = torch.stack([expert(x, y) for expert in mixture.experts], dim=-2)
        scores = torch.einsum("bti,oi,btep,op->bte", x, mixture.query, outputs, mixture.key)
        want = torch.einsum("bte,bteo,po->btp", scores.softmax(-1), outputs, mixture.value)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    own = {path.replace(".function", ""): tensor for path, tensor in parts(tasks["task1"], kind).items()}
    theirs = {p.replace(".function.experts.1", ""): t for p, t in parts(model, kind).items() if ".experts.1." in p}
    assert theirs.keys() == own.keys()
    assert all(torch.equal(tensor, own[path]) for path, tensor in theirs.items())


@pytest.mark.parametrize("gate", [False, True])
def test_only_the_attention_and_the_head_train(gate: bool, tmp_path: Path) -> None:
    tasks, model = fused(gate=gate)
    counts = unipelt.parameter_counts(model)
    bottleneck = 2 * 32 * 5 + 5 + 32
    assert counts.submodules == {"adapter": 3 * 3 * 32 * 32}, "Q, K and V of each layer"
    assert counts.deployed_submodules == {"adapter": 3 * (3 * 32 * 32 + 3 * bottleneck)}
    assert counts.gates == ({"adapter": 3 * 33} if gate else {})
    added = {name: p for name, p in model.named_parameters() if ".unipelt." in name}
    trained = {name.rpartition(".")[2] for name, p in added.items() if p.requires_grad}
    assert trained == {"query", "key", "value", *(("weight", "bias") if gate else ())}
    model.train()(**tiny_batch(), labels=LABELS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = unipelt.load(tiny_bert(), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert unipelt.parameter_counts(loaded) == counts
    assert torch.equal(logits(unipelt.remove(loaded)), logits(tiny_bert()))
    for name in list(tasks)[:-1]:
        tasks.delete(name)
    assert torch.equal(logits(tasks["fused"]), logits(model)), "the copies stay when their tasks go"
    mixed = logits(tasks, tasks=["fused", "fused", "fused"])
    torch.testing.assert_close(mixed, logits(model))


@pytest.mark.parametrize(("labels", "problem"), [(3, None), (None, "multi_label_classification"), (1, "regression")])
def test_a_fused_task_has_labels_of_its_own(labels: int | None, problem: str | None) -> None:
    tasks, _ = fused(count=2)
    model = unipelt.fuse_tasks(tasks, "other", ["task0", "task1"], num_labels=labels, problem_type=problem)
    assert logits(model).shape == (3, labels or 2)
    assert (model.config.num_labels, model.config.problem_type) == (labels or 2, problem)
    assert (tasks.model.config.num_labels, tasks.model.config.problem_type) == (2, None)


def test_tasks_that_cannot_be_fused() -> None:
    tasks, _ = fused()
    tasks.add("gated", "unipelt-ap")
    tasks.add("gated2", "unipelt-ap")
    tasks.add("al", "unipelt-al-nogate")
    tasks.add("al2", "unipelt-al-nogate")
    tasks.add("g", {"preset": "adapter", "adapter": {"gate": True}})
    tasks.add("g2", {"preset": "adapter", "adapter": {"gate": True}})
    for name in ("mixture", "mixture2"):
        tasks.add(name, method("adapter", experts=3))
        tasks.add(f"pissa-{name}", {"preset": "lora", "lora": {"start": "pissa"}})
    tasks.add("kronecker", "compacter")
    tasks.add("kronecker2", "compacter")
    names = list(tasks)
    for sources, message in (
        (["task0"], "a list of 2 to 64 names"),
        ("task0", "a list of 2 to 64 names"),
        (["task0", "task0"], "none of them twice"),
        (["task0", "al"], "have different methods"),
        (["gated", "gated2"], "a prefix or a prompt"),
        (["al", "al2"], "several kinds of submodules, adapter, lora"),
        (["g", "g2"], "gates, which attention would have to repeat"),
        (["mixture", "mixture2"], "a mixture; only a mixture with the router random"),
        (["pissa-mixture", "pissa-mixture2"], "LoRA that starts at a part of the weight"),
        (["kronecker", "kronecker2"], "its layers share parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            unipelt.fuse_tasks(tasks, "new", sources)
    with pytest.raises(ValueError, match="there is a task 'task0' already"):
        unipelt.fuse_tasks(tasks, "task0", ["task1", "task2"])
    with pytest.raises(ValueError, match="mixture of 3 experts, whose order is its own"):
        unipelt.combine_tasks(tasks, "new", ["fused"])
    with pytest.raises(unipelt.MergeError, match="no mixture with the router random"):
        unipelt.merge_experts(tasks["fused"])
    assert list(tasks) == names
