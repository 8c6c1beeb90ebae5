"""Configurations of the further submodules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unipelt.config.gate import GateConfig
from unipelt.config.parts import Place
from unipelt.config.schema import ConfigError, check_fields
from unipelt.config.submodule import SUBMODULES, SubmoduleConfig
from unipelt.files.messages import show

Activation = Literal["relu", "gelu", "silu", "tanh"]


@dataclass(frozen=True)
class IA3Config(SubmoduleConfig):
    """(IA)3: learned factors of keys, values and the activations of the feed-forward network (Liu et al., 2022)."""

    places: tuple[Place, ...] = ("key", "value", "activation")


@dataclass(frozen=True)
class REDConfig(SubmoduleConfig):
    """RED: learned factors and shifts of the feed-forward network's output (Wu et al., 2024)."""

    places: tuple[Place, ...] = ("down",)


@dataclass(frozen=True)
class HoulsbyConfig(SubmoduleConfig):
    """Two bottleneck adapters per layer: after the attention and after the feed-forward network (Houlsby et al., 2019).

    Attributes:
        bottleneck: width of each bottleneck, in units.
        activation: the function between an adapter's two projections.
    """

    places: tuple[Place, ...] = ("attention", "down")
    bottleneck: int = 48
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "bottleneck")


@dataclass(frozen=True)
class ParallelConfig(SubmoduleConfig):
    """A scaled bottleneck adapter parallel to the feed-forward network (He et al., 2022).

    Attributes:
        bottleneck: width of the bottleneck (r in that paper), in units.
        scale: s, the factor of the adapter's output. The value 1 gives a parallel adapter without scale.
        activation: the function between the two projections.
    """

    places: tuple[Place, ...] = ("feed_forward",)
    bottleneck: int = 512
    scale: float = 4.0
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "bottleneck", "scale")


@dataclass(frozen=True)
class CompacterConfig(SubmoduleConfig):
    """Adapters whose weights are sums of Kronecker products (Karimi Mahabadi et al., 2021).

    Attributes:
        bottleneck: width of each bottleneck, in units.
        terms: n, the number of Kronecker products per weight. It must divide the bottleneck and the width of the place.
            All adapters of a stack share the n left factors, each (n, n).
        rank: rank of the right factors.
        activation: the function between an adapter's two projections.
    """

    places: tuple[Place, ...] = ("attention", "down")
    bottleneck: int = 24
    terms: int = 4
    rank: int = 1
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "bottleneck", "terms", "rank")
        if self.bottleneck % self.terms:
            raise ConfigError(f"terms must divide the bottleneck, {self.bottleneck}: {self.terms} does not")


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
        """Refuse the last tokens of a text that grows, and a gate from inside of the layer."""
        if self.gate and gates.shared:
            return (
                "gate.shared: true computes the gates inside of a layer, which gradient checkpointing computes again, "
                "and reft comes after the layer; take gate.shared: false, or reft.gate: false"
            )
        if causal and generates and self.positions == "ends" and self.last:
            return (
                f"reft.last: {self.last} edits the last tokens of a text, and the text of a model that generates still "
                "grows, so a pass cannot know them; take reft.last: 0 (decoder: false if this is an encoder-decoder), "
                "or reft.positions: all"
            )
        return ""


SUBMODULES |= {
    "ia3": IA3Config,
    "houlsby": HoulsbyConfig,
    "parallel": ParallelConfig,
    "compacter": CompacterConfig,
    "red": REDConfig,
    "ln_tuning": LNTuningConfig,
    "reft": ReFTConfig,
}
