"""Gates, and nothing about what they scale.

Shapes: B examples, T tokens, D hidden size, G gates that read the same input.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from unipelt.config import GateConfig

INITIAL_STD = 0.02
"""Standard deviation of every normal start, as in the authors' release: gates begin near 0.5."""


class Slot:
    """One tensor on its way from the module that computes it to the one that uses it, within a pass of a layer.

    Attention is the one place that sees the layer's mask and input on every pass, the recomputation of gradient
    checkpointing included, so what depends on them is put here there and taken where it is used. Each thread has its
    own: a model may serve several at once, and the replicas of `nn.DataParallel` share this object. (A model of which
    a part alone is compiled serves one at a time.)
    """

    def __init__(self) -> None:
        self._values: dict[int, Tensor | None] = {}

    def put(self, value: Tensor | None) -> None:
        """Leave a value for `take` in the same thread."""
        self._values[_thread()] = value

    def take(self) -> Tensor | None:
        """The value that was put, once. Raises `KeyError` outside a pass of the layer."""
        thread = _thread()
        if thread not in self._values and self._values:
            # of attention and what uses its values, one is compiled and the other is not
            thread = next(iter(self._values))
        return self._values.pop(thread)

    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._values

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy is empty


def _thread() -> int:
    # torch.compile traces one thread and cannot ask which
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Gates(nn.Module):
    """The gates that read one input.

    Where attention looks both ways, a gate is one number an example (paper, section 3.2):

        g = sum_t m_t sigmoid(w x_t + b)

    `m` are the token weights: 1 / (number of real tokens) on real tokens under `masked_mean`, 1 / T under `mean`.
    Where it is causal, such an average would see the future, and a gate is one number a token:

        g_t = sigmoid(w x_t + b)

    Attributes:
        names: the name of each gate, in the order of the rows.
        weight: (G, D), one row a gate.
        bias: (G,).
        pooling: `masked_mean`, `mean`, or `token` for a number a token.
    """

    def __init__(self, hidden: int, names: tuple[str, ...], config: GateConfig, like: Tensor, *, causal: bool) -> None:
        super().__init__()
        self.names = names
        self.pooling: str = "token" if causal else config.pooling
        self.weight = nn.Parameter(torch.empty(len(names), hidden, dtype=like.dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros(len(names), dtype=like.dtype, device=like.device))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, logits: Tensor, weights: Tensor | None) -> Tensor:
        """Gate values.

        Args:
            logits: `W x + b`, (B, T, G); with a number a token, of any shape (..., G). They are the reader's to
                compute, since what reads the same x takes part in the same product (`product`).
            weights: (B, T) token weights that sum to 1 over an example, or None for the mean over all tokens.

        Returns:
            (B, 1, G), or (..., G) with a number a token; each in (0, 1).
        """
        open_ = torch.sigmoid(logits)
        if self.pooling == "token":
            return open_
        if weights is None:
            return open_.mean(dim=1, keepdim=True)
        return torch.bmm(once(weights, open_.dtype, partial(weights.to, open_.dtype)).unsqueeze(1), open_)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{', '.join(self.names)}; pooling={self.pooling}"


def product(
    x: Tensor, gates: Gates, others: Sequence[Tensor] = (), bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One product for all that reads the same x: each has few rows, and x is read once instead of once for each.

    Args:
        x: (..., D).
        gates: the gates that read x.
        others: what else reads it, each (R_i, D); R is the sum.
        bias: (R,), or None for none.

    Returns:
        The gates' logits, (..., G), and the others' `W x + b`, (..., R).
    """
    if not others:
        logits = nn.functional.linear(x, gates.weight, gates.bias)
        return logits, logits[..., len(gates.names) :]
    weight = torch.cat([gates.weight, *others])
    count, rest = len(gates.names), len(weight) - len(gates.names)
    all_bias = nn.functional.pad(gates.bias, (0, rest)) if bias is None else torch.cat([gates.bias, bias])
    logits, low = nn.functional.linear(x, weight, all_bias).split((count, rest), dim=-1)
    return logits, low


def once(tensor: Tensor, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` derives from a tensor (without gradients), made once for all layers that are given that tensor.

    It is kept with the tensor, and made again if the tensor was changed in place.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or tensor.is_inference():
        return make()  # a compiler sees the repetition itself; inference tensors can neither be followed nor train
    made: dict[Hashable, tuple[int, Tensor]] = vars(tensor).setdefault("unipelt", {})
    version = tensor._version
    if name not in made or made[name][0] != version:
        made[name] = (version, make())
    return made[name][1]


def token_weights(attention_mask: Tensor | None, batch: int) -> Tensor | None:
    """Weights of the masked mean, from the mask that a layer's attention is given.

    A token is real if any query may attend to it, so that padding masks of every form (2-D, 4-D boolean, 4-D
    additive) and masks of the caller's own give the same answer.

    Args:
        attention_mask: None, (B, T) or (B or 1, heads or 1, queries or 1, T); boolean or integer masks mark real
            tokens, floating-point masks are added to the logits.
        batch: B.

    Returns:
        (B, T) float32 weights that sum to 1 over an example, or None where every token is real.

    Raises:
        ValueError: the mask is not a tensor (flex attention's block masks).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"gates that average over a text cannot read a {type(attention_mask).__name__} (flex attention); "
            "call model.set_attn_implementation('sdpa')"
        )
    return once(attention_mask, ("token weights", batch), lambda: _token_weights(attention_mask, batch))


def _token_weights(mask: Tensor, batch: int) -> Tensor:
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    real = mask.bool() if mask.dim() == 2 else mask.bool().flatten(1, 2).any(dim=1)
    real = real.float()
    weights = real / real.sum(dim=1, keepdim=True).clamp_min(1.0)
    return weights if weights.shape[0] == batch else weights.expand(batch, -1)
