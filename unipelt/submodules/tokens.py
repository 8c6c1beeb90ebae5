"""Weights of the real tokens of a text. The attention's mask tells real tokens from padding.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from unipelt.submodules.forward_pass import PassFacts

CLOSED = math.log(2.0**-149)
"""The exponential of a logit below this value is 0 in float32, so a token with such a mask gets no attention."""


def token_weights(
    mask: Any, batch: int, facts: PassFacts | None = None, *, truth_values: bool = False, added: bool = False
) -> Tensor | None:
    """Return the weights of the masked mean: 1 / (number of real tokens) on real tokens, 0 on padding.

    A token is real if at least one query may attend to the token. The attention's softmax follows the same rule. So a
    text has the same real tokens under every form and type of mask.

    Args:
        mask: None; or (B, T) of any type, with 0 for padding; or (B or 1, heads or 1, queries or 1, T); or a block
            mask of flex attention. A mask with 4 dimensions holds truth values or whole numbers, with 0 for a masked
            token, or floating-point numbers that are added to the logits.
        batch: B.
        facts: the facts of the pass. With them the weights are computed once per pass.
        truth_values: whether the attention reads a floating-point mask as truth values (DeBERTa).
        added: whether a floating-point mask with 2 dimensions is added to the logits (Longformer).

    Returns:
        (B, T) float32 weights that sum to 1 over each example; None if `mask` is None.

    Raises:
        ValueError: the mask has another form.
    """
    if mask is None:
        return None
    if facts is None:
        return _token_weights(mask, batch, truth_values, added)
    return facts.once(mask, ("token weights", batch), lambda: _token_weights(mask, batch, truth_values, added))


def _token_weights(mask: Any, batch: int, truth_values: bool, added: bool) -> Tensor:
    if not isinstance(mask, Tensor):
        mask = dense_mask(mask)
    in_logits = mask.is_floating_point() and (mask.dim() > 2 or added) and not truth_values
    open_ = mask > CLOSED if in_logits else mask != 0
    real = open_ if open_.dim() == 2 else open_.flatten(1, 2).any(dim=1)
    real = real.float()
    weights = real / real.sum(dim=1, keepdim=True).clamp_min(1.0)
    return weights if weights.shape[0] == batch else weights.expand(batch, -1)


def dense_mask(mask: Any) -> Tensor:
    """Return a block mask of flex attention as truth values, (B, heads, queries, T).

    Raises:
        ValueError: the mask has another form.
    """
    shape, function = getattr(mask, "shape", None), getattr(mask, "mask_mod", None)
    if shape is None or function is None:
        raise ValueError(
            f"gates that average over a text cannot read a mask of type {type(mask).__name__}; call "
            "model.set_attn_implementation('sdpa')"
        )
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, keys = shape
    return create_mask(function, batch, heads, queries, keys, device=mask.kv_num_blocks.device)
