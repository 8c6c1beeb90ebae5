"""Causal models stay causal: no token sees a later one, and a cache changes nothing, for every family."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from helpers import shake
from inside import added_at, parts_in
from tiny import CACHE, DECODERS, DEPTH, ENCODER_DECODERS, EOS, PAD, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    masking_utils,
)

import unipelt
from unipelt.hosts.attention_interface import ATTENTION
from unipelt.injection.attention_hooks import attend
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.forward_pass import PassFacts
from unipelt.submodules.gate import Gates
from unipelt.submodules.prefix import Prefix
from unipelt.submodules.room import layer_sets, placed_terms

LENGTH = 4
SMALL: dict[str, Any] = {"adapter": {"bottleneck": 8}, "lora": {"rank": 4}}
APL = {"preset": "unipelt-apl", "prefix": {"length": LENGTH, "hidden": 16}, **SMALL}
AL = {"preset": "unipelt-al", **SMALL}
PREFIX = {"preset": "prefix", "prefix": {"length": LENGTH, "hidden": 16}}
FAMILIES = (*DECODERS, *ENCODER_DECODERS)
OLD = "q_offset" not in inspect.signature(masking_utils._ignore_causal_mask_sdpa).parameters
"""An older Transformers, that says its masks more often; some of its models have limits of their own."""
WITH_PREFIX = [name for name in FAMILIES if name in tiny.WITH_PREFIX]
WINDOWED = ("mistral", "gemma2", "gemma3_text")
"""Those whose tiny models have a sliding window, of 5."""
TOKENS, STEPS = 9, 12
VARIED = {"no_repeat_ngram_size": 2, "suppress_tokens": [PAD, EOS]}
"""A random model would say one word for ever; and texts are to be of one length, without padding inside."""
QUICK = ("llama", "gemma3_text", "gpt2", "bloom", "bart", "t5")
"""One of each kind: rotary, windowed, fused with learned positions, no prefix, encoder-decoders."""


def quick(names: Any, few: tuple[str, ...] = QUICK) -> list[Any]:
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def make(family: str, attention: str = "sdpa", *, further: bool | None = None, **changes: Any) -> Any:
    """With what the paper has and the family can take, gated; one of each kind, unless told not to, with all."""
    further = family in QUICK if further is None else further
    model = tiny_model(family, attention=attention, **changes)
    method = APL if family in WITH_PREFIX else AL
    unipelt.inject(model, {**method, **(tiny.FURTHER if further else {})})
    shake(model)
    return model


def padding(kind: str, rows: int, tokens: int = TOKENS) -> Tensor | None:
    """A mask that hides nothing and is not there, or the last, or the first two tokens."""
    if kind == "none":
        return None
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[:, slice(-2, None) if kind == "right" else slice(2)] = 0
    return mask


def run(family: str, model: Any, ids: Tensor, mask: Tensor | None, start: int = 0, cache: Any = None) -> Any:
    """The model's output for tokens from `start` on; of an encoder-decoder, for the decoder's tokens."""
    options: dict[str, Any] = {CACHE: cache, "use_cache": cache is not None}
    with torch.no_grad():
        if family in ENCODER_DECODERS:
            source = tiny_batch(family, lengths=(5,), tokens=7)
            source = {name: source[name].repeat(len(ids), 1) for name in ("input_ids", "attention_mask")}
            return model(**source, decoder_input_ids=ids[:, start:], decoder_attention_mask=mask, **options)
        if mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:]
        return model(input_ids=ids[:, start:], attention_mask=mask, **options)


def random_ids(rows: int = 2, tokens: int = TOKENS, seed: int = 3) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def influence(family: str, model: Any, kind: str) -> Tensor:
    """How much another token at j changes the logits at i, at [j, i]; nothing is said of padding."""
    ids, other = random_ids(1).repeat(TOKENS, 1), random_ids(1, seed=4)
    assert (ids[0] != other[0]).all()
    mask = padding(kind, TOKENS)
    # row j has another token at j; rows stay where they are, so that what is the same is the same to the last bit
    changed = torch.where(torch.eye(TOKENS, dtype=torch.bool), other, ids)
    change = (run(family, model, changed, mask).logits - run(family, model, ids, mask).logits).abs().amax(dim=-1)
    if mask is not None:
        real = mask[0].bool()
        change = change[real][:, real]
    return change


def future(change: Tensor) -> float:
    """The largest change of a position's logits by a later token."""
    return change.tril(-1).max().item()


# every family with and without a mask, by one back-end each; the other pairs of the two are slow
PAIRS = [("sdpa", "none"), ("eager", "left")]
CASES = [
    pytest.param(
        family, attention, kind, marks=() if family in QUICK or (attention, kind) in PAIRS else pytest.mark.slow
    )
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    for kind in ("none", "left", "right")
]


@pytest.mark.parametrize(("family", "attention", "kind"), CASES)
def test_no_token_sees_a_later_one(family: str, attention: str, kind: str) -> None:
    change = influence(family, make(family, attention), kind)
    assert future(change) <= 1e-6
    assert change.diagonal().min() > 1e-3
    assert change[0, -1] > 1e-4, "what is seen matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mean_over_the_text_would_see_the_future(family: str) -> None:
    model = make(family)
    assert {gates.pooling for gates in decoder_gates(model)} == {"token"}
    for gates in decoder_gates(model):
        gates.pooling = "mean"
    assert future(influence(family, model, "none")) > 1e-5


def decoder_gates(model: Any) -> list[Gates]:
    modules = model.get_decoder().modules() if model.config.is_encoder_decoder else model.modules()
    return [module for module in modules if isinstance(module, Gates)]


@pytest.mark.parametrize(("family", "attention", "kind"), CASES)
def test_logits_step_by_step_are_those_of_the_whole(family: str, attention: str, kind: str) -> None:
    model, base = make(family, attention), tiny_model(family, attention=attention)
    for piece in (1, 3):
        try:
            cached_gap(family, base, kind, piece)
        except RuntimeError:  # an older StableLM itself mistakes the size of its mask, for pieces of a text
            assert (family, attention, kind, piece) == ("stablelm", "sdpa", "none", 3)
            assert OLD
            continue
        assert cached_gap(family, model, kind, piece) <= 1e-5


def cached_gap(family: str, model: Any, kind: str, piece: int) -> float:
    ids, mask = random_ids(), padding(kind, 2)
    whole = run(family, model, ids, mask).logits
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    if family in ENCODER_DECODERS:
        cache = EncoderDecoderCache(cache, DynamicCache())
    parts = []
    for start in range(0, TOKENS, piece):
        end = start + piece
        part = run(family, model, ids[:, :end], None if mask is None else mask[:, :end], start, cache)
        parts.append(part.logits)
    difference = (torch.cat(parts, dim=1) - whole).abs()
    largest = (difference if mask is None else difference[mask.bool()]).max().item()
    return largest / max(1.0, whole.abs().max().item())


def prompts(family: str, rows: int = 3) -> dict[str, Tensor]:
    batch = tiny_batch(family, left=family not in ENCODER_DECODERS)
    return {name: batch[name][:rows] for name in ("input_ids", "attention_mask")}


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens."""
    options = {"max_new_tokens": STEPS, "do_sample": False, **VARIED, **options}
    with torch.no_grad():
        out = model.generate(**batch, **options)
    new = out[:, 1:] if model.config.is_encoder_decoder else out[:, batch["input_ids"].shape[1] :]
    assert new.shape[1] == STEPS
    return new


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", quick(FAMILIES))
def test_generation_does_not_depend_on_the_cache_or_the_batch(family: str, attention: str, beams: int) -> None:
    model, batch = make(family, attention), prompts(family)
    want = generated(model, batch, num_beams=beams)
    assert len(want.unique()) > 3, "a text of one token would agree with anything"
    assert torch.equal(generated(model, batch, num_beams=beams, use_cache=False), want)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = {name: tensor[row : row + 1, real] for name, tensor in batch.items()}
        assert torch.equal(generated(model, alone, num_beams=beams), want[row : row + 1])


@pytest.mark.parametrize("family", quick(FAMILIES, ("llama", "bart")))
def test_sampling_with_a_seed_does_not_depend_on_the_cache(family: str) -> None:
    model, batch = make(family), prompts(family)
    samples = []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(7)
        samples.append(generated(model, batch, do_sample=True, **options))
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], generated(model, batch))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", quick(FAMILIES))
def test_a_static_cache_generates_what_a_dynamic_one_does(family: str, attention: str) -> None:
    model = make(family, attention)
    full = {name: tensor[1:2] for name, tensor in prompts(family).items()}
    assert full["attention_mask"].all(), "without padding there is no mask, and sdpa is left to be causal by itself"
    for batch in (prompts(family), full):
        assert torch.equal(generated(model, batch, cache_implementation="static"), generated(model, batch))


@pytest.mark.parametrize("family", quick(FAMILIES))
def test_assisted_generation_is_greedy_generation(family: str) -> None:
    model, base = make(family), tiny_model(family)
    for either in (model, base):  # this needs the source's tokens, which Transformers does not show an assistant
        either.generation_config.encoder_no_repeat_ngram_size = None
    # without the end of the text: Transformers may stop looking for candidates there
    batch = {name: tensor[1:2, :-1] for name, tensor in prompts(family).items()}
    want = generated(model, batch)
    for options in ({"assistant_model": base}, {"prompt_lookup_num_tokens": 2}):
        if OLD and family in WINDOWED:  # an older cache of a window cannot take back a candidate
            for either in (model, base):
                with pytest.raises(ValueError, match="Cannot `crop`"):
                    generated(either, batch, **options)
            continue
        assert torch.equal(generated(model, batch, **options), want)


class Calls:
    """What `attend` was given and gave, call by call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        outputs = attend(module, query, key, value, attention_mask, **kwargs)
        call = {"module": module, "query": query, "key": key, "value": value, "mask": attention_mask}
        self.calls.append({**call, **kwargs, "output": outputs[0]})
        return outputs


@pytest.fixture
def attention_calls() -> Iterator[list[dict[str, Any]]]:
    calls = Calls()
    AttentionInterface.register(ATTENTION, calls)
    yield calls.calls
    AttentionInterface.register(ATTENTION, attend)


def by_hand(call: dict[str, Any], gate: Tensor, allowed: Tensor) -> Tensor:
    """softmax over [prefix logits + log g_t ; own logits where allowed]; gate is (B, T), the result (B, T, H, d)."""
    batch, heads = call["query"].shape[:2]
    own_heads = call["key"].shape[1]
    rows = added_at(call["module"]).prefix().detach()
    rows = rows.view(2, 1, LENGTH, own_heads, -1).transpose(2, 3).expand(-1, batch, -1, -1, -1)
    keys, values = (torch.cat([rows[i], call[name]], dim=2) for i, name in enumerate(("key", "value")))
    keys, values = (tensor.repeat_interleave(heads // own_heads, dim=1) for tensor in (keys, values))
    scaling = call.get("scaling")
    logits = call["query"] @ keys.mT * (keys.shape[-1] ** -0.5 if scaling is None else scaling)
    if call.get("softcap") is not None:
        logits = call["softcap"] * torch.tanh(logits / call["softcap"])
    own = logits[..., LENGTH:]
    if call.get("position_bias") is not None:
        own = own + call["position_bias"]
    own = own.masked_fill(~allowed, -torch.inf)
    weights = torch.cat([logits[..., :LENGTH] + gate.log()[:, None, :, None], own], dim=-1).softmax(dim=-1)
    return (weights @ values).transpose(1, 2)


def gate_of(added: Any, name: str, x: Tensor) -> Tensor:
    """g_t = sigmoid(w x_t + b)."""
    own = parts_in(added)
    [gate] = {part.rpartition(".")[0] for part in own if part.startswith("gate.") and part.split(".")[-2] == name}
    return torch.sigmoid((x * own[f"{gate}.weight"]).sum(-1) + own[f"{gate}.bias"])


def watch_inputs(modules: Any) -> dict[Any, Tensor]:
    """The states that each module is given, filled in at its next call."""
    inputs: dict[Any, Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        inputs[module] = args[0] if args else kwargs["hidden_states"]

    for module in modules:
        module.register_forward_pre_hook(keep, with_kwargs=True)
    return inputs


def gated_attentions(model: Any) -> dict[Any, Any]:
    """Attentions with a gate a token, and what was added to each."""
    return {
        layer.get_submodule(added.wiring.attention): added
        for _, layer, added in layer_sets(model)
        if added.entry is not None and added.entry.gates.pooling == "token"
    }


def is_cross(added: Any) -> bool:
    names: tuple[str, ...] = added.entry.gates.names
    return names[0].startswith("cross.")


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", quick(WITH_PREFIX))
def test_the_gate_of_a_query_is_the_mass_of_its_prefix(
    family: str, attention: str, kind: str, attention_calls: list[dict[str, Any]]
) -> None:
    model = make(family, attention, further=False)
    inputs = watch_inputs(gated_attentions(model))
    mask = padding(kind, 2)
    run(family, model, random_ids(), mask)
    calls = [call for call in attention_calls if call["module"] in inputs]
    assert len(calls) == len(inputs) == DEPTH * (1 + (family in ENCODER_DECODERS))
    real = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    crossing = 0
    for call in calls:
        module = call["module"]
        gate = gate_of(added_at(module), "prefix", inputs[module])
        assert gate.std() > 1e-3
        if is_cross(added_at(module)):
            crossing += 1
            allowed = (torch.arange(7) < 5).view(1, 1, 1, 7)  # the source of `run`: 5 tokens of 7
        else:
            distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
            # Mistral's attention does not know its window; those that alternate do
            window = 5 if family == "mistral" else getattr(module, "sliding_window", None) or TOKENS
            allowed = (distance >= 0) & (distance < window)
            allowed = allowed & real[:, None, None, :]
        want = by_hand(call, gate, allowed)
        torch.testing.assert_close(call["output"][real], want[real], atol=1e-5, rtol=1e-5)
    assert crossing == DEPTH * (family in ENCODER_DECODERS)


LAYOUTS: dict[str, Any] = {
    "llama": None,
    "gpt2": (slice(0, 32), slice(64, 96)),
    "phi3": (slice(0, 32), slice(48, 64)),
    "gpt_neox": tuple([24 * head + place for head in range(4) for place in range(8 * i, 8 * i + 8)] for i in (0, 2)),
    "bart": None,
    "t5": None,
}
"""Where queries and values are among the outputs of one module; None where they have modules of their own."""


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_low_rank_term_of_a_token_is_scaled_by_its_gate(family: str) -> None:
    model, base = make(family, further=False), tiny_model(family)
    attentions = gated_attentions(model)
    terms = {
        (attention, placed.term.name): placed.host
        for placed in placed_terms(model)
        for attention, added in attentions.items()
        if placed.owner is added and placed.term.name in ("lora_query", "lora_value")
    }
    assert len(terms) == 2 * len(attentions) == 2 * DEPTH * (1 + (family in ENCODER_DECODERS))
    inputs = watch_inputs({*attentions, *terms.values()})
    outputs: dict[Any, Tensor] = {}
    for leaf in terms.values():
        leaf.register_forward_hook(lambda module, args, out: outputs.update({module: out}))
    run(family, model, random_ids(), None)
    paths = {module: path for path, module in model.named_modules()}
    for attention, added in attentions.items():
        for leaf in {leaf for (owner, _), leaf in terms.items() if owner is attention}:
            x = inputs[leaf]
            want = base.get_submodule(paths[leaf])(x).detach()
            for i, name in enumerate(("lora_query", "lora_value")):
                if terms[attention, name] is not leaf:
                    continue
                own = parts_in(added)
                crosses_to_source = is_cross(added) and name == "lora_value"
                assert (added.terms[name].entry is not None) == crosses_to_source
                # the value of a cross-attention is gated by what it reads: the encoder's states
                gate = gate_of(added, name, x if crosses_to_source else inputs[attention])
                assert gate.std() > 1e-3
                update = gate[..., None] * (x @ own[f"{name}.A"].mT @ own[f"{name}.B"].mT)
                layout = LAYOUTS[family]
                want[..., slice(None) if layout is None else layout[i]] += update
            torch.testing.assert_close(outputs[leaf], want, atol=1e-5, rtol=1e-5)
            if x.shape[1] != TOKENS:
                assert x.shape[1] == 7, "states of the source"


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "mbart"])
def test_the_adapter_of_a_token_is_scaled_by_its_gate(family: str) -> None:
    model = make(family, further=False)
    inside = set(model.get_decoder().modules())
    hosts = [
        placed.host for placed in placed_terms(model) if isinstance(placed.term, Adapter) and placed.host in inside
    ]
    assert len(hosts) == DEPTH
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    final: dict[Any, Tensor] = {}
    for host in hosts:
        host.register_forward_hook(lambda m, args, out: seen.update({m: (args[0], out)}), prepend=True)
        host.register_forward_hook(lambda m, args, out: final.update({m: out}))
    run(family, model, random_ids(), None)
    for host in hosts:
        (given, raw), added = seen[host], added_at(host)
        own = parts_in(added)
        low = (raw @ own["adapter.down.weight"].mT + own["adapter.down.bias"]).clamp_min(0)
        adapted = low @ own["adapter.up.weight"].mT + own["adapter.up.bias"]
        adapted = gate_of(added, "adapter", raw)[..., None] * adapted
        if family == "bart":  # post-LN
            width = given.shape[-1:]
            want = torch.nn.functional.layer_norm(given + adapted, width, host.weight, host.bias, host.eps)
        else:
            want = raw + adapted
        torch.testing.assert_close(final[host], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [name for name in DECODERS if name in WITH_PREFIX])
def test_an_ungated_prefix_is_a_cache_that_begins_with_it(family: str, attention: str, kind: str) -> None:
    """Transformers' own code says what a prefix does: it is a past of L tokens that moves no position."""
    changes: dict[str, Any] = (
        {"sliding_window": 64} if family in WINDOWED else {}
    )  # a past leaves the window, a prefix never does
    model = tiny_model(family, attention=attention, **changes)
    base = copy.deepcopy(model)
    unipelt.inject(model, PREFIX)
    shake(model)
    ids, mask = random_ids(), padding(kind, 2)
    cache = DynamicCache()
    prefixes = [module for module in model.modules() if isinstance(module, Prefix)]
    for layer, prefix in enumerate(prefixes):
        head_size = getattr(model.config, "head_dim", None) or 32 // 4
        keys, values = prefix().detach().view(2, LENGTH, -1, head_size).transpose(1, 2)[:, None].repeat(1, 2, 1, 1, 1)
        cache.update(keys, values, layer)
    assert len(prefixes) == DEPTH
    real = torch.ones(2, TOKENS, dtype=torch.long) if mask is None else mask
    with torch.no_grad():
        want = base(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(2, LENGTH, dtype=torch.long), real], dim=1),
            position_ids=(real.cumsum(1) - 1).clamp_min(0),
            **{CACHE: cache},
            use_cache=True,
        ).logits
        without = base(input_ids=ids, attention_mask=mask).logits
    got = run(family, model, ids, mask).logits
    torch.testing.assert_close(got[real.bool()], want[real.bool()], atol=1e-5, rtol=1e-5)
    assert (got - without)[real.bool()].abs().max() > 1e-3


def static_cache(family: str, model: Any, size: int) -> Any:
    cache: Any = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=size)
    return EncoderDecoderCache(cache, DynamicCache()) if family in ENCODER_DECODERS else cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", quick(FAMILIES))
def test_a_static_cache_larger_than_the_text_changes_nothing(
    family: str, attention: str, attention_calls: list[dict[str, Any]]
) -> None:
    model, ids = make(family, attention), random_ids()
    if OLD and family == "bloom":
        with pytest.raises(RuntimeError, match="must match"):  # an older Bloom has no place for it without a mask
            run(family, tiny_model(family), ids, None, 0, static_cache(family, model, 20))
        return
    whole = run(family, model, ids, None).logits
    for prefill in (TOKENS, 5, 1):
        cache = static_cache(family, model, 20)
        del attention_calls[:]
        parts = [run(family, model, ids[:, :prefill], None, 0, cache).logits]
        lengths = {(call["mask"] is None, call["key"].shape[2]) for call in attention_calls}
        for start in range(prefill, TOKENS):
            parts.append(run(family, model, ids[:, : start + 1], None, start, cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
        if (family, attention) == ("llama", "sdpa") and prefill > 1:
            # Transformers leaves it to sdpa to cut off what is not filled
            assert lengths == {(not OLD, 20)}


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("keys", [5, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_sdpa_without_a_mask_does_not_see_keys_that_no_query_has_reached(queries: int, keys: int, biased: bool) -> None:
    """What `attend` is to do if there are more keys than queries and no mask, as sdpa itself would."""
    family = "t5" if biased else "llama"
    if family not in WITH_PREFIX:  # an older Transformers, whose sdpa knows no bias
        assert "position_bias" not in inspect.getsource(AttentionInterface()["sdpa"])
        return
    model = make(family)
    attention, added = next(iter(gated_attentions(model).items()))
    generator = torch.Generator().manual_seed(0)
    passes = attention.unipelt_port.room[0].passes
    heads = added.prefix().shape[-1] // 8
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, heads, keys, 8, generator=generator)
    bias = torch.randn(1, 4, queries, keys, generator=generator) if biased else None
    gate = torch.rand(2, queries, generator=generator)
    causal = torch.arange(queries)[:, None] >= torch.arange(keys)
    allowed = causal if queries > 1 else torch.ones(1, keys, dtype=torch.bool)  # one query is a step: it sees all
    call = {"module": attention, "query": query, "key": key, "value": value, "position_bias": bias}
    want = by_hand(call, gate, allowed)
    options: dict[str, Any] = {"scaling": 8**-0.5} | ({} if bias is None else {"position_bias": bias})
    for name, mask in (("sdpa", None), ("sdpa", allowed), ("eager", allowed)):
        model.set_attn_implementation(name)
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        held = passes.enter(PassFacts(), ())
        passes.current().attention(added.key).note_gates((added.prefix.gate_name,), gate.unsqueeze(-1))
        with torch.no_grad():
            got, _ = attend(attention, query, key, value, mask, **options)
        passes.leave()
        del held
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=f"{name}, mask {mask is not None}")


def crossing_model(kind: str, attention: str, cross: bool) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        config: Any = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=40,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
            add_cross_attention=cross,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        model: Any = BertLMHeadModel(config)
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=DEPTH,
            n_head=4,
            n_positions=40,
            n_inner=40,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            add_cross_attention=cross,
            pad_token_id=PAD,
            bos_token_id=0,
            eos_token_id=EOS,
        )
        model = GPT2LMHeadModel(config)
    model.set_attn_implementation(attention)
    unipelt.inject(model.eval(), APL)
    shake(model)
    return model


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_decoder_made_by_its_configuration_is_causal(
    kind: str, attention: str, cross: bool, attention_calls: list[dict[str, Any]]
) -> None:
    model = crossing_model(kind, attention, cross)
    gates = [module for module in model.modules() if isinstance(module, Gates)]
    assert {module.pooling for module in gates} == {"token"}
    names = {name for module in gates for name in module.names}
    own = {"adapter", "prefix", "lora_query", "lora_value"}
    assert names == own | ({f"cross.{name}" for name in own - {"adapter"}} if cross else set())
    source: dict[str, Tensor] = {}
    if cross:
        states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).repeat(TOKENS, 1, 1)
        source = {"encoder_hidden_states": states, "encoder_attention_mask": (torch.arange(7) < 5).long()[None]}
        source["encoder_attention_mask"] = source["encoder_attention_mask"].repeat(TOKENS, 1)
    ids, other = random_ids(1).repeat(TOKENS, 1), random_ids(1, seed=4)
    changed = torch.where(torch.eye(TOKENS, dtype=torch.bool), other, ids)
    inputs = watch_inputs(gated_attentions(model))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False, **source).logits
        for call in attention_calls:
            module = call["module"]
            gate = gate_of(added_at(module), "prefix", inputs[module])
            allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            if call["key"].shape[2] == 7:
                allowed = source["encoder_attention_mask"][:, None, None].bool()
            torch.testing.assert_close(call["output"], by_hand(call, gate, allowed), atol=1e-5, rtol=1e-5)
        assert len(attention_calls) == len(inputs) == DEPTH * (1 + cross)
        change = (model(input_ids=changed, use_cache=False, **source).logits - whole).abs().amax(-1)
        assert future(change) <= 1e-6
        assert change[0, -1] > 1e-4
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cross else DynamicCache()
        parts = []
        for start in range(0, TOKENS, 3):
            piece = {"input_ids": ids[:, start : start + 3], "attention_mask": torch.ones(TOKENS, start + 3).long()}
            parts.append(model(**piece, **source, **{CACHE: cache}, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
        if cross:
            # what the source says matters, and what is masked in it does not
            for place, matters in ((0, True), (6, False)):
                states = source["encoder_hidden_states"].clone()
                states[:, place] += 1.0
                moved = model(input_ids=ids, use_cache=False, **{**source, "encoder_hidden_states": states}).logits
                assert ((moved - whole).abs().max() > 1e-4) == matters
        for module in gates:
            module.pooling = "mean"
        seen = (
            (
                model(input_ids=changed, use_cache=False, **source).logits
                - model(input_ids=ids, use_cache=False, **source).logits
            )
            .abs()
            .amax(-1)
        )
        assert future(seen) > 1e-5
        batch = {name: tensor[:2] for name, tensor in source.items()}
    for module in gates:
        module.pooling = "token"
    start_ids, texts = random_ids(2, 4), []
    for cached in (True, False):
        options: dict[str, Any] = {**batch, "use_cache": cached}
        if cross and cached:  # generate would make BERT a cache that has no place for the source
            options[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        texts.append(
            generated(model, {"input_ids": start_ids, "attention_mask": torch.ones_like(start_ids)}, **options)
        )
    assert torch.equal(texts[0], texts[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    futures, gaps = [], []
    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            model = make(family, attention)
            futures.append((influence(family, model, "none")[-1, 0].item(), family, attention))
            gaps += [(cached_gap(family, model, "none", piece), family, attention) for piece in (1, 3)]
    print("largest change of position 0's logits by the last token:", *max(futures))
    print("largest |cached - whole|, in units of the largest logit or 1:", *max(gaps))
