"""A cache is known by its type and its name; a prompt or a prefix beside another is refused, not wrong."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_model
from transformers import DynamicCache

import unipelt
from unipelt.injection.attention_hooks import attend
from unipelt.injection.caches import CACHE_NAMES, find_cache

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
