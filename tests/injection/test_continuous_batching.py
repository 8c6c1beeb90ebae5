"""Continuous batching of Transformers: each request gets the tokens that `generate` gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import shake
from tiny import tiny_model
from transformers import GenerationConfig

import unipelt

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"),
    reason="continuous batching of this version of Transformers asks a GPU for its memory",
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
PREFIX: dict[str, Any] = {"length": 4, "hidden": 10}
METHODS: dict[str, Any] = {
    "own softmax": {"preset": "unipelt-apl", "prefix": {**PREFIX, "softmax": "own"}},
    "unipelt-al": "unipelt-al",
}
OPTIONS = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=59)


def generate_batch(model: Any) -> list[Any]:
    """The answers in the order of the prompts; the cache is small, or it would take most of the memory."""
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    answers = model.generate_batch(PROMPTS, generation_config=OPTIONS, continuous_batching_config=small)
    by_prompt = {tuple(answer.prompt_ids): answer for answer in answers.values()}
    return [by_prompt[tuple(ids)] for ids in PROMPTS]


def alone(model: Any) -> list[list[int]]:
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [model.generate(one, generation_config=OPTIONS)[0, one.shape[1] :].tolist() for one in ids]


def injected(method: Any) -> Any:
    model = unipelt.inject(tiny_model("llama"), method)
    shake(model)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_each_request_is_as_alone(method: str, attention: str) -> None:
    model = injected(METHODS[method])
    model.set_attn_implementation(attention)
    want = alone(model)
    with unipelt.disable(model):
        assert alone(model) != want
    assert [answer.generated_tokens for answer in generate_batch(model)] == want


@pytest.mark.parametrize("method", [{"preset": "prefix", "prefix": PREFIX}, "prompt"])
def test_what_would_enter_the_cache_is_refused(method: Any) -> None:
    for answer in generate_batch(injected(method)):
        assert not answer.generated_tokens
        assert "continuous batching" in answer.error
        assert "prefix.softmax: own" in answer.error
