"""Configurations of methods: frozen dataclasses with the submodules, their sizes and their gates.

`unipelt.config.presets` has the named configurations, and builds a configuration from a dict or a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from unipelt.config.groups import GROUPS
from unipelt.config.mixture import MixtureConfig
from unipelt.config.schema import ConfigError, build, check_fields, omitted_if_default, overlay, to_plain
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


def _check_dropout(dropout: float) -> None:
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
    mixture: MixtureConfig | None = omitted_if_default(None)  # noqa: RUF009 - a field, as elsewhere

    def __post_init__(self) -> None:
        check_fields(self, "bottleneck")
        _check_dropout(self.dropout)


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
    mixture: MixtureConfig | None = omitted_if_default(None)  # noqa: RUF009 - a field, as elsewhere

    def __post_init__(self) -> None:
        check_fields(self, "rank", "alpha")
        _check_dropout(self.dropout)
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


@dataclass(frozen=True)
class SubmoduleConfig:
    """The base class for configurations of further submodules, also of those from `unipelt.register_submodule`.

    Attributes:
        gate: whether a gate scales the submodule's term.
        places: the places where the submodule is added, each a `Place`. Each subclass sets a default.
        mixture: several terms at each place in place of one; None for one. A keyword argument.
    """

    gate: bool = True
    places: tuple[AnyPlace, ...] = ()
    mixture: MixtureConfig | None = field(default=None, metadata={"later": True}, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.places or len(set(self.places)) != len(self.places):
            possible = get_args(get_args(get_type_hints(type(self))["places"])[0])
            raise ConfigError(f"places must name one or more of {', '.join(possible)}, none of them twice")

    @property
    def name(self) -> str:
        """The submodule's name, in a configuration and in a model."""
        return next(name for name, cls in SUBMODULES.items() if cls is type(self))

    def misfit(self, gates: GateConfig, *, causal: bool, generates: bool, norm_first: bool) -> str:
        """Return the reason why a stack of a model cannot have this submodule; empty if it can.

        Args:
            gates: the computation of the gates.
            causal: whether the stack's attention is causal.
            generates: whether the model generates text.
            norm_first: whether a norm of a layer comes before the layer's attention.
        """
        return ""


Activation = Literal["relu", "gelu", "silu", "tanh"]

SUBMODULES: dict[str, type[SubmoduleConfig]] = {}
"""The configuration classes of further submodules by name, with those from `unipelt.register_submodule`."""


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
class GateConfig:
    """The computation of gates. The defaults are the paper's, except that gates ignore padding.

    Attributes:
        pooling: the pooling over the tokens of a text. `masked_mean` averages over the tokens that are not padding.
            `mean` averages over all tokens, as in the authors' release, so a prediction depends on the padding of its
            batch. `token` gives one gate per token (a prefix then has the gating `mass`). `static` gates have no
            input: one learned number per gate and layer. Causal layers use `static` gates if this is `static`, and else
            `token`, because a mean would include later tokens.
        network: the network from the input to the gates' logits. `linear`; `mlp`, two layers with tanh between them;
            `recurrent`, a minimal gated recurrence over the text; `transformer`, one attention head over the text.
            The last two give one number per example and are not possible in causal layers.
        hidden: inner width of a network that is not linear, in units.
        shared: whether one network at the start of a layer's attention, the central gate of the authors' release,
            computes all gates of the layer. Otherwise each gate is computed from the input of its submodule.
        activation: `sigmoid`; `tanh`, with values between -1 and 1; or `softmax` over the gates of a layer, which needs
            shared gates.
        temperature: the divisor of the logits.
        start: the initial value of the gates; by default 0.5 with `sigmoid` and 0 with `tanh`. With `tanh` the weights
            start at zero, so a start of 0 gives exactly the model without submodules. Exceptions are a prefix (footnote
            3) and a prompt, whose vectors of zeros still take attention.
        dropout: the probability p, in training, that a submodule of a layer (adapter, prefix, LoRA, a further
            submodule), gated or not, is left out of a pass: `y + d g f(x, y)`, with d = 0 with the probability p and
            else d = 1. Nothing is rescaled, and evaluation does not change. A prompt is never left out.
        dropout_by: `batch`: one draw for all examples of a batch. `example`: one draw for each example.
    """

    pooling: Literal["masked_mean", "mean", "token", "static"] = "masked_mean"
    network: Literal["linear", "mlp", "recurrent", "transformer"] = omitted_if_default("linear")
    hidden: int = omitted_if_default(16)
    shared: bool = omitted_if_default(False)
    activation: Literal["sigmoid", "tanh", "softmax"] = omitted_if_default("sigmoid")
    temperature: float = omitted_if_default(1.0)
    start: float | None = omitted_if_default(None)
    dropout: float = omitted_if_default(0.0)
    dropout_by: Literal["batch", "example"] = omitted_if_default("batch")

    def __post_init__(self) -> None:
        check_fields(self, "hidden", "temperature")
        _check_dropout(self.dropout)
        if self.activation == "softmax" and not self.shared:
            raise ConfigError("activation softmax is over the gates of a layer, so it needs shared: true")
        self.check_start("start", self.start)
        if self.pooling == "static" and (self.network != "linear" or self.shared):
            raise ConfigError("static gates have no input, so they have no network and are not shared")
        if self.over_text and self.pooling != "masked_mean":
            raise ConfigError(f"a {self.network} network reads all of a text, so its pooling is masked_mean")

    def check_start(self, name: str, start: float | None) -> None:
        """Raise `ConfigError` if a gate cannot start at the value `start`. The message calls the value `name`."""
        least = {"sigmoid": 0, "tanh": -1, "softmax": 1}[self.activation]
        if start is not None and not least < start < 1:
            bounds = "nothing, since gates sum to 1" if least == 1 else f"above {least} and below 1"
            raise ConfigError(f"{name} must be {bounds} under {self.activation}, not {show(start)}")

    @property
    def over_text(self) -> bool:
        """Whether the network itself pools over the text, so that it gives one number per example."""
        return self.network in ("recurrent", "transformer")


@dataclass(frozen=True)
class UniPELTConfig:
    """The submodules that `unipelt.inject` adds to a model, and the parts of the model that are trained.

    Attributes:
        adapter, prefix, lora: the submodules; `None` omits a submodule.
        bitfit: whether every bias of the model is trained (Ben Zaken et al., 2022).
        gate: the computation of the gates.
        train_head: whether the head is trained, and every other part of the model that its checkpoint does not contain.
        train_base: whether every weight of the base model is trained (full fine-tuning).
        layers: indices of the layers with submodules: a list, a `range`, a text such as "6-11" (both ends included), or
            `None` (or "all") for all layers. In a model with an encoder and a decoder, the indices are for both.
        encoder: whether layers with bidirectional attention have submodules.
        decoder: whether causal layers have submodules in their self-attention and feed-forward network.
        cross: whether a decoder's cross-attention has submodules: a prefix, LoRA, and terms of its projections.
        prompt: the learned vectors before the text, in models with one stack. `layers` has no effect on the prompt.
        tokens: the tokens whose embeddings train; `None` trains none.
        dtype: the type of the added parameters. `float32` keeps them in at least float32, also if the base model has
            half precision, where rounding would remove small steps. `base` is the type of the base model.
        more: further submodules, at most one of each kind. In a dict or a file each has its own key, its name:
            `{"preset": "lora", "ia3": {"gate": false}}`. The value null omits a submodule. The key `peft` holds tuners
            of PEFT, one or several (`unipelt.config.PeftTermConfig`).
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
    tokens: TokensConfig | None = omitted_if_default(None)  # noqa: RUF009 - a field, as elsewhere
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
        if self.gate.dropout and not (self.adapter or self.prefix or self.lora or self.more):
            raise ConfigError(
                "gate.dropout leaves out submodules of layers, and this method has none; leave gate.dropout out, or "
                "add adapter, prefix, lora or a further submodule"
            )
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
        """Whether the configuration adds submodules, and does not only train existing parameters."""
        return any(part is not None for part in (self.adapter, self.prefix, self.lora, self.prompt, *self.more))

    @property
    def submodule_names(self) -> list[str]:
        """The names of the submodules that the configuration adds."""
        fixed = [name for name in ("adapter", "prefix", "lora", "prompt") if getattr(self, name) is not None]
        return fixed + [part.name for part in self.more]

    def part(self, name: str) -> Any:
        """Return the configuration of the submodule of this name, or None without such a submodule."""
        if name in ("adapter", "prefix", "lora", "prompt", "tokens"):
            return getattr(self, name)
        return next((part for part in self.more if part.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain types for JSON. Each further submodule has its name as its key."""
        values = to_plain(self)
        del values["more"]
        grouped = tuple(group.part for group in GROUPS.values())
        for key, group in GROUPS.items():
            if found := [part for part in self.more if isinstance(part, group.part)]:
                values[key] = group.write(found)
        return values | {part.name: to_plain(part) for part in self.more if not isinstance(part, grouped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UniPELTConfig:
        """Build a configuration from plain types. A missing key keeps its default. Raise `ConfigError` on a mistake."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a mapping, not {show(values)}")
        given = {name: values[name] for name in values if name in SUBMODULES}
        more = tuple(build(SUBMODULES[name], value, name) for name, value in given.items() if value is not None)
        for key, group in GROUPS.items():
            more += group.read(values[key]) if values.get(key) is not None else ()
        rest = {name: values[name] for name in values if name not in given and name not in GROUPS}
        built: UniPELTConfig = build(cls, rest, "", {"more": more}, also=(*SUBMODULES, *GROUPS))
        return built

    def updated(self, changes: Mapping[str, Any]) -> UniPELTConfig:
        """Return a configuration with `changes` (nested, plain types) merged in. Raise `ConfigError` on a mistake.

        A change to an absent part (`None`) starts from the part's defaults.
        """
        return UniPELTConfig.from_dict(overlay(self.to_dict(), changes))


def _check_prompt_gate(gate: GateConfig) -> None:
    """Raise `ConfigError` for gates that a prompt does not support."""
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
    """Return the checked submodules, sorted by name, so that their order does not change the configuration."""
    if not isinstance(more, (list, tuple)):
        raise ConfigError(f"more must be a list of submodules' configurations, not {show(more)}")
    for part in more:
        if type(part) not in (*SUBMODULES.values(), *(group.part for group in GROUPS.values())):
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
