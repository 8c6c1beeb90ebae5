"""Load a checkpoint onto its base model, with or without building the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unipelt.checkpoint.base_model import build_base, check_base, find_base
from unipelt.checkpoint.bind import bind
from unipelt.checkpoint.format_1 import renamed
from unipelt.checkpoint.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    find_checkpoint,
    warn_of_nonfinite,
)
from unipelt.checkpoint.peft_form import build_base_of_peft, read_folder
from unipelt.config.schema import ConfigError
from unipelt.files.messages import show, show_path
from unipelt.gates.measure import FoldError
from unipelt.gates.merge import fold_constants
from unipelt.hosts.locate import InjectionError
from unipelt.injection.draft import draft, shapes
from unipelt.injection.inject import inject_as, remove
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of, is_injected
from unipelt.submodules.room import own_buffers


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Load a checkpoint of `save` onto a base model in memory, in place.

    Args:
        model: the base model of the training, with the same head class and without submodules.
        folder: a folder that `save` or a Trainer wrote; or a folder that PEFT wrote for type `UNIPELT`. A folder of
            PEFT holds no fingerprint, so another base of the same shapes is not recognised.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is damaged, or belongs to another model.
        InjectionError: the model carries submodules already. After any error the model is unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"load takes a PreTrainedModel of transformers, not {type(model).__name__}")
    manifest, tensors = read_folder(Path(folder))
    if "fingerprint" in manifest["base"] and not is_injected(model):  # injecting raises the error
        check_base(model, manifest["base"])
    if problem := _unknown_name(model, manifest):
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {problem}")
    try:
        if not is_injected(model):
            drafts = draft(model, manifest["unipelt"], manifest["deployed"])
            if manifest["format"] == 1:
                tensors, manifest["folded"] = renamed(drafts, tensors, manifest["folded"])
            if problem := mismatch(shapes(drafts), tensors, also=False):
                raise CheckpointError(f"the checkpoint in {folder} does not fit its own configuration: {problem}")
        head = None if manifest["head"] is None else frozenset(manifest["head"])
        inject_as(model, manifest["unipelt"], deployed=manifest["deployed"], head=head)
    except (ConfigError, InjectionError) as error:  # a size that does not suit the width of a place is a ConfigError
        if is_injected(model):
            raise
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {error}") from error
    bind(model)
    injection = injection_of(model)
    injection.unfrozen = frozenset(manifest["unfrozen"])
    injection.vocabulary = frozenset(manifest["vocabulary"])
    changed = injection.unfrozen | injection.vocabulary
    held = {*kept_names(model), *changed}
    if manifest["head"] is None:  # without a head in the checkpoint, the base's head is kept
        held -= injection.head
    places: dict[str, Tensor] = {name: parameter for name, parameter in model.named_parameters() if name in held}
    places |= own_buffers(model)
    if problem := mismatch(places, tensors):
        remove(model)
        raise CheckpointError(f"the checkpoint in {folder} does not fit this {type(model).__name__}: {problem}")
    injection.originals |= {name: p.detach().cpu().clone() for name, p in places.items() if name in changed}
    try:
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
        warn_of_nonfinite(tensors, f"the checkpoint in {show_path(folder)}")
        if manifest["folded"] is not None:
            fold_constants(model, manifest["folded"])
    except BaseException as error:
        remove(model)
        if isinstance(error, FoldError):
            raise CheckpointError(f"the checkpoint in {folder} cannot be folded again: {error}") from error
        raise
    return model


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Build the base model with its head class, and load a checkpoint onto it; the model is in evaluation mode.

    Args:
        source: a folder that `save` or a Trainer wrote; a folder in PEFT's form, as in `load`; or, as a string, the
            name `user/name` of a repository that `push_to_hub` made. Only the manifest and the weights are read from
            the hub.
        revision: a branch, a tag or a commit of a checkpoint on the hub; by default `main`.
        base: the location of the base model, if it differs from that in the checkpoint. It must be the same base.
        base_revision: the revision of a base on the hub; by default the commit of the training.
        token: the token of the hub; by default that of the environment or of the last login.
        cache_dir: the folder for files of the hub; by default the hub's own cache.
        local_files_only: read only the cache, without a request to the hub.
        kwargs: passed to the base's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`,
            `quantization_config`, …). The base is read from safetensors only; `use_safetensors=False` allows a pickle.

    Raises:
        HubError: `source` is not on the disk and cannot be fetched from the hub.
        ValueError: a revision was given for a folder.
        CheckpointError: see `load`; or the base cannot be found or read, which is an `OSError` too.
    """
    shared: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = (MANIFEST, WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    folder = find_checkpoint(source, files, revision, **shared)
    manifest, tensors = read_folder(folder)
    described = manifest["base"]
    name, commit = find_base(source, described, base, base_revision)
    if "config" in described:
        model = build_base(source, described, tensors, name, commit, **shared, **kwargs)
    else:
        model = build_base_of_peft(source, described, name, commit, **shared, **kwargs)
    return load(model, folder).eval()


def _unknown_name(model: PreTrainedModel, manifest: Mapping[str, Any]) -> str | None:
    """Return a message on a parameter that the manifest names and the model does not have, or None."""
    there = {name for name, _ in model.named_parameters()}
    for key in ("head", "unfrozen", "vocabulary"):
        if unknown := sorted(set(manifest[key] or ()) - there):
            return f"{key} names {show(unknown[0])}, which this {type(model).__name__} does not have"
    return None


def mismatch(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], also: bool = True) -> str | None:
    """Return a message on the first difference between parameters and the tensors for them, or None.

    Args:
        places: the parameters by name.
        tensors: the tensors by name.
        also: whether other tensors are an error.
    """
    if missing := sorted(places.keys() - tensors.keys()):
        return f"it lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if also and (extra := sorted(tensors.keys() - places.keys())):
        return f"the model has no {show(extra[0])}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
    for name, place in places.items():  # in the model's order, since the order in a file varies
        tensor = tensors[name]
        if tensor.shape != place.shape:
            return f"{name} is {show(tuple(tensor.shape))} there and {tuple(place.shape)} here"
        if tensor.is_floating_point() != place.is_floating_point():
            kind = "floating-point" if place.is_floating_point() else "whole"
            return f"{name} holds {tensor.dtype}, not {kind} numbers"
    return None
