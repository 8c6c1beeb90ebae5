"""The state of an injected model: what was added, and what is needed to take it out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from unipelt.config.methods import UniPELTConfig


@dataclass(frozen=True)
class Folded:
    """What `unipelt.fold` did to an injected model.

    Attributes:
        constants: path of a `Gates` module -> name of a gate -> the constant that it became; None where the gate was
            closed and its submodule dropped.
        tensors: what a checkpoint holds that folding changed or took away, as it was before, on the CPU.
        weights: the pretrained weights that low-rank terms were merged into, by name, as they were before, on the CPU.
        unfrozen: what `unfrozen_names` gave before everything was frozen.
    """

    constants: Mapping[str, Mapping[str, float | None]]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    unfrozen: frozenset[str]


@dataclass
class Injection:
    """What `unipelt.inject` did to a model, kept on it as `model.unipelt_injection`.

    Attributes:
        config: what was added.
        deployed: whether prefixes are plain parameters, without the reparameterisation network.
        head: names of the head's parameters, and of the parts of the base that its checkpoint did not hold.
        required_grad: `requires_grad` of every parameter before.
        replaced: attributes of the model itself that injection overwrote.
        originals: what pretrained parameters that train were before, on the CPU.
        folded: what folding did; None before.
        unfrozen: names of pretrained parameters that a loaded checkpoint holds although the configuration trains none
            of them: the wish of who trained it.
        vocabulary: names of the parameters that hold a vocabulary of another size than the base's; they are kept with
            what was trained.
        shares: whether its base is other models' too (`unipelt.Tasks`).
    """

    config: UniPELTConfig
    deployed: bool
    head: frozenset[str]
    required_grad: dict[str, bool]
    replaced: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    folded: Folded | None = None
    unfrozen: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    shares: bool = False

    @property
    def before(self) -> dict[str, Tensor]:
        """What every pretrained parameter that training or folding changed was before, on the CPU, by name."""
        return {**(self.folded.weights if self.folded else {}), **self.originals}


def host_of(model: Any) -> Any:
    """Return the model that carries submodules: the one inside a `PeftModel`, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def is_injected(model: nn.Module) -> bool:
    """Return whether a model carries what `unipelt.inject` adds."""
    return getattr(model, "unipelt_injection", None) is not None


def injection_of(model: nn.Module) -> Injection:
    """The record of the injection into `model`. Raises `ValueError` if there is none, or if PEFT holds the model."""
    injection = injection_inside(model)
    if hasattr(model, "get_base_model") or "peft_config" in vars(model):
        raise ValueError(
            f"PEFT holds the sets of this {type(model).__name__}; call model = unipelt.from_peft(model) first"
        )
    return injection


def injection_inside(model: nn.Module) -> Injection:
    """The same, also of a model whose sets PEFT holds, for what works on either."""
    injection = getattr(model, "unipelt_injection", None)
    if injection is None:
        raise ValueError(f"this {type(model).__name__} carries no submodules; call unipelt.inject(model, ...) first")
    return injection
