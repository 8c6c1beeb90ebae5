"""LayerNorm tuning: a trained copy of a norm beside the frozen norm.

Shapes: B examples, T tokens, D width of the states.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from unipelt.config.further import LNTuningConfig
from unipelt.submodules.register import TargetInfo, register_submodule


class LNTuning(nn.Module):
    """LayerNorm tuning as a term: `LN(x) + g (LN'(x) - LN(x))` (Qi et al., 2022; Zhao et al., 2023).

    `LN` is the frozen norm of the host and `LN'` a copy of it whose weight and bias train, so each norm is computed
    twice. Without a gate the output is `LN'(x)`, as if the norm itself trained. With a gate the output lies between the
    two norms. The copy starts as the norm, so the term starts at zero. The copy has the host's class, so every kind of
    norm works: LayerNorm, RMSNorm, and norms that add 1 to their weight.

    Attributes:
        norm: the copy, with a weight (D,) and, if the host has one, a bias (D,).
    """

    def __init__(self, config: LNTuningConfig, spot: TargetInfo) -> None:
        super().__init__()
        self.norm = _copy(spot.host, spot.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, D), for the norm's input x and its output y."""
        update: Tensor = self.norm(x) - y
        return update

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight (D,) and the bias (D,) or None that take the place of the host's."""
        own: Any = self.norm
        return own.weight.detach().to(weight), None if bias is None else own.bias.detach().to(bias)


def _copy(norm: Any, like: Tensor) -> nn.Module:
    """Return a copy of a norm with parameters of its own, in the type and on the device of `like`.

    Hooks, and what this package or accelerate keeps on the norm, are left out.
    """
    made: Any = nn.Module.__new__(type(norm))
    nn.Module.__init__(made)
    for name, value in vars(norm).items():
        if name not in vars(made) and not name.startswith(("unipelt_", "_hf_", "_old_")) and name != "forward":
            setattr(made, name, value)
    for name, buffer in norm._buffers.items():
        made.register_buffer(name, None if buffer is None else buffer.detach().clone())
    for name, parameter in norm._parameters.items():
        made.register_parameter(name, None if parameter is None else nn.Parameter(_start(parameter.detach(), like)))
    return made


def _start(value: Tensor, like: Tensor) -> Tensor:
    """Return the initial value of a parameter: a copy, or an empty tensor for a value that is not in memory."""
    if value.is_meta or like.is_meta:
        return like.new_empty(value.shape)
    return value.to(like.device, like.dtype, copy=True)


register_submodule("ln_tuning", LNTuningConfig, LNTuning)
