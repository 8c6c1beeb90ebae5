"""Build PEFT's layers for the targets of a stack, with PEFT's own tuner.

The tuner works on a skeleton: a module that holds stand-ins for the projections, at the projections' own names, and
nothing else. So a tuner with state for all its layers (VeRA, VB-LoRA and others) is built as PEFT builds it, and the
model itself does not change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.config.peft_types import find_tuner, peft_config
from unipelt.config.schema import ConfigError
from unipelt.files.messages import shorten
from unipelt.hosts.locate import InjectionError
from unipelt.hosts.quantised import describe_numbers, is_quantised, template_for
from unipelt.hosts.targets import StackTargets, TermTarget
from unipelt.submodules.outputs import OutputSlice, matrix_of, own_rows
from unipelt.submodules.peft_term import HostProjection, PeftTerm

ADAPTER = "default"
"""PEFT's name of the adapter in its layers."""

PeftTerms = Mapping[tuple[nn.Module, str], PeftTerm]
"""The terms of PEFT's tuners, by host and name of the term."""


def build_peft_terms(
    model: PreTrainedModel, found: StackTargets, config: UniPELTConfig, device: str | None = None
) -> PeftTerms:
    """Build the terms of all tuners in a stack; the model does not change.

    Args:
        model: the model.
        found: the targets in the stack.
        config: configuration of the submodules.
        device: device of the parameters; None for the device of the projections. On `meta`, layers are built with
            their numbers first, because the shapes of some depend on the weight.

    Raises:
        InjectionError: PEFT is not installed, refuses an option or a projection, or would change the base.
    """
    built: dict[tuple[nn.Module, str], PeftTerm] = {}
    parts = [part for part in config.more if isinstance(part, PeftTermConfig)]
    if not parts:
        return built
    order = {module: path for path, module in model.named_modules()}
    index = {path: number for number, path in enumerate(order.values())}
    for part in parts:
        targets = [
            (order[target.projection.module], order[layer.module], target)
            for layer in found.layers.values()
            for target in layer.terms
            if target.config is part
        ]
        targets.sort(key=lambda one: index[one[0]])  # as PEFT goes through a model
        if not targets:
            continue
        terms = {}
        for target, layer in _layers_of(part, targets):
            projection = target.projection
            host = HostProjection(projection.module, projection.rows, projection.inputs)
            term = PeftTerm(target.name, part.name, layer, host, part.type)
            like = template_for(projection.module.weight, model.dtype, config.dtype)
            for tensor in (*term.parameters(), *term.buffers()):
                tensor.data = tensor.data.to(like.dtype) if tensor.is_floating_point() else tensor.data
            # the tuner leaves some of its buffers on the CPU
            terms[projection.module, target.name] = term.to(projection.module.weight.device)
        writes = _probe(part, next(iter(terms.values())))
        for key, term in terms.items():
            term.layer.base_layer.copies = writes
            built[key] = term if device is None else term.to(device)
    return built


def _probe(part: PeftTermConfig, term: PeftTerm) -> bool:
    """Call one layer. Return whether it writes to the host's output. Raise `InjectionError` if it cannot be called."""
    try:
        return term.writes_in_place(term.layer.base_layer.weight)
    except Exception as error:  # PEFT's layers raise errors of every kind
        raise InjectionError(
            f"{part.name}: a layer of PEFT's {part.type} cannot be called with the input of a projection alone: "
            f"{shorten(error)}"
        ) from error


def _layers_of(part: PeftTermConfig, targets: list[tuple[str, str, TermTarget]]) -> list[tuple[TermTarget, Any]]:
    """Build PEFT's layer for each target.

    Args:
        part: the configuration of the tuner.
        targets: path of the host, path of its layer, and target.

    Returns:
        Each target with its layer.
    """
    shared = [path for path, _, _ in targets]
    hosts = {}
    for path, layer_path, target in targets:
        _check_host(part, path, target.projection.module)
        # several projections may be slices of one module
        name = path if shared.count(path) == 1 else f"{path}.{target.place}"
        hosts[name] = Place(layer_path, target.place, target.projection.module, target.projection.rows)
    skeleton, stand_ins = make_skeleton(hosts)
    before = {name: stand_in.weight.data_ptr() for name, stand_in in stand_ins.items()}
    try:
        wanted = peft_config(part, ends_by_place(hosts))
        _, tuner = find_tuner(part.type)
    except (ConfigError, ImportError) as error:
        raise InjectionError(str(error)) from error
    try:
        with torch.no_grad(), _keep_environment():
            tuner(skeleton, wanted, ADAPTER)
    except Exception as error:  # PEFT's tuners raise errors of every kind
        raise InjectionError(f"{part.name}: PEFT cannot build its {part.type} here: {shorten(error)}") from error
    found = []
    for (_, _, target), name in zip(targets, stand_ins, strict=True):
        layer: Any = skeleton.get_submodule(name)
        if layer._modules.get("base_layer") is not stand_ins[name]:
            raise InjectionError(f"{part.name}: PEFT's {part.type} makes no layer around {name}")
        if stand_ins[name].weight.data_ptr() != before[name]:
            raise InjectionError(
                f"{part.name}: these options of PEFT's {part.type} replace the weight of {name}, and the base stays as "
                "it is; take another start (init_lora_weights)"
            )
        _hold_tensors(layer)
        found.append((target, layer))
    return found


@contextmanager
def _keep_environment() -> Iterator[None]:
    """Restore the environment variables at the end.

    PEFT's BOFT sets `CC` and `CXX` to gcc, and keeps them so if it cannot compile its kernel. Then `torch.compile`
    makes libraries that cannot be loaded.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _check_host(part: PeftTermConfig, path: str, host: Any) -> None:
    """Raise `InjectionError` for a projection whose weight has no numbers to build a layer from."""
    if is_quantised(host.weight):
        raise InjectionError(
            f"{path} is quantised ({describe_numbers(host.weight)}), and a layer of PEFT's ({part.name}) is built from "
            "a weight of plain numbers; take lora, or a base of plain weights"
        )
    if host.weight.is_meta and torch.get_default_device().type != "meta":
        raise InjectionError(
            f"{path} is on the device meta, and a layer of PEFT's ({part.name}) is built from the numbers of the "
            "weight; load the model without offloading"
        )


@dataclass(frozen=True)
class Place:
    """The place of one of PEFT's layers.

    Attributes:
        layer: path of the layer, from the model.
        place: name of the place.
        host: the module of the projection.
        rows: the outputs of the host that belong to the projection.
    """

    layer: str
    place: Any
    host: Any
    rows: OutputSlice


def make_skeleton(places: Mapping[str, Place]) -> tuple[nn.Module, dict[str, nn.Linear]]:
    """Return a module that holds a Linear for each place at its name, and these by name.

    Each Linear has the numbers of its projection, in the same memory where possible.
    """
    skeleton, stand_ins = nn.Module(), {}
    for name, place in places.items():
        weight = matrix_of(place.host, place.rows).detach()
        outputs, inputs = weight.shape
        stand_in = nn.Linear(inputs, outputs, bias=place.host.bias is not None, device="meta")
        stand_in.weight = nn.Parameter(weight, requires_grad=False)
        if place.host.bias is not None:
            stand_in.bias = nn.Parameter(own_rows(place.host.bias, place.rows).detach(), requires_grad=False)
        stand_ins[name] = stand_in
        _place(skeleton, name, stand_in)
    return skeleton, stand_ins


def ends_by_place(places: Mapping[str, Place]) -> dict[Any, set[str]]:
    """Return the names of projections without the path of the layer, by place: the names that PEFT matches."""
    ends: dict[Any, set[str]] = {}
    for name, place in places.items():
        ends.setdefault(place.place, set()).add(name.removeprefix(f"{place.layer}."))
    return ends


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with empty modules on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    root.add_module(last, module)


def _hold_tensors(layer: nn.Module) -> None:
    """Turn a layer's dicts of tensors into modules with buffers, which move with the model and are saved."""
    from peft.tuners._buffer_dict import BufferDict

    for name, value in list(vars(layer).items()):
        if name.startswith("_") or not isinstance(value, dict) or not value:
            continue
        if all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
            del vars(layer)[name]
            layer.add_module(name, BufferDict(value))
