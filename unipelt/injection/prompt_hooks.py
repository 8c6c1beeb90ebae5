"""The prompt before a model's text: hooks that add the prompt, and hooks that remove its states from the output.

Shapes: B examples, T tokens of the text, L vectors of the prompt, E width of an embedding, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from unipelt.injection.caches import find_cache
from unipelt.injection.hooks import hook
from unipelt.submodules.forward_pass import PassFacts, replace_arguments
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.room import ROOM, Room


@hook("enter")
def enter_prompt(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put the prompt before the embedded text, (B, T, E) to (B, L + T, E), unless a cache already holds the prompt.

    Mask and positions count the prompt in both cases. Raises `ValueError` for a cache or a mask that does not fit.
    """
    room: Room = model._modules[ROOM]
    held = room.present(room.active)
    prompt: Prompt | None = None if held is None else held._modules.get("prompt")
    if prompt is None:
        return None
    given = {**dict(zip(prompt.inputs, args, strict=False)), **kwargs}
    cache = find_cache(given)
    mask = given.get("attention_mask")
    if getattr(cache, "is_compileable", False):
        raise ValueError("a prompt makes a text longer than a static cache expects; generate with a dynamic cache")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError("a model with a prompt takes an attention_mask of (examples, tokens), or none")
    length = len(prompt.embedding)
    held_tokens = 0 if cache is None else int(cache.get_seq_length())
    begun = held_tokens > 0
    if begun and held_tokens < length:
        raise ValueError(
            f"the cache holds {held_tokens} tokens, fewer than the prompt's {length}, so it was not filled by this "
            "model with its prompt"
        )
    if mask is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
    for name in ("position_ids", "cache_position"):
        if given.get(name) is not None:
            given[name] = _shifted(given[name], length, begun)
    tokens = 0
    if not begun:
        text = given.get("inputs_embeds")
        text = model.get_input_embeddings()(given["input_ids"]) if text is None else text
        own = None if mask is None else given["attention_mask"][:, length:]
        longer = torch.cat([prompt(text, own).expand(len(text), -1, -1), text], dim=1)
        given |= {"input_ids": None, "inputs_embeds": longer}
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = nn.functional.pad(given["token_type_ids"], (length, 0))
        if given.get("seq_len") is not None:  # before Transformers 5.1, ModernBERT's heads pass the text's length
            given["seq_len"] = given["seq_len"] + length
        tokens = longer.shape[1]
    held_arguments = prompt.passes.enter(PassFacts(), replace_arguments(args, ()))
    now = prompt.passes.current()
    assert now is not None
    now.tokens = tokens
    return held_arguments, given


@hook("output")
def leave_prompt(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Remove the prompt's states from the output of the module that embeds the text, and of the stack's owner."""
    room: Room = module.unipelt_prompt[0]
    held = room.present(room.active)
    prompt: Prompt | None = None if held is None else held._modules.get("prompt")
    if prompt is None:
        return output
    now = prompt.passes.current()
    if now is None:
        raise RuntimeError(f"{type(module).__name__} was called by itself, and so without the prompt before its text")
    return output if not now.tokens else _cut(output, now.tokens, len(prompt.embedding))


@hook("leave")
def end_prompt(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """End the pass of the module that embeds the text."""
    room: Room = model._modules[ROOM]
    for held in room._modules.values():
        if held is not None and "prompt" in held._modules:
            prompt: Any = held._modules["prompt"]
            prompt.passes.leave()


def _shifted(positions: Tensor, length: int, begun: bool) -> Tensor:
    """Shift the positions of a text, (..., T), by L: (..., T), or (..., L + T) with the prompt's positions in front."""
    if begun:
        return positions + length
    own = torch.arange(length, device=positions.device, dtype=positions.dtype)
    return torch.cat([own.expand(*positions.shape[:-1], length), positions + length], dim=-1)


def _cut(output: Any, tokens: int, length: int) -> Any:
    """Remove the first `length` rows of all states (B, tokens, D) in an output; attention weights do not change."""
    if isinstance(output, Tensor):
        return output[:, length:] if output.dim() == 3 and output.shape[1] == tokens else output
    if isinstance(output, ModelOutput):
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = _cut(output[name], tokens, length)
        return output
    if isinstance(output, tuple):
        return tuple(_cut(part, tokens, length) for part in output)
    return output
