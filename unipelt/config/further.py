"""Configurations of two further submodules: LayerNorm tuning and ReFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unipelt.config.methods import SUBMODULES, GateConfig, SubmoduleConfig
from unipelt.config.schema import ConfigError, check_fields
from unipelt.files.messages import show


@dataclass(frozen=True)
class LNTuningConfig(SubmoduleConfig):
    """LayerNorm tuning: the norms of each layer are trained (Qi et al., 2022; Zhao et al., 2023).

    The norms are those of the layers' states: their weight has the width of the states. Norms of queries and keys, and
    norms outside of the layers (after the embeddings, after the last layer), stay frozen.

    Attributes:
        places: `norm`, which stands for every norm of a layer's states.
    """

    places: tuple[Literal["norm"], ...] = ("norm",)

    def misfit(self, gates: GateConfig, *, causal: bool, generates: bool, norm_first: bool) -> str:
        """Refuse gates that a norm before the attention cannot have."""
        if not (self.gate and norm_first):
            return ""
        if gates.shared:
            return (
                "gate.shared: true computes the gates at the entry of the attention, and a norm of this model comes "
                "before the attention; take gate.shared: false, or ln_tuning.gate: false"
            )
        if not causal and gates.pooling in ("masked_mean", "mean"):
            return (
                f"gate.pooling: {gates.pooling} reads the mask of the attention, and a norm of this model comes before "
                "the attention; take gate.pooling: token or static, or ln_tuning.gate: false"
            )
        return ""


@dataclass(frozen=True)
class ReFTConfig(SubmoduleConfig):
    """ReFT: a low-rank edit of the states of some tokens at the end of a layer (Wu et al., 2024, arXiv 2404.03592).

    `layers` of the method chooses the layers.

    Attributes:
        places: `layer`, the output of the whole layer, which the next layer reads.
        rank: r, the number of dimensions that are edited. At most the width of the states.
        variant: `loreft` has a projection with orthonormal rows. `direft` has two free projections, and is cheaper.
        positions: `ends`: the first and the last real tokens of a text are edited. `all`: every token.
        first: p, the number of edited tokens at the start of the text, without padding. For `ends`.
        last: s, the number of edited tokens at the end of the text, without padding. For `ends`. A text with fewer than
            p + s tokens has each of its tokens edited once. A decoder that generates text refuses `last`, because the
            end of a text that still grows is not known.
    """

    places: tuple[Literal["layer"], ...] = ("layer",)
    rank: int = 4
    variant: Literal["loreft", "direft"] = "loreft"
    positions: Literal["ends", "all"] = "ends"
    first: int = 7
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "rank")
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {show(getattr(self, name))}")
        if self.positions == "ends" and not self.first + self.last:
            raise ConfigError("first and last are both 0, so no token is edited; raise one, or take positions: all")

    def misfit(self, gates: GateConfig, *, causal: bool, generates: bool, norm_first: bool) -> str:
        """Refuse the last tokens of a text that grows."""
        if causal and generates and self.positions == "ends" and self.last:
            return (
                f"reft.last: {self.last} edits the last tokens of a text, and the text of a model that generates still "
                "grows, so a pass cannot know them; take reft.last: 0 (decoder: false if this is an encoder-decoder), "
                "or reft.positions: all"
            )
        return ""


SUBMODULES.update({"ln_tuning": LNTuningConfig, "reft": ReFTConfig})
