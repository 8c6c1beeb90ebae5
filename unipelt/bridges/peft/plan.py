"""Plan the injection of a PEFT folder: the places of its terms in a model, and the matching configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.bridges.peft.files import join
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.further import IA3Config, LNTuningConfig
from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import LoRAConfig, Place
from unipelt.files.messages import show
from unipelt.hosts.locate import InjectionError, find_stacks
from unipelt.hosts.targets import ENTRY_PLACES, Projection
from unipelt.submodules.room import own_parts, placed_terms

IGNORED = frozenset(
    {
        # origin, and the modules, which follow from the tensors' names
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "modules_to_save"),
        # layout of the module's weight
        "fan_in_fan_out",
    }
)
"""Fields of PEFT's configuration that change no output, for any method."""


@dataclass(frozen=True)
class Plan:
    """The configuration to inject for a folder, and the values of its parameters.

    Attributes:
        config: the configuration to inject.
        values: tensors by the name of a place (`find_places`); a tensor fills the first rows and columns of its place.
        saved: tensors for parameters of the model itself, by name.
    """

    config: UniPELTConfig
    values: Mapping[str, Tensor]
    saved: Mapping[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """A possible place of a term.

    Attributes:
        path: the path of the module.
        name: the name of the term in the module.
        projection: the projection in the module.
        part: `encoder`, `decoder` or `cross`.
        layer: the index of the layer.
    """

    path: str
    name: str
    projection: Projection
    part: str
    layer: int


def alone(part: LoRAConfig | IA3Config | LNTuningConfig) -> UniPELTConfig:
    """Return a configuration with this submodule alone."""
    lora, more = (part, ()) if isinstance(part, LoRAConfig) else (None, (part,))
    return UniPELTConfig(adapter=None, prefix=None, lora=lora, more=more)


def find_slots(model: PreTrainedModel, config: UniPELTConfig) -> list[Slot]:
    """Return all places of terms in a configuration."""
    paths = {module: path for path, module in model.named_modules()}
    plain = config.lora.projections if config.lora is not None and not config.lora.decomposed else ()
    found = []
    for stack in find_stacks(model, config):
        own = "decoder" if stack.causal else "encoder"
        for index, layer in stack.layers.items():
            for part, place in ((own, layer.attention), ("cross", layer.cross)):
                here = zip(ENTRY_PLACES, (place.query, place.value), strict=True) if place is not None else ()
                for name, projection in here:
                    if name in plain:
                        found.append(Slot(paths[projection.module], f"lora_{name}", projection, part, index))
            for term in (*layer.terms, *layer.low_rank):
                part = "cross" if term.in_cross else own
                found.append(Slot(paths[term.projection.module], term.name, term.projection, part, index))
    return found


def find_places(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the injected parameters of terms and prompts, as views.

    Args:
        model: an injected model.

    Returns:
        Views without gradient by name: `HOST.lora_query.A` for a factor of a term, `HOST.prompt.embedding`.
    """
    found = {
        join(placed.path, placed.term.name, name): tensor
        for placed in placed_terms(model)
        for name, tensor in placed.factors().items()
    }
    for own in own_parts(model):
        if own.part.kind == "prompt":
            found[join(own.room.rpartition(".")[0], own.part.name)] = own.tensor
    return found


def possible_slots(
    model: PreTrainedModel, part: LoRAConfig | IA3Config, places: Iterable[Place], *, least: Collection[str] = ()
) -> list[Slot]:
    """Return all slots of a submodule among these places, as far as the model has them.

    Raises `InjectionError` if the model has no place of `least`.
    """
    there: list[Place] = []
    for place in places:
        try:
            find_stacks(model, alone(replace(part, places=(place,))))
        except InjectionError:
            if place in least:
                raise
            continue
        there.append(place)
    return find_slots(model, alone(replace(part, places=tuple(there))))


def place_exactly(
    model: PreTrainedModel, part: LoRAConfig | IA3Config | LNTuningConfig, terms: Set[str], what: str
) -> UniPELTConfig:
    """Return the configuration with exactly these terms, given by path. Raises `CheckpointError` if there is none."""
    whole = alone(part)
    there: dict[str, set[int]] = {"encoder": set(), "decoder": set(), "cross": set()}
    here: dict[str, set[int]] = {side: set() for side in there}  # layers with a term
    for slot in find_slots(model, whole):
        there[slot.part].add(slot.layer)
        if f"{slot.path}.{slot.name}" in terms:
            here[slot.part].add(slot.layer)
    chosen = [side for side in there if here[side]]
    layers = {index for side in chosen for index in here[side]}
    config = replace(
        whole,
        layers=None if all(here[side] == there[side] for side in chosen) else tuple(sorted(layers)),
        encoder=bool(here["encoder"]) or not there["encoder"],
        decoder=bool(here["decoder"]) or not there["decoder"],
        cross=bool(here["cross"]) or not there["cross"],
    )
    try:
        meant = {f"{slot.path}.{slot.name}" for slot in find_slots(model, config)}
    except InjectionError:
        meant = set()
    if odd := sorted(meant ^ terms):
        raise CheckpointError(
            f"{what} goes to the same projections of all its layers here, and {show(odd[0])} stands out: it is one "
            "without the others, or in a layer that another part of the model leaves out"
        )
    return config


def check_saved(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for a saved tensor without a parameter of the same name and shape in the model."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in saved.items():
        if name not in parameters:
            raise CheckpointError(f"this {type(model).__name__} has no parameter {show(name)}")
        check_tensor(name, tensor, tuple(parameters[name].shape))


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `CheckpointError` for a tensor of another shape, or not of floating-point numbers."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{show(name)} is {tuple(tensor.shape)} there and should be {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{show(name)} holds {tensor.dtype}, not floating-point numbers")
