"""Trained embeddings of single tokens: rows that stand in for rows of the frozen vocabulary.

Shapes: B examples, T tokens, E width of an embedding, n trained rows, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.submodules.entry import Part


class TokenRows(nn.Module):
    """The embeddings of n tokens, which train while the other V - n rows of the vocabulary stay frozen.

    They start at the rows of the base. Where the output head shares the weight of the embedding, the same rows give the
    logits of these tokens.

    Attributes:
        embedding: (n, E), the rows, in the order of the tokens' numbers.
        ids: (n,), the tokens' numbers, sorted.
    """

    ids: Tensor

    def __init__(self, table: Tensor, ids: Sequence[int], like: Tensor) -> None:
        super().__init__()
        numbers = torch.tensor(sorted(ids), device=like.device)
        if like.is_meta:
            rows = like.new_empty(len(ids), table.shape[1])
        else:
            rows = table.detach()[numbers.to(table.device)].to(like.device, like.dtype)  # a copy
        self.embedding = nn.Parameter(rows)
        self.register_buffer("ids", numbers, persistent=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the parameters."""
        return (Part("tokens.embedding", "tokens", "embedding"),)

    def embed(self, tokens: Tensor, embedded: Tensor, scale: Any) -> Tensor:
        """Return the embedded text with the trained rows in place of those of the base.

        Args:
            tokens: (B, T), the tokens' numbers.
            embedded: (B, T, E), the output of the embedding.
            scale: the factor by which the embedding multiplies its rows.
        """
        index = torch.searchsorted(self.ids, tokens.contiguous()).clamp(max=len(self.ids) - 1)
        own = nn.functional.embedding(index, self.embedding).to(embedded.dtype) * scale
        return torch.where((self.ids[index] == tokens).unsqueeze(-1), own.to(embedded.dtype), embedded)

    def logits(self, states: Tensor, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits with those of the trained tokens, `h e + b`, computed from the trained rows.

        Args:
            states: (..., E), the input of the output head.
            logits: (..., V), the output of the output head.
            bias: (V,), the head's bias, or None.
        """
        own = nn.functional.linear(states, self.embedding.to(states.dtype), None if bias is None else bias[self.ids])
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{len(self.embedding)} tokens"
