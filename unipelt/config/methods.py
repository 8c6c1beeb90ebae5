"""Configuration of a method: its submodules, its gates, and what it trains.

`unipelt.config.presets` has the named configurations, and builds a configuration from a dict or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unipelt.config.gate import GateConfig, check_prompt_gate
from unipelt.config.groups import GROUPS
from unipelt.config.parts import AdapterConfig, LoRAConfig, PrefixConfig, PromptConfig, TokensConfig
from unipelt.config.schema import ConfigError, build, check_fields, omitted_if_default, overlay, to_plain
from unipelt.config.submodule import SUBMODULES, SubmoduleConfig
from unipelt.files.messages import show


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
    prompt: PromptConfig | None = omitted_if_default(None)
    tokens: TokensConfig | None = omitted_if_default(None)
    dtype: Literal["float32", "base"] = omitted_if_default("float32")

    def __post_init__(self) -> None:
        object.__setattr__(self, "more", _checked_more(self.more))
        check_fields(self)
        if self.gate.activation == "tanh" and self.prefix and self.prefix.gate and self.prefix.gating == "mass":
            raise ConfigError("gate.activation: tanh may be below 0, and a prefix's gating mass takes its logarithm")
        if self.prefix is not None:
            self.gate.check_start("prefix.gate_start", self.prefix.gate_start)
        if self.prompt is not None and self.prompt.gate:
            check_prompt_gate(self.gate)
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
