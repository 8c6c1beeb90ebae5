"""ReFT: low-rank edits of the states at the end of a layer.

Shapes: B examples, T tokens, D width of the states, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unipelt.config.further import ReFTConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.chosen_tokens import ChosenTokens
from unipelt.submodules.register import TargetInfo, register_submodule


class ReFT(nn.Module):
    """An edit of a layer's output h at the chosen tokens (Wu et al., 2024, arXiv 2404.03592).

    Attributes:
        reads_output: whether the term and its gate read the output of the layer, and not its input.
        chosen_tokens: the edited tokens; None for all tokens.
    """

    reads_output = True

    def __init__(self, config: ReFTConfig, spot: TargetInfo) -> None:
        super().__init__()
        if config.rank > spot.outputs:
            raise ConfigError(f"reft.rank must be at most the width of the states, {spot.outputs}, not {config.rank}")
        self.chosen_tokens = None if config.positions == "all" else ChosenTokens(config.first, config.last)


class LoReFT(ReFT):
    """LoReFT: `h + R^T (W h + b - R h)` (equation 2). With a gate, `h + g R^T (W h + b - R h)`.

    The rows of R are orthonormal. They are computed from a free parameter by a QR decomposition in every pass. The
    edit is zero at the start, because W starts as R and b as zero.

    Attributes:
        basis: (r, D), the free parameter of R.
        weight: (r, D), W.
        bias: (r,), b.
    """

    def __init__(self, config: ReFTConfig, spot: TargetInfo) -> None:
        super().__init__(config, spot)
        self.basis = nn.Parameter(_random(config.rank, spot))
        with torch.no_grad():
            self.weight = nn.Parameter(orthonormal_rows(self.basis).to(spot.weight.dtype, copy=True))
        self.bias = nn.Parameter(spot.weight.new_zeros(config.rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, D), for the states x = y."""
        rows = orthonormal_rows(self.basis).to(self.weight.dtype)
        return nn.functional.linear(x, self.weight - rows, self.bias) @ rows


class DiReFT(ReFT):
    """DiReFT: `h + W2^T (W1 h + b)` (equation 3). With a gate, `h + g W2^T (W1 h + b)`.

    The edit is zero at the start, because W2 starts at zero.

    Attributes:
        down: (r, D), W1, with orthonormal rows at the start.
        up: (r, D), W2.
        bias: (r,), b.
    """

    def __init__(self, config: ReFTConfig, spot: TargetInfo) -> None:
        super().__init__(config, spot)
        self.down = nn.Parameter(_random(config.rank, spot))
        self.up = nn.Parameter(spot.weight.new_zeros(config.rank, spot.outputs))
        self.bias = nn.Parameter(spot.weight.new_zeros(config.rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, D), for the states x = y."""
        return nn.functional.linear(x, self.down, self.bias) @ self.up


def orthonormal_rows(basis: Tensor) -> Tensor:
    """Return R, (r, D), whose rows are orthonormal and span the rows of `basis`, (r, D).

    R is the transposed Q of the QR decomposition of the transposed basis, with the signs for which the diagonal of the
    triangular factor is positive. So R is a smooth function of the basis, and every R has a basis: R itself.
    """
    exact = torch.promote_types(basis.dtype, torch.float32)
    q, triangular = torch.linalg.qr(basis.to(exact).t())
    diagonal = triangular.diagonal(dim1=-2, dim2=-1)
    return (q * torch.where(diagonal < 0, -1.0, 1.0).to(exact)).t()


def _random(rank: int, spot: TargetInfo) -> Tensor:
    """Return random orthonormal rows, (r, D)."""
    like = spot.weight
    start = torch.empty(rank, spot.outputs, dtype=torch.float32, device=like.device)
    if not like.is_meta:
        nn.init.orthogonal_(start)
    return start.to(like.dtype)


def build_reft(config: ReFTConfig, spot: TargetInfo) -> ReFT:
    """Return the edit of a configuration's variant."""
    return (LoReFT if config.variant == "loreft" else DiReFT)(config, spot)


register_submodule("reft", ReFTConfig, build_reft)
