"""A cache is known by its type and its name; a prompt or a prefix beside another is refused, not wrong."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_batch, tiny_model
from transformers import DynamicCache

import unipelt
from unipelt.injection.attention_hooks import attend
from unipelt.injection.caches import _PREFIXES, CACHE_NAMES, find_cache
from unipelt.submodules.prefix import PrefixNetwork

IDS = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 12]])
PROMPT = {"preset": "prompt", "prompt": {"length": 3}}
PREFIX = {"preset": "prefix", "prefix": {"length": 3, "hidden": 8}}


def cache_name(model: Any) -> str:
    """The name that this version of Transformers takes a cache by."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in taken)


def made(family: str, method: dict[str, Any]) -> Any:
    model = unipelt.inject(tiny_model(family), method)
    shake(model, std=0.3)
    return model


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_neox"])
def test_a_cache_changes_no_token(family: str, method: dict[str, Any], gate: bool) -> None:
    name = method["preset"]
    model = made(family, {**method, name: {**method[name], "gate": gate}, "gate": {"pooling": "static"}})
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = [model.generate(input_ids=IDS, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name(name: str) -> None:
    cache = DynamicCache()
    assert find_cache({"input_ids": IDS, name: cache}) is cache
    assert find_cache({"input_ids": IDS, name: None}) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"past": DynamicCache()}, "a cache was given as past, a name that"),
        ({"past_key_values": ((IDS, IDS),)}, "past_key_values is a tuple, and not a Cache"),
        ({"cache": object()}, "cache is a object, and not a Cache"),
    ],
)
def test_what_is_not_understood_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_cache(given)
    model = made("llama", PROMPT)
    with pytest.raises(ValueError, match=words.partition(" is a ")[2] or words):
        model(input_ids=IDS, **{cache_name(model) if name in CACHE_NAMES else name: it for name, it in given.items()})


def test_a_cache_without_the_prompt_is_refused() -> None:
    model = made("llama", PROMPT)
    with unipelt.disable(model):
        cache: Any = model(input_ids=IDS[:, :2], use_cache=True)[1]
    with pytest.raises(ValueError, match="the cache holds 2 tokens, fewer than the prompt's 3"):
        model(input_ids=IDS[:, 2:], **{cache_name(model): cache})


def test_an_attention_that_fills_a_cache_by_itself_takes_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of continuous batching do."""
    model = made("llama", PREFIX)
    attention = model.model.layers[0].self_attn
    before = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setitem(inspect.unwrap(before).__globals__, "ALL_ATTENTION_FUNCTIONS", Paged())
            return before(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match="cache is a object, and not a Cache"):
        model(input_ids=IDS)


class Paged:
    """An interface that hands a cache of its own to the attention function."""

    def get_interface(self, name: str, default: Any) -> Any:
        return lambda *args, **kwargs: attend(*args, **{**kwargs, "cache": object()})

    def __getitem__(self, name: str) -> Any:  # so Transformers 5.0 asks
        return self.get_interface(name, None)


# Prefixes that are computed once for a cache


def count_networks(model: Any) -> list[int]:
    """Grows by one whenever a prefix network of the model computes."""
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, PrefixNetwork):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("family", "networks"), [("llama", 1), ("gpt2", 1), ("bart", 3)])
def test_a_prefix_is_computed_once_for_a_cache(family: str, networks: int) -> None:
    model = made(family, PREFIX)
    calls = count_networks(model)
    options = {"attention_mask": torch.ones_like(IDS), "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    got = model.generate(input_ids=IDS, **options)
    assert len(calls) <= 2 * networks  # the first pass of a decoder may have made its cache itself
    calls.clear()
    assert torch.equal(model.generate(input_ids=IDS, use_cache=False, **options), got)
    assert len(calls) > 7
    calls.clear()
    with torch.no_grad():
        model(**tiny_batch(family))
        model(**tiny_batch(family))
    assert len(calls) == 2 * networks


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=True, **{cache_name(model): cache}).logits
    return logits


@pytest.mark.parametrize("change", ["in place", "other tensor", "loaded", "other precision"])
def test_a_changed_prefix_is_computed_anew(change: str) -> None:
    model, cache = made("llama", PREFIX), DynamicCache()
    calls = count_networks(model)
    with torch.no_grad():
        step(model, cache, IDS)
        step(model, cache, IDS[:, :1])
        assert len(calls) == 1
        network = next(module for module in model.modules() if isinstance(module, PrefixNetwork))
        if change == "in place":
            network.w1.weight.mul_(-2)
        elif change == "other tensor":
            network.w1.weight.data = -2 * network.w1.weight
        elif change == "loaded":
            model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
        else:
            model.to(torch.bfloat16)
            layers: Any = cache.layers
            for layer in layers:
                layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
        step(model, cache, IDS[:, :1])
    assert len(calls) == 2


def test_an_emptied_cache_keeps_no_prefix() -> None:
    model, cache = made("llama", PREFIX), DynamicCache()
    calls = count_networks(model)
    with torch.no_grad():
        want = step(model, cache, IDS)
        cache.crop(-IDS.shape[1])
        model.get_parameter(next(name for name, _ in model.named_parameters() if "w1.weight" in name)).data.mul_(-2)
        got = step(model, cache, IDS)
    assert len(calls) == 2
    assert not torch.allclose(got, want)


def test_gradients_reach_a_prefix_beside_a_cache() -> None:
    model, cache = made("llama", PREFIX), DynamicCache()
    with torch.no_grad():
        step(model, cache, IDS)
    step(model, cache, IDS[:, :1]).sum().backward()
    network = next(module for module in model.modules() if isinstance(module, PrefixNetwork))
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_models_do_not_share_what_a_cache_keeps() -> None:
    one, cache = made("llama", PREFIX), DynamicCache()
    other = copy.deepcopy(one)
    shake(other, seed=9, std=0.3)
    with torch.no_grad():
        step(one, cache, IDS)
        filled = copy.deepcopy(cache)
        want = step(other, filled, IDS[:, :1])
        got = step(other, cache, IDS[:, :1])
    assert torch.equal(got, want)


def test_what_is_kept_is_gone_with_the_cache() -> None:
    model, cache = made("llama", PREFIX), DynamicCache()
    with torch.inference_mode():
        step(model, cache, IDS)
    before = len(_PREFIXES)
    del cache
    gc.collect()
    assert len(_PREFIXES) == before - 1
