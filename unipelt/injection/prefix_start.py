"""Start flat prefixes from the keys and values of a text.

Shapes: L prefix length, H key-value heads, d head size, W = H * d.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unipelt.files.messages import show
from unipelt.injection.disable import disable
from unipelt.injection.state import injection_of
from unipelt.submodules.prefix import Prefix
from unipelt.submodules.room import Port, layer_sets


def start_prefix_from(model: PreTrainedModel, tokenizer: Any, text: str) -> PreTrainedModel:
    """Set flat prefixes to the keys and values that the frozen model computes for a text, in place.

        unipelt.inject(model, {"preset": "prefix", "prefix": {"length": 6, "reparameterize": False}})
        unipelt.start_prefix_from(model, tokenizer, "Is this review positive or negative?")

    The model reads the first L tokens of the text once, as its base, in evaluation mode. L is the length of the prefix.
    Every prefix gets the keys and values of its attention, after rotary embeddings and norms of keys. In a decoder, a
    prefix without a gate is then as a text that was read before. But it does not shift the positions of the later
    text. In an encoder-decoder both stacks read the text; a prefix of cross-attention gets the encoder's states of it.

    The gates and all other parameters keep their values.

    Args:
        model: an injected model with flat prefixes (`prefix.reparameterize: false`).
        tokenizer: the tokenizer of the model. Special tokens are not added.
        text: a text of L tokens or more.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no flat prefix, the text has fewer than L tokens, or the attention computes its keys
            in a way that a prefix cannot start from. The model is unchanged.
    """
    prefixes = _flat_prefixes(model)
    length = prefixes[0][1].length
    if not isinstance(text, str):
        raise ValueError(f"text must be a text, not {show(text)}")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, and the prefix {length}; give a longer text, or inject with "
            f"prefix.length: {len(ids)}"
        )
    with _reading(model, [port for port, *_ in prefixes]):
        _read(model, torch.tensor([ids], device=model.device))
        starts = [_start(*found) for found in prefixes]
    with torch.no_grad():
        for (_, prefix, _), start in zip(prefixes, starts, strict=True):
            assert prefix.keys_values is not None
            prefix.keys_values.copy_(start)
    return model


def _flat_prefixes(model: PreTrainedModel) -> list[tuple[Port, Prefix, str]]:
    """Return (port of the attention, prefix, path of the layer) for every prefix, or raise `ValueError`."""
    injection = injection_of(model)
    if injection.config.prefix is None:
        raise ValueError(f"this {type(model).__name__} has no prefix; inject one with prefix.reparameterize: false")
    if injection.config.prefix.reparameterize:
        raise ValueError(
            "a network computes the prefixes of this model, and cannot start from given keys and values; inject the "
            "prefix with prefix.reparameterize: false"
        )
    if injection.folded is not None:
        raise ValueError("this model is folded, so its prefixes do not start anew")
    found: list[tuple[Port, Prefix, str]] = []
    for path, layer, part in layer_sets(model):
        if part.prefix is None:
            continue
        attention: Any = layer.get_submodule(part.wiring.attention)
        if part.wiring.lengthens:
            raise ValueError(
                f"{path} is outside Transformers' attention interface, so its keys and values cannot be read; the "
                "prefixes keep their start"
            )
        found.append((attention.unipelt_port, part.prefix, path))
    return found


@contextmanager
def _reading(model: PreTrainedModel, ports: list[Port]) -> Iterator[None]:
    """Let the ports collect keys and values inside the block; the model computes as its base, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for port in ports:
            port.seen = []
        model.eval()
        with disable(model), torch.no_grad():
            yield
    finally:
        for port in ports:
            port.seen = None
        for module, training in modes:
            module.training = training


def _read(model: PreTrainedModel, ids: Tensor) -> None:
    """Run the base model on token ids, (1, L); a decoder with an encoder reads the same ids."""
    base: Any = model.base_model
    accepted = inspect.signature(base.forward).parameters
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "use_cache": False}
    base(**{name: value for name, value in given.items() if name in accepted})


def _start(port: Port, prefix: Prefix, layer: str) -> Tensor:
    """Return the keys and values that an attention has computed, (2, L, W). Raises `ValueError` unless it has once."""
    assert port.seen is not None
    if len(port.seen) != 1:
        raise ValueError(
            f"the attention of {layer} was called {len(port.seen)} times for the text, and a prefix can start from one "
            "call only; the prefixes keep their start"
        )
    both = torch.stack(port.seen[0])[:, 0].transpose(1, 2).flatten(2)
    assert prefix.keys_values is not None
    if both.shape != prefix.keys_values.shape:
        raise ValueError(
            f"the keys of {layer} are {tuple(both.shape[1:])} for the text, and the prefix is "
            f"{tuple(prefix.keys_values.shape[1:])}; the prefixes keep their start"
        )
    return both
