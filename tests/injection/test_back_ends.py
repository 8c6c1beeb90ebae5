"""Attention back-ends: a prefix beside the softmax of the text, and methods without a prefix, run with all of them.

Flex attention runs on a CPU. Flash attention does not, so a function of the same arguments is registered in its place:
it reads a mask (B, T) of truth values, as flash attention does, and refuses any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_batch, tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import unipelt

pytestmark = [
    # Transformers calls flex attention in a way that newer PyTorch deprecates
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning"),
]
FLASH = "a_flash_attention"
OWN: dict[str, Any] = {
    "preset": "unipelt-apl",
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10, "softmax": "own"},
    "lora": {"rank": 3},
}
METHODS: dict[str, Any] = {
    "own softmax": OWN,
    "own softmax, no gate": {"preset": "prefix", "prefix": {"length": 4, "hidden": 10, "softmax": "own"}},
    "unipelt-al": "unipelt-al",
    "lora": "lora",
}
CALLS: list[Any] = []


def flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention from a mask (B, T) or None and from `is_causal`, as flash attention does."""
    CALLS.append(attention_mask)
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    tokens, keys = query.shape[2], key.shape[2]
    mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool)
    said = kwargs.get("is_causal")
    if module.is_causal if said is None else said:
        mask = mask.tril(keys - tokens)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
    mask = mask | ~mask.any(-1, keepdim=True)  # a padded query; its output is not read
    repeat = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(repeat, dim=1) for one in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return out.transpose(1, 2), None


@pytest.fixture(autouse=True)
def flash_in_place() -> Iterator[None]:
    AttentionInterface.register(FLASH, flash)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    CALLS.clear()
    with torch.compiler.set_stance("force_eager"):  # to compile flex attention takes half a minute
        yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[FLASH]


def set_back_end(model: Any, name: str) -> None:
    for module in model.modules():  # Transformers would ask whether the model knows the stand-in
        if hasattr(module, "config") and not hasattr(module, "unipelt_port"):
            module.config._attn_implementation_internal = name


def injected(family: str, method: Any, head: str = "") -> Any:
    model = unipelt.inject(tiny_model(family, head), method)
    shake(model)
    return model.eval()


def real(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The numbers of real tokens, or of all texts."""
    mask = batch["attention_mask"].bool()
    return output[mask] if output.shape[:2] == mask.shape else output


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_flash_is_called_with_the_text_alone(method: str, family: str) -> None:
    model, batch = injected(family, METHODS[method]), tiny_batch(family)
    with torch.no_grad():
        want = real(model(**batch).logits, batch)
        set_back_end(model, FLASH)
        got = real(model(**batch).logits, batch)
    assert CALLS, "the back-end was called"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_its_gradients_are_those_of_sdpa(family: str) -> None:
    model, batch = injected(family, OWN), tiny_batch(family)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        real(model(**batch).logits, batch).pow(2).sum().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}

    want = gradients()
    set_back_end(model, FLASH)
    got = gradients()
    assert CALLS
    assert any("prefix" in name and value.abs().sum() for name, value in want.items())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_it_generates_with_a_cache() -> None:
    model, batch = injected("llama", OWN), tiny_batch("llama", left=True)
    want = model.generate(**batch, max_new_tokens=4, do_sample=False)
    set_back_end(model, FLASH)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), want)
    assert CALLS


@pytest.mark.parametrize(("family", "method"), [("bert", "own softmax"), ("llama", "own softmax"), ("llama", "lora")])
def test_flex_attention(family: str, method: str) -> None:
    model, batch = injected(family, METHODS[method]), tiny_batch(family)
    with torch.no_grad():
        want = real(model(**batch).logits, batch)
        model.set_attn_implementation("flex_attention")
        assert model.config._attn_implementation == "flex_attention"
        got = real(model(**batch).logits, batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("back_end", [FLASH, "flex_attention"])
def test_a_batch_of_several_tasks(back_end: str) -> None:
    tasks = unipelt.Tasks(tiny_model("bert"))
    for seed, method in enumerate(("own softmax", "unipelt-al", "own softmax, no gate")):
        shake(tasks.add(str(seed), METHODS[method]), seed=seed)
    batch, names = tiny_batch("bert"), ["2", "0", "1"]
    with torch.no_grad():
        want = tasks(**batch, tasks=names).logits
        for model in (tasks.model, tasks.shared, *(tasks[name] for name in tasks)):
            set_back_end(model, back_end)
        got = tasks(**batch, tasks=names).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert bool(CALLS) == (back_end == FLASH)


@pytest.mark.parametrize("back_end", [FLASH, "flex_attention", "flash_attention_2"])
def test_a_prefix_in_the_softmax_of_the_text_is_refused(back_end: str) -> None:
    model = tiny_model("llama")
    set_back_end(model, back_end)
    with pytest.raises(ValueError, match=rf"eager and sdpa, not '{back_end}'.*prefix.softmax: own"):
        unipelt.inject(model, "unipelt-apl")
    set_back_end(model, "sdpa")
    unipelt.inject(model, "unipelt-apl")
    set_back_end(model, back_end)
    with pytest.raises(ValueError, match=rf"eager and sdpa, not '{back_end}'"):
        model(**tiny_batch("llama"))


def test_an_unknown_back_end_is_refused() -> None:
    model = injected("llama", OWN)
    set_back_end(model, "nothing")
    with pytest.raises(ValueError, match="nothing"):
        model(**tiny_batch("llama"))
