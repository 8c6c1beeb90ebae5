"""Average the experts of random mixtures into ordinary submodules (AdaMix)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from unipelt.bridges.plain_model import MergeError
from unipelt.checkpoint.bind import bind
from unipelt.config.methods import UniPELTConfig
from unipelt.injection.inject import inject_as, strip
from unipelt.injection.state import injection_of
from unipelt.submodules.mixture import EXPERTS
from unipelt.submodules.room import DEFAULT, OwnPart, own_parts, rooms

_EXPERT = re.compile(rf"(.+)\.{re.escape(EXPERTS)}\.\d+\.(.+)")

Key = tuple[str, bool, str]
"""A part of a set: path of its room, whether it belongs to the cross-attention, and its name."""


def merge_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Replace each mixture with the router `random` by one submodule, in place (AdaMix; Wang et al., 2022, 3.3).

    Each parameter becomes the mean of that parameter over the experts. A model in evaluation mode computes with these
    means anyway, so its outputs do not change, except by rounding. The result is an ordinary model with submodules of
    the ordinary size: it can be saved, loaded, trained, folded, merged into the weights and written for PEFT as one
    that never had a mixture. A mean is trainable if one of its experts was. Other mixtures stay as they are.

    Args:
        model: an injected model.

    Returns:
        The same model.

    Raises:
        MergeError: the model has no such mixture; is a task of `unipelt.Tasks`, has several sets, or is folded. The
            model is unchanged.
        ValueError: the model carries no submodules.
    """
    injection = injection_of(model)
    config, merged = _without_random(injection.config)
    if not merged:
        raise MergeError("this model has no mixture with the router random; other routers depend on the text")
    if injection.shares:
        raise MergeError(
            "this model shares its base with other tasks; save it, and merge what unipelt.from_pretrained gives"
        )
    if others := sorted({name for _, room in rooms(model) for name in room} - {DEFAULT}):
        raise MergeError(f"merge_experts takes a model with one set, and this has {', '.join(others)} too")
    if injection.folded is not None:
        raise MergeError("this model is folded; merge the experts of the model before folding")
    experts = _parts(model, config, merged)
    values = {key: torch.stack([own.tensor for own in parts]).mean(dim=0) for key, parts in experts.items()}
    trains = {key: any(own.parameter.requires_grad for own in parts) for key, parts in experts.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    strip(model)
    inject_as(model, config, deployed=injection.deployed, head=injection.head)
    changed = injection_of(model)
    for field in ("required_grad", "replaced", "originals", "unfrozen", "vocabulary"):
        setattr(changed, field, getattr(injection, field))
    bind(model)
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.grad = None
            parameter.requires_grad_(flags[name])
    training: dict[str, bool] = {}  # a parameter trains if one of its parts did
    for own in own_parts(model):
        key = own.room, own.cross, own.part.name
        own.tensor.copy_(values[key])
        training[own.full_name] = training.get(own.full_name, False) or trains[key]
        own.parameter.requires_grad_(training[own.full_name])
    return model


def _without_random(config: UniPELTConfig) -> tuple[UniPELTConfig, set[str]]:
    """Return a configuration without mixtures at random, and the names of the submodules that had one."""
    merged = set()

    def single(name: str, part: Any) -> Any:
        if part is None or part.mixture is None or part.mixture.router != "random":
            return part
        merged.add(name)
        return replace(part, mixture=None)

    more = tuple(single(part.name, part) for part in config.more)
    adapter, lora = single("adapter", config.adapter), single("lora", config.lora)
    return replace(config, adapter=adapter, lora=lora, more=more), merged


def _parts(model: PreTrainedModel, config: UniPELTConfig, merged: set[str]) -> Mapping[Key, list[OwnPart]]:
    """Return the parts that become one, by their name after the merge: the experts' parts, or one part alone."""
    found: dict[Key, list[OwnPart]] = {}
    for own in own_parts(model):
        name, match = own.part.name, _EXPERT.fullmatch(own.part.name)
        if match is not None and own.part.kind in merged:
            plain = own.part.kind == "adapter" or (own.part.kind == "lora" and not config.lora.is_function)  # type: ignore[union-attr]
            name = f"{match[1]}.{match[2]}" if plain else f"{match[1]}.function.{match[2]}"
        found.setdefault((own.room, own.cross, name), []).append(own)
    return found
