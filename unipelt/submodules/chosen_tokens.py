"""The first and the last real tokens of a text, for terms that edit only these.

Shapes: B examples, T tokens of the pass, S tokens that the attention sees: those of the cache, and then the T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipelt.submodules.forward_pass import UNSEEN, AttentionPass


@dataclass(frozen=True)
class ChosenTokens:
    """The choice of a text's tokens, without padding.

    Attributes:
        first: the number of tokens at the start of the text.
        last: the number of tokens at the end of the text.
    """

    first: int
    last: int

    def mask(self, now: AttentionPass, x: Tensor) -> Tensor:
        """Return a mask with 1 for a chosen token and 0 for any other, (B, T, 1), in the type of x (B, T, D).

        The mask of the attention tells real tokens from padding, on either side. Tokens in the cache count, so a pass
        with a cache chooses the same tokens as a pass over the whole text.

        Raises:
            RuntimeError: the attention was not called before.
            ValueError: the cache does not tell where the text begins or ends.
        """
        if now.mask is UNSEEN:
            raise RuntimeError("a term edits chosen tokens, and the layer's attention was not called before it")
        if now.cached is None:
            raise ValueError(
                "a static cache does not tell how many tokens it holds; generate with a dynamic cache, or take "
                "reft.positions: all"
            )
        if now.cached and self.last:
            raise ValueError(
                f"the last {self.last} tokens of a text are edited, and with a cache the text still grows; call the "
                "model with use_cache=False, or take reft.last: 0"
            )
        batch, tokens = x.shape[:2]
        if now.weights is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
            before: Tensor | int = now.cached
        else:
            seen = now.weights.shape[1]
            if seen - tokens < min(now.cached, self.first):
                raise ValueError(
                    f"this attention sees {seen - tokens} of {now.cached} tokens in the cache, fewer than the first "
                    f"{self.first} that are edited; take a smaller reft.first"
                )
            real = now.weights > 0
            before = real[:, : seen - tokens].sum(dim=1, keepdim=True)
            real = real[:, seen - tokens :]
        index = before + real.cumsum(dim=1) - 1
        chosen = index < self.first
        if self.last:
            chosen = chosen | (index >= real.sum(dim=1, keepdim=True) - self.last)
        return (chosen & real).to(x.dtype).unsqueeze(-1)
