"""Configurations of the paper's submodules, of prompts and of trained tokens, and the places of terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unipelt.config.mixture import MixtureConfig
from unipelt.config.schema import ConfigError, check_fields, omitted_if_default
from unipelt.files.messages import show

Place = Literal["query", "key", "value", "attention", "up", "activation", "down", "feed_forward", "gate"]
"""A place in a layer where a term can be added.

`query`, `key`, `value`: the projections. `attention`: the last projection of the attention. `up`, `down`: the first
and the last projection of the feed-forward network. `gate`: the projection parallel to `up` in a gated feed-forward
network (Llama's `gate_proj`). `activation`: the input of `down`. `feed_forward`: parallel to the whole network, from
the input of `up` to the output of `down`.
"""

AnyPlace = Literal[Place, "norm", "layer"]
"""A place of a term. `norm` stands for every norm of a layer's states, and only `ln_tuning` is there. `layer` is the
output of a whole layer, and only `reft` is there.
"""

LoRAPlace = Literal[Place, "all-linear"]
"""A place of LoRA. `all-linear` stands for every projection in `LINEAR` that a layer has."""

PROJECTIONS: tuple[Place, ...] = ("query", "value", "key", "attention", "up", "down")
"""The projections that a layer has."""

LINEAR: tuple[Place, ...] = (*PROJECTIONS, "gate")
"""The places that are projections. Only a gated feed-forward network has the last one, `gate`."""


def check_dropout(dropout: float) -> None:
    """Raise `ConfigError` unless the dropout is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1, not {show(dropout)}")


@dataclass(frozen=True)
class AdapterConfig:
    """A bottleneck adapter after the feed-forward network of a layer (Houlsby et al., 2019; Pfeiffer placement).

    Attributes:
        bottleneck: M, the width of the bottleneck, in units.
        gate: whether a gate scales the adapter's output.
        start: the initial weight of the up-projection. `normal`: random, near zero (the paper). `zero`: zero, so that
            the untrained adapter adds nothing, even for large inputs.
        dropout: the probability, in training, that an activation in the bottleneck is zero:
            `up(dropout(ReLU(down(h))))`.
        mixture: several adapters in place of one; None for one.
    """

    bottleneck: int = 48
    gate: bool = True
    start: Literal["normal", "zero"] = omitted_if_default("normal")
    dropout: float = omitted_if_default(0.0)
    mixture: MixtureConfig | None = omitted_if_default(None)

    def __post_init__(self) -> None:
        check_fields(self, "bottleneck")
        check_dropout(self.dropout)


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix-tuning of every layer's attention (Li and Liang, 2021).

    Attributes:
        length: L, in tokens.
        hidden: width of the reparameterisation network, in units. The network is removed after training.
        reparameterize: whether the network computes the keys and values. `false` makes the keys and values themselves
            the parameters: a flat prefix, without `hidden`. Only a flat prefix can start from a text
            (`unipelt.start_prefix_from`).
        start: the initial values. `normal`: random, near zero (the paper). `zero`: the prefix's values are zero, so
            that the untrained prefix adds nothing. `zero` needs `softmax: own`, because a prefix in the text's softmax
            takes attention whatever its values are.
        gate: whether a gate scales the prefix.
        gating: the effect of the gate. `scale` multiplies the prefix's keys and values (the paper). With a gate of 0
            the prefix still takes attention from the text (footnote 3). `mass` adds `log g` to the prefix's attention
            logits, so that the model with a gate of 0 is exactly the model without prefix. Causal attention always
            uses `mass`, with one gate per query. `softmax: own` uses neither of the two.
        gate_start: the initial value of the gate; by default `gate.start`. With a value near 0 and `mass`, the prefix
            takes almost no attention until training raises the gate.
        softmax: `shared`: prefix and text share the attention's softmax (Li and Liang). `own`: prefix and text have
            separate softmaxes, and the gated attention over the prefix is added to the attention over the text. Then
            the prefix takes no attention from the text (He et al., 2022, section 3.1, without the factor of the text;
            the gate is similar to the gate of LLaMA-Adapter, Zhang et al., 2024).
    """

    length: int = 10
    hidden: int = 512
    gate: bool = True
    gating: Literal["scale", "mass"] = "scale"
    gate_start: float | None = omitted_if_default(None)
    softmax: Literal["shared", "own"] = omitted_if_default("shared")
    reparameterize: bool = omitted_if_default(True)
    start: Literal["normal", "zero"] = omitted_if_default("normal")

    def __post_init__(self) -> None:
        check_fields(self, "length", "hidden")
        if self.start == "zero" and self.softmax != "own":
            raise ConfigError(
                "start: zero needs softmax: own, since values of zero in the text's softmax take attention"
            )
        if self.softmax == "own" and self.gating != "scale":
            raise ConfigError("a prefix with a softmax of its own takes no mass of the text's; leave gating out")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of projections (Hu et al., 2022). The paper updates the projections of queries and values.

    Attributes:
        rank: r.
        alpha: numerator of the scale `alpha / rank`. A gate can replace the scale (see `gating`).
        gate: whether each update has a gate.
        places: the projections with an update: `query`, `key`, `value`, `attention`, `up`, `down`, `gate`; or
            `all-linear` for all of these projections that a layer has.
        scaling: `standard`, or `rank_stabilised` for the scale `alpha / sqrt(rank)` (Kalajdzievski, 2023).
        decomposed: whether the updates are weight-decomposed, DoRA (Liu et al., 2024). Then the length and the
            direction of each row of the weight are learned separately. With a gate of 0 the projection is the frozen
            one, and with a gate of 1 the updated one. The gate does not change the scale.
        gating: the effect of the gate. `replace`: the gate replaces the scale (the paper). `multiply`: the gate
            multiplies the scale, so a gate of 0.5 is like half of `alpha` without a gate. Decomposed updates always
            keep their scale.
        start: `zero`: B starts at zero. `pissa`: A and B start at the principal part of the weight, from the `rank`
            largest singular values and their vectors, and the update is the change of `B A` since the start (Meng et
            al., 2024).
        dropout: the probability, in training, that an element of x is zero before A: `s B A dropout(x)`, as PEFT's
            `lora_dropout`. The input of a gate is never dropped.
        mixture: several updates of each projection in place of one; None for one.
    """

    rank: int = 8
    alpha: float = 16.0
    gate: bool = True
    places: tuple[LoRAPlace, ...] = omitted_if_default(("query", "value"))
    scaling: Literal["standard", "rank_stabilised"] = omitted_if_default("standard")
    decomposed: bool = omitted_if_default(False)
    start: Literal["zero", "pissa"] = omitted_if_default("zero")
    gating: Literal["replace", "multiply"] = omitted_if_default("replace")
    dropout: float = omitted_if_default(0.0)
    mixture: MixtureConfig | None = omitted_if_default(None)

    def __post_init__(self) -> None:
        check_fields(self, "rank", "alpha")
        check_dropout(self.dropout)
        if self.places != ("all-linear",):
            if not self.places or len(set(self.places)) != len(self.places) or not {*self.places} <= {*LINEAR}:
                raise ConfigError(
                    f"places must name one or more of {', '.join(LINEAR)}, none of them twice, or all-linear alone"
                )
            object.__setattr__(self, "places", tuple(place for place in LINEAR if place in self.places))
        if self.mixture is not None and self.start != "zero":
            raise ConfigError(f"start: {self.start} is of one update of a projection, and a mixture has several")
        if self.decomposed and self.start != "zero":
            raise ConfigError(f"start: {self.start} is of plain updates, and decomposed ones start at zero")
        if self.decomposed and self.gating != "replace":
            raise ConfigError("decomposed updates keep their scale under a gate; leave gating out")

    @property
    def name(self) -> str:
        """The submodule's name."""
        return "lora"

    @property
    def is_function(self) -> bool:
        """Whether each update is a term with a function of its own, as in DoRA and in mixtures, and no pair A, B."""
        return self.decomposed or self.mixture is not None

    @property
    def shares_entry(self) -> bool:
        """Whether A and a gate can share one product: A then reads x without dropout and starts at random."""
        return self.start == "zero" and not self.dropout

    @property
    def is_all_linear(self) -> bool:
        """Whether the places are all projections that a layer has."""
        return self.places == ("all-linear",)

    @property
    def projections(self) -> tuple[Place, ...]:
        """The places by name. With `all-linear` this is `LINEAR`, although a layer may have no `gate`."""
        return tuple(place for place in LINEAR if self.is_all_linear or place in self.places)

    @property
    def scale(self) -> float:
        """The factor of `B A x` without a gate."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    @property
    def gated_scale(self) -> float:
        """The factor of `g B A x` with a gate."""
        return 1.0 if self.gating == "replace" else self.scale


@dataclass(frozen=True)
class PromptConfig:
    """Learned vectors before the embedded text: prompt tuning (Lester et al., 2021).

    Attributes:
        length: L, in tokens. In a model with a maximum length, a text can have L tokens fewer.
        gate: whether a gate, one number per example, scales the vectors. A gate of 0 leaves vectors of zeros, which
            still take attention, as in a prefix with `scale`. The gate averages over the embedded text, so a causal
            model needs `gate.pooling: static`. A prompt's gate does not work with `gate.pooling: token` or
            `gate.shared`.
    """

    length: int = 20
    gate: bool = omitted_if_default(False)

    def __post_init__(self) -> None:
        check_fields(self, "length")


@dataclass(frozen=True)
class TokensConfig:
    """The embeddings of single tokens, trained while the rest of the vocabulary is frozen.

    Where the output head shares the weight of the embedding, the same rows give the logits of these tokens. PEFT calls
    this trainable tokens.

    Attributes:
        ids: the numbers of the tokens: a list, a `range`, or a text such as "30522-30524" (both ends included). An
            empty list means the rows that the model has beyond those of its base (`resize_token_embeddings`).
    """

    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ids and min(self.ids) < 0:
            raise ConfigError(f"ids must be numbers of tokens, from 0, not {show(min(self.ids))}")
        if len(set(self.ids)) != len(self.ids):
            raise ConfigError("ids names a token twice")
        object.__setattr__(self, "ids", tuple(sorted(self.ids)))
