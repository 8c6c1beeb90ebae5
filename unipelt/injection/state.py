"""The state of an injected model: the submodules that were added, and all values that their removal restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from unipelt.config.methods import UniPELTConfig


@dataclass(frozen=True)
class Folded:
    """The changes that `unipelt.fold` made to an injected model.

    Attributes:
        constants: path of a `Gates` module -> name of a gate -> the constant that the gate became; None if the gate was
            closed and its submodule was removed.
        tensors: former values of a checkpoint's tensors that folding changed or removed, by name, on the CPU.
        weights: former values of the pretrained weights that low-rank terms were merged into, by name, on the CPU.
        unfrozen: the result of `unfrozen_names` before all parameters were frozen.
    """

    constants: Mapping[str, Mapping[str, float | None]]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    unfrozen: frozenset[str]


@dataclass
class Injection:
    """The changes that `unipelt.inject` made to a model, which keeps this record as `model.unipelt_injection`.

    Attributes:
        config: configuration of the submodules that were added.
        deployed: whether prefixes are plain parameters, without the reparameterisation network.
        head: names of the head's parameters, and of the parts of the base that its checkpoint did not hold.
        required_grad: `requires_grad` of every parameter before injection, by name.
        replaced: former values of the model's attributes that injection overwrote, by name.
        originals: former values of the head, and of pretrained parameters that train, by name, on the CPU.
        folded: the changes by folding; None for a model that is not folded.
        unfrozen: names of pretrained parameters that a loaded checkpoint holds although the configuration trains none
            of them, because the user who trained the checkpoint let them train.
        vocabulary: names of the parameters that hold a vocabulary of another size than the base's; a checkpoint holds
            them too.
        shares: whether the model shares its base with other models (`unipelt.Tasks`).
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
        """The former values of all pretrained parameters that training or folding changed, by name, on the CPU."""
        return {**(self.folded.weights if self.folded else {}), **self.originals}


def host_of(model: Any) -> Any:
    """Return the model that carries submodules: the one inside a `PeftModel`, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def is_injected(model: nn.Module) -> bool:
    """Return whether a model carries submodules of `unipelt.inject`."""
    return getattr(model, "unipelt_injection", None) is not None


def injection_of(model: nn.Module) -> Injection:
    """Return the record of the injection into a model. Raises `ValueError` without one, or if PEFT holds the model."""
    injection = injection_inside(model)
    if hasattr(model, "get_base_model") or "peft_config" in vars(model):
        raise ValueError(
            f"PEFT holds the sets of this {type(model).__name__}; call model = unipelt.from_peft(model) first"
        )
    return injection


def injection_inside(model: nn.Module) -> Injection:
    """Return the record of the injection into a model, also if PEFT holds its sets. Raises `ValueError` without one."""
    injection = getattr(model, "unipelt_injection", None)
    if injection is None:
        raise ValueError(f"this {type(model).__name__} carries no submodules; call unipelt.inject(model, ...) first")
    return injection
