"""Learned vectors in front of the embedded text.

Shapes: B examples, T tokens of the text, L vectors of the prompt, E width of an embedding, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from unipelt.config.methods import PromptConfig
from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import Gates, product, token_weights


class Prompt(nn.Module):
    """`[P; E(text)]`: L learned vectors before the embedded text (prompt tuning; Lester et al., 2021, section 2).

    P starts at the embeddings of random tokens of the vocabulary (section 3.2 there). The prompt is never masked, and
    positions count from its first vector on, so the text's are shifted by L, as in PEFT; its token type is 0. What
    comes out are the text's states alone: heads and poolers read the same tokens as without a prompt.

    With a gate it is `[g P; E(text)]`, g one number an example, over the embedded text alone (the prompt's vectors take
    no part):

        g = sum_t m_t sigmoid(w e_t + b)

    A closed gate leaves vectors of zeros, which still take attention, as the paper's prefix does (footnote 3). Where
    attention is causal the text's mean would see the future, so that a gate is static there: g = sigmoid(b).

    Attributes:
        embedding: (L, E), P.
        gates: the gate, or None.
        inputs: what the model's forward calls its positional arguments.
        lengths: bring what the model computes on, (B, L + T, E), from its entry to those that cut L rows off again.
    """

    def __init__(self, model: Any, config: PromptConfig, lengths: tuple[Slot, ...], gates: Gates | None) -> None:
        super().__init__()
        table: nn.Module = model.get_input_embeddings()
        weight: Any = table.weight
        with torch.no_grad():
            rows = torch.randint(len(weight), (config.length,)).to(weight.device)
            self.embedding = nn.Parameter(table(rows).clone())
        self.gates = gates
        self.inputs = tuple(inspect.signature(model.forward).parameters)
        self.lengths = lengths

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """What is put in front, (B or 1, L, E).

        Args:
            text: (B, T, E), embedded.
            mask: (B, T), 0 at padding, or None where there is none.
        """
        gates = self.gates
        if gates is None:
            return self.embedding.to(text.dtype).unsqueeze(0)
        pooled = gates.pooling in ("masked_mean", "text")
        weights = token_weights(mask.bool(), len(text)) if pooled and mask is not None else None
        logits, _ = product(text.to(gates.bias.dtype), gates, weights=weights)
        return (gates(logits, weights) * self.embedding).to(text.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.embedding)} tokens"


def embeds_text(module: Any) -> bool:
    """Whether a module embeds a text itself, and takes one that is embedded already."""
    named = inspect.signature(module.forward).parameters
    return {"inputs_embeds", "attention_mask"} <= named.keys() and hasattr(module, "get_input_embeddings")


def enter_prompt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of what embeds the text: put the prompt in front; only make room where a cache has it."""
    prompt: Prompt = model.prompt
    given = {**dict(zip(prompt.inputs, args, strict=False)), **kwargs}
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if getattr(cache, "is_compileable", False):
        raise ValueError("a prompt makes a text longer than a static cache expects; generate with a dynamic cache")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError("a model with a prompt takes an attention_mask of (examples, tokens), or none")
    length = len(prompt.embedding)
    begun = cache is not None and cache.get_seq_length() > 0
    if mask is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
    for name in ("position_ids", "cache_position"):
        if given.get(name) is not None:
            given[name] = _shifted(given[name], length, begun)
    longer = None
    if not begun:
        text = given.get("inputs_embeds")
        text = model.get_input_embeddings()(given["input_ids"]) if text is None else text
        own = None if mask is None else given["attention_mask"][:, length:]
        longer = torch.cat([prompt(text, own).expand(len(text), -1, -1), text], dim=1)
        given |= {"input_ids": None, "inputs_embeds": longer}
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = nn.functional.pad(given["token_type_ids"], (length, 0))
        if given.get("seq_len") is not None:  # ModernBERT's heads count the text before Transformers 5.1
            given["seq_len"] = given["seq_len"] + length
    for slot in prompt.lengths:
        slot.put(longer)
    return (), given


def leave_prompt(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of what embeds the text, and of what owns the layers: the states of the text alone."""
    slot: Slot = module.unipelt_prompt
    if slot.is_empty():
        raise RuntimeError(f"{type(module).__name__} was called by itself, and so without the prompt before its text")
    longer = slot.take()
    return output if longer is None else _cut(output, longer.shape[1], module.unipelt_prompt_length)


def _shifted(positions: Tensor, length: int, begun: bool) -> Tensor:
    """Positions of a text, (..., T), behind a prompt: (..., T), or (..., L + T) with its own."""
    if begun:
        return positions + length
    own = torch.arange(length, device=positions.device, dtype=positions.dtype)
    return torch.cat([own.expand(*positions.shape[:-1], length), positions + length], dim=-1)


def _cut(output: Any, tokens: int, length: int) -> Any:
    """Without the first rows, wherever states (B, tokens, D) stand in an output; attention weights stay whole."""
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
