"""What to add to a model, how large, gated how: frozen dataclasses, data only.

`unipelt.config.presets` has those with a name, and what makes one of a dict or a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from unipelt.config.schema import ConfigError, build, check_fields, omitted_if_default, overlay, to_plain
from unipelt.files.messages import show

Place = Literal["query", "key", "value", "attention", "up", "activation", "down", "feed_forward", "gate"]
"""Where in a layer a term can be added.

`query`, `key`, `value`: the projections. `attention`: the projection that ends the attention. `up`, `down`: the first
and the last projection of the feed-forward network. `gate`: the projection beside `up` in a gated feed-forward network
(Llama's `gate_proj`). `activation`: what `down` is given. `feed_forward`: past the network, from what `up` reads to
what `down` gives.
"""

LoRAPlace = Literal[Place, "all-linear"]
"""A place of LoRA; `all-linear` stands for every projection of a layer that has a name here."""

PROJECTIONS: tuple[Place, ...] = ("query", "value", "key", "attention", "up", "down")
"""The projections that a layer has."""

LINEAR: tuple[Place, ...] = (*PROJECTIONS, "gate")
"""The places that are projections; only a gated feed-forward network has the last."""


def _check_dropout(dropout: float) -> None:
    """Raise `ConfigError` for what is no probability below 1."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1, not {show(dropout)}")


@dataclass(frozen=True)
class AdapterConfig:
    """A bottleneck adapter after the feed-forward network of a layer (Houlsby et al., 2019; Pfeiffer placement).

    Attributes:
        bottleneck: M, the width of the bottleneck, in units.
        gate: whether a gate scales the adapter's output.
        start: of the projection back up. `normal`: random, near zero (the paper). `zero`: at zero, so that the adapter
            adds nothing before it is trained, however large the numbers are that it reads.
        dropout: while training, the probability that an activation in the bottleneck is zero:
            `up(dropout(ReLU(down(h))))`.
    """

    bottleneck: int = 48
    gate: bool = True
    start: Literal["normal", "zero"] = omitted_if_default("normal")
    dropout: float = omitted_if_default(0.0)

    def __post_init__(self) -> None:
        check_fields(self, "bottleneck")
        _check_dropout(self.dropout)


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix-tuning of every layer's attention (Li and Liang, 2021).

    Attributes:
        length: L, in tokens.
        hidden: width of the reparameterisation network, in units; the network is dropped after training.
        gate: whether a gate scales the prefix.
        gating: how the gate acts. `scale` multiplies prefix keys and values (the paper; a closed gate still takes
            softmax mass, footnote 3); `mass` adds `log g` to the prefix's attention logits, so that a closed gate
            is exactly the model without prefix. In causal attention it is always `mass`, a gate for each query.
            Neither under `softmax: own`.
        gate_start: where its gate begins; `gate.start` if not given. Near 0 under `mass`, the prefix takes no attention
            until its gate has learned to open.
        softmax: `shared`: prefix and text share the attention's softmax (Li and Liang). `own`: each has one, and what
            attention over the prefix gives is added to what attention over the text gives, times the gate, so that the
            prefix takes nothing from the text (He et al., 2022, section 3.1, without the factor of the text; with a
            gate much as in LLaMA-Adapter, Zhang et al., 2024).
    """

    length: int = 10
    hidden: int = 512
    gate: bool = True
    gating: Literal["scale", "mass"] = "scale"
    gate_start: float | None = omitted_if_default(None)
    softmax: Literal["shared", "own"] = omitted_if_default("shared")

    def __post_init__(self) -> None:
        check_fields(self, "length", "hidden")
        if self.softmax == "own" and self.gating != "scale":
            raise ConfigError("a prefix with a softmax of its own takes no mass of the text's; leave gating out")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of projections (Hu et al., 2022); the paper's are those of queries and values.

    Attributes:
        rank: r.
        alpha: numerator of the scale `alpha / rank`; a gate replaces that scale, as `gating` says.
        gate: whether gates (one for each projection) replace `alpha / rank`.
        places: which projections: `query`, `key`, `value`, `attention`, `up`, `down`, `gate`; or `all-linear`, which
            stands for all of these that a layer has.
        scaling: `standard`, or `rank_stabilised` for the scale `alpha / sqrt(rank)` (Kalajdzievski, 2023).
        decomposed: weight-decomposed updates, DoRA (Liu et al., 2024): the length of each row of the weight is learned
            apart from its direction. A gate leads from the frozen projection (0) to the updated one (1), and the scale
            stays.
        gating: how the gate acts. `replace`: it stands for the scale (the paper). `multiply`: the scale stays, and the
            gate is a factor of it, so that half open a term is added as strongly as ungated with half of `alpha`.
            Decomposed updates keep their scale in any case.
        start: `zero`: B. `pissa`: A and B start as the principal part of the weight, its `rank` largest singular values
            and vectors, and what is added is their difference to that start (Meng et al., 2024).
        dropout: while training, the probability that a number of x is zero before A: `s B A dropout(x)`, as PEFT's
            `lora_dropout`. What a gate reads is never dropped.
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

    def __post_init__(self) -> None:
        check_fields(self, "rank", "alpha")
        _check_dropout(self.dropout)
        if self.places != ("all-linear",):
            if not self.places or len(set(self.places)) != len(self.places) or not {*self.places} <= {*LINEAR}:
                raise ConfigError(
                    f"places must name one or more of {', '.join(LINEAR)}, none of them twice, or all-linear alone"
                )
            object.__setattr__(self, "places", tuple(place for place in LINEAR if place in self.places))
        if self.decomposed and self.start != "zero":
            raise ConfigError(f"start: {self.start} is of plain updates, and decomposed ones start at zero")
        if self.decomposed and self.gating != "replace":
            raise ConfigError("decomposed updates keep their scale under a gate; leave gating out")

    @property
    def name(self) -> str:
        """What it is called."""
        return "lora"

    @property
    def shares_entry(self) -> bool:
        """Whether one product can serve A and a gate: A reads the same x, undropped, and starts at random."""
        return self.start == "zero" and not self.dropout

    @property
    def is_all_linear(self) -> bool:
        """Whether its places are all projections that a layer has."""
        return self.places == ("all-linear",)

    @property
    def projections(self) -> tuple[Place, ...]:
        """Its places by name; under `all-linear` all there are, of which a layer may lack the `gate`."""
        return tuple(place for place in LINEAR if self.is_all_linear or place in self.places)

    @property
    def scale(self) -> float:
        """What `B A x` is multiplied by where no gate replaces it."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    @property
    def gated_scale(self) -> float:
        """What `g B A x` is multiplied by where there is a gate."""
        return 1.0 if self.gating == "replace" else self.scale


@dataclass(frozen=True)
class PromptConfig:
    """Learned vectors before the embedded text: prompt tuning (Lester et al., 2021).

    Attributes:
        length: L, in tokens; so many fewer are left for a text in a model that has a longest one.
        gate: whether a gate, one number an example, scales the vectors. As with a prefix under `scale`, a closed one
            leaves vectors of zeros, which still take attention. It averages over the embedded text, so causal models
            take it with `gate.pooling: static` alone; `pooling: token` and `gate.shared` have no place here.
    """

    length: int = 20
    gate: bool = omitted_if_default(False)

    def __post_init__(self) -> None:
        check_fields(self, "length")


@dataclass(frozen=True)
class SubmoduleConfig:
    """What every further submodule's configuration has; `unipelt.register_submodule` adds one of your own.

    Attributes:
        gate: whether a gate scales its term.
        places: where it is added, each a `Place`; a class gives its own default.
    """

    gate: bool = True
    places: tuple[Place, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.places or len(set(self.places)) != len(self.places):
            raise ConfigError(f"places must name one or more of {', '.join(get_args(Place))}, none of them twice")

    @property
    def name(self) -> str:
        """What it is called, in a configuration and in a model."""
        return next(name for name, cls in SUBMODULES.items() if cls is type(self))


Activation = Literal["relu", "gelu", "silu", "tanh"]

SUBMODULES: dict[str, type[SubmoduleConfig]] = {}
"""The further submodules by name: those of `unipelt`, and those of `unipelt.register_submodule`."""


@dataclass(frozen=True)
class IA3Config(SubmoduleConfig):
    """Learned factors of keys, values and inner activations: (IA)3 (Liu et al., 2022)."""

    places: tuple[Place, ...] = ("key", "value", "activation")


@dataclass(frozen=True)
class REDConfig(SubmoduleConfig):
    """Learned factors and shifts of what the feed-forward network gives: representation editing (Wu et al., 2024)."""

    places: tuple[Place, ...] = ("down",)


@dataclass(frozen=True)
class HoulsbyConfig(SubmoduleConfig):
    """Two bottleneck adapters a layer, behind attention and behind the feed-forward network (Houlsby et al., 2019).

    Attributes:
        bottleneck: width of each, in units.
        activation: between its two projections.
    """

    places: tuple[Place, ...] = ("attention", "down")
    bottleneck: int = 48
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "bottleneck")


@dataclass(frozen=True)
class ParallelConfig(SubmoduleConfig):
    """A scaled bottleneck adapter beside the feed-forward network (He et al., 2022).

    Attributes:
        bottleneck: r, in units.
        scale: s; 1 is the parallel adapter without scale.
        activation: between its two projections.
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
        bottleneck: width of each, in units.
        terms: n, Kronecker products a weight; it divides the bottleneck and the width of the place. Their n left
            factors, (n, n), are shared by all adapters of a stack.
        rank: of the right factors.
        activation: between an adapter's two projections.
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
class GateConfig:
    """How gates are computed. The defaults are the paper's, but for padding.

    Attributes:
        pooling: of the tokens' numbers. `masked_mean` averages over the tokens that are not padding; `mean` averages
            over all of them, as the authors' release does, so that a prediction depends on how its batch was padded;
            `token` leaves a gate for every token (a prefix's acts on its `mass` then); `static` has no input at all,
            one learned number a layer. In causal layers it is `token` or `static`: a mean would see the future.
        network: from the input to the gates' logits. `linear`; `mlp`, two layers with tanh between; `recurrent`, a
            minimal gated recurrence over the text; `transformer`, one head of attention over the text. The last two
            give one number an example, and have no place in causal layers.
        hidden: inner width of a network that is not linear, in units.
        shared: whether one network at the entry of a layer's attention, the central gate of the authors' release,
            computes all gates of the layer; else each is computed from what its submodule reads.
        activation: `sigmoid`; `tanh`, which is between -1 and 1; `softmax` over the gates of a layer, which is for
            shared gates.
        temperature: what logits are divided by.
        start: where gates begin: 0.5 under `sigmoid` and 0 under `tanh` if not given. Under `tanh` weights begin at
            zero, so that a start of 0 is exactly the model without submodules (but for a prefix, footnote 3, and for
            a prompt, whose vectors of zeros take attention too).
    """

    pooling: Literal["masked_mean", "mean", "token", "static"] = "masked_mean"
    network: Literal["linear", "mlp", "recurrent", "transformer"] = omitted_if_default("linear")
    hidden: int = omitted_if_default(16)
    shared: bool = omitted_if_default(False)
    activation: Literal["sigmoid", "tanh", "softmax"] = omitted_if_default("sigmoid")
    temperature: float = omitted_if_default(1.0)
    start: float | None = omitted_if_default(None)

    def __post_init__(self) -> None:
        check_fields(self, "hidden", "temperature")
        if self.activation == "softmax" and not self.shared:
            raise ConfigError("activation softmax is over the gates of a layer, so it needs shared: true")
        self.check_start("start", self.start)
        if self.pooling == "static" and (self.network != "linear" or self.shared):
            raise ConfigError("static gates have no input, so they have no network and are not shared")
        if self.over_text and self.pooling != "masked_mean":
            raise ConfigError(f"a {self.network} network reads all of a text, so its pooling is masked_mean")

    def check_start(self, name: str, start: float | None) -> None:
        """Raise `ConfigError` where a gate cannot begin there."""
        least = {"sigmoid": 0, "tanh": -1, "softmax": 1}[self.activation]
        if start is not None and not least < start < 1:
            bounds = "nothing, since gates sum to 1" if least == 1 else f"above {least} and below 1"
            raise ConfigError(f"{name} must be {bounds} under {self.activation}, not {show(start)}")

    @property
    def over_text(self) -> bool:
        """Whether the network gives one number an example by itself."""
        return self.network in ("recurrent", "transformer")


@dataclass(frozen=True)
class UniPELTConfig:
    """What `unipelt.inject` adds to a model and what trains.

    Attributes:
        adapter, prefix, lora: the submodules; `None` leaves one out.
        bitfit: every bias of the model trains (Ben Zaken et al., 2022).
        gate: how gates pool.
        train_head: whether the head trains, with every part of the model that its checkpoint did not hold.
        train_base: every weight of the base trains (full fine-tuning).
        layers: indices of the layers that carry submodules: a list, a `range`, text such as "6-11" (both ends
            included), or `None` (or "all") for all. With an encoder and a decoder, they are of each.
        encoder: whether layers that look both ways carry submodules.
        decoder: whether causal layers carry submodules in their self-attention and feed-forward network.
        cross: whether a decoder's attention to the encoder carries what has a place there: a prefix, LoRA, and terms
            of its projections.
        prompt: learned vectors before the text, in models of one stack; whatever `layers` says.
        dtype: the type of what is added. `float32` keeps it in at least float32 over a base in half precision, where
            small steps would be rounded away; `base` follows the base.
        more: further submodules, at most one of a kind. In a dict or a file each is a key of its own, by its name:
            `{"preset": "lora", "ia3": {"gate": false}}`; null leaves it out.
    """

    adapter: AdapterConfig | None = AdapterConfig()
    prefix: PrefixConfig | None = PrefixConfig()
    lora: LoRAConfig | None = LoRAConfig()
    bitfit: bool = False
    gate: GateConfig = GateConfig()
    train_head: bool = True
    train_base: bool = False
    layers: tuple[int, ...] | None = None
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    more: tuple[SubmoduleConfig, ...] = ()
    prompt: PromptConfig | None = omitted_if_default(None)  # noqa: RUF009 - a field, as elsewhere
    dtype: Literal["float32", "base"] = omitted_if_default("float32")

    def __post_init__(self) -> None:
        object.__setattr__(self, "more", _checked_more(self.more))
        check_fields(self, skip=("more",))
        if self.gate.activation == "tanh" and self.prefix and self.prefix.gate and self.prefix.gating == "mass":
            raise ConfigError("gate.activation: tanh may be below 0, and a prefix's gating mass takes its logarithm")
        if self.prefix is not None:
            self.gate.check_start("prefix.gate_start", self.prefix.gate_start)
        if self.prompt is not None and self.prompt.gate:
            _check_prompt_gate(self.gate)
        if self.layers is None:
            return
        if not self.layers or min(self.layers) < 0:
            raise ConfigError(
                f"layers must be a non-empty list of indices from 0, or null for all, not {show(self.layers)}"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers names an index twice: {show(self.layers)}")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    @property
    def has_submodules(self) -> bool:
        """Whether anything is added to the layers, as opposed to training what is there."""
        return any(part is not None for part in (self.adapter, self.prefix, self.lora, self.prompt, *self.more))

    def part(self, name: str) -> Any:
        """The configuration of a submodule by its name, or None where it is left out."""
        if name in ("adapter", "prefix", "lora", "prompt"):
            return getattr(self, name)
        return next((part for part in self.more if part.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain types that JSON holds; further submodules by their names, if there are any."""
        values = to_plain(self)
        del values["more"]
        return values | {part.name: to_plain(part) for part in self.more}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UniPELTConfig:
        """Build from plain types; what is not named keeps its default. Raises `ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a mapping, not {show(values)}")
        given = {name: values[name] for name in values if name in SUBMODULES}
        more = tuple(build(SUBMODULES[name], value, name) for name, value in given.items() if value is not None)
        rest = {name: values[name] for name in values if name not in given}
        built: UniPELTConfig = build(cls, rest, "", apart=("more",), also=tuple(SUBMODULES))
        return replace(built, more=more) if more else built

    def updated(self, changes: Mapping[str, Any]) -> UniPELTConfig:
        """This configuration with `changes` (nested, plain types) laid over it. Raises `ConfigError`.

        A part that is absent (`None`) and gets a change starts from its defaults.
        """
        return UniPELTConfig.from_dict(overlay(self.to_dict(), changes))


def _check_prompt_gate(gate: GateConfig) -> None:
    """Raise `ConfigError` for gates that a prompt has no place for."""
    if gate.shared:
        raise ConfigError(
            "gate.shared: true is of a layer's gates, and a prompt is in front of all layers; take gate.shared: false, "
            "or prompt.gate: false"
        )
    if gate.pooling == "token":
        raise ConfigError(
            "gate.pooling: token is a gate for every token, and a prompt is in front of all tokens; take gate.pooling: "
            "masked_mean (static in causal models), or prompt.gate: false"
        )


def _checked_more(more: Any) -> tuple[SubmoduleConfig, ...]:
    """Sorted by name, so that the same submodules make the same configuration."""
    if not isinstance(more, (list, tuple)):
        raise ConfigError(f"more must be a list of submodules' configurations, not {show(more)}")
    for part in more:
        if type(part) not in SUBMODULES.values():
            raise ConfigError(
                f"more holds configurations of submodules ({', '.join(SUBMODULES)}; unipelt.register_submodule), not "
                f"{show(part)}"
            )
    names = [part.name for part in more]
    if len(set(names)) != len(names):
        raise ConfigError(f"more names a submodule twice: {', '.join(sorted(names))}")
    return tuple(sorted(more, key=lambda part: part.name))


SUBMODULES |= {
    "ia3": IA3Config,
    "houlsby": HoulsbyConfig,
    "parallel": ParallelConfig,
    "compacter": CompacterConfig,
    "red": REDConfig,
}
