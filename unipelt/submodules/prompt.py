"""Prompt tuning: learned vectors before the embedded text.

Shapes: B examples, T tokens of the text, L vectors of the prompt, E width of an embedding, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.parts import PromptConfig
from unipelt.submodules.entry import Entry, Part
from unipelt.submodules.forward_pass import Passes
from unipelt.submodules.tokens import token_weights


class Prompt(nn.Module):
    """`[P; E(text)]`: L learned vectors before the embedded text (prompt tuning; Lester et al., 2021, section 2).

    P starts at the embeddings of random tokens of the vocabulary (section 3.2 of that paper). The prompt is never
    masked. Positions count from the prompt's first vector, so the text's positions are shifted by L, as in PEFT. The
    prompt's token type is 0. The model returns the states of the text alone, so heads and poolers read the same tokens
    as without a prompt.

    With a gate the input is `[g P; E(text)]`. The gate g is one number per example, computed from the embedded text
    alone, without the prompt's vectors:

        g = sum_t m_t sigmoid(w e_t + b)

    A gate of 0 leaves vectors of zeros, which still take attention, as in the paper's prefix (footnote 3). In causal
    attention the mean over the text would include later tokens, so the gate must be static: g = sigmoid(b).

    Attributes:
        embedding: (L, E), P.
        entry: the module that computes the gate, or None.
        gate_name: the gate's name; empty without a gate.
        inputs: the names of the model's positional arguments.
        passes: the passes of the module that embeds the text.
    """

    folds_to = "constant"
    takes_attention = True

    def __init__(self, model: Any, config: PromptConfig, entry: Entry | None, like: Tensor) -> None:
        super().__init__()
        table: nn.Module = model.get_input_embeddings()
        weight: Any = table.weight
        if like.is_meta:
            self.embedding = nn.Parameter(like.new_empty(config.length, weight.shape[1]))
        else:
            with torch.no_grad():
                rows = torch.randint(len(weight), (config.length,)).to(weight.device)
                self.embedding = nn.Parameter(table(rows).to(like.dtype, copy=True))
        self.entry = entry
        self.gate_name = "" if entry is None else "prompt"
        self.inputs = tuple(inspect.signature(model.forward).parameters)
        self.passes = Passes()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the parameters."""
        return (Part("prompt.embedding", "prompt", "embedding"),)

    @torch.no_grad()
    def scale_by(self, constant: float) -> None:
        """Replace the gate by a constant, in place."""
        self.embedding.mul_(constant)
        self.entry, self.gate_name = None, ""

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Return the prompt's vectors, (B or 1, L, E).

        Args:
            text: (B, T, E), the embedded text.
            mask: (B, T), with 0 for padding, or None without a mask.
        """
        if self.entry is None:
            return self.embedding.to(text.dtype).unsqueeze(0)
        weights = token_weights(mask, len(text)) if self.entry.gates.averages else None
        gate, _ = self.entry(text, weights)
        return (gate * self.embedding).to(text.dtype)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{len(self.embedding)} tokens"


def embeds_text(module: Any) -> bool:
    """Return whether a module embeds its text and also accepts an embedded text (`inputs_embeds`)."""
    named = inspect.signature(module.forward).parameters
    return {"inputs_embeds", "attention_mask"} <= named.keys() and hasattr(module, "get_input_embeddings")
