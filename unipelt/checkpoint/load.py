"""Load what was trained onto its base model, or the base model with it."""

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
from unipelt.files.messages import show, show_path
from unipelt.gates.measure import FoldError
from unipelt.gates.merge import fold_constants
from unipelt.hosts.locate import InjectionError
from unipelt.injection.draft import draft, shapes
from unipelt.injection.inject import inject_as, remove
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of, is_injected


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put what `save` wrote onto a base model that the caller holds, in place.

    Args:
        model: the base model that it was trained on, with the same head class; nothing injected yet.
        folder: what `save`, or a Trainer, wrote; or a folder that PEFT wrote for type `UNIPELT`, which does not say
            how to tell another base of the same shapes.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is broken, or belongs to another model.
        InjectionError: the model carries submodules already. After any error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"load takes a PreTrainedModel of transformers, not {type(model).__name__}")
    manifest, tensors = read_folder(Path(folder))
    if "fingerprint" in manifest["base"]:
        check_base(model, manifest["base"])
    if problem := _unknown_name(model, manifest):
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {problem}")
    try:
        if not is_injected(model):
            drafts = draft(model, manifest["unipelt"], manifest["deployed"])
            if manifest["format"] == 1:
                tensors, manifest["folded"] = renamed(drafts, tensors, manifest["folded"])
            if problem := _mismatch(shapes(drafts), tensors, also=False):
                raise CheckpointError(f"the checkpoint in {folder} does not fit its own configuration: {problem}")
        head = None if manifest["head"] is None else frozenset(manifest["head"])
        inject_as(model, manifest["unipelt"], deployed=manifest["deployed"], head=head)
    except InjectionError as error:
        if is_injected(model):
            raise
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {error}") from error
    bind(model)
    injection = injection_of(model)
    injection.unfrozen = frozenset(manifest["unfrozen"])
    injection.vocabulary = frozenset(manifest["vocabulary"])
    changed = injection.unfrozen | injection.vocabulary
    held = {*kept_names(model), *changed}
    if manifest["head"] is None:  # it holds none, and the base's own is kept
        held -= injection.head
    places = {name: parameter for name, parameter in model.named_parameters() if name in held}
    if problem := _mismatch(places, tensors):
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
    """The whole model again: base model and head class restored, submodules loaded, in evaluation mode.

    Args:
        source: a folder that `save`, or a Trainer, wrote; or, as a text, what `push_to_hub` made, `user/name`. Of
            that, only the manifest and the weights are read. Or a folder of PEFT's, as `load` takes it.
        revision: of a checkpoint on the hub: a branch, a tag or a commit; by default `main`.
        base: where the base model is, if it is not where the checkpoint says. It must be the same base.
        base_revision: of a base on the hub; by default the commit that was trained on.
        token: of the hub; by default that of the environment or of the last login.
        cache_dir: where files of the hub are kept; by default the hub's own cache.
        local_files_only: ask no hub, and take what is in the cache.
        kwargs: passed on to the base's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`,
            `quantization_config`, …). The base is read from safetensors only; say `use_safetensors=False` to allow a
            pickle.

    Raises:
        HubError: `source` is on no disk and cannot be had from the hub.
        ValueError: a revision of a folder was asked for.
        CheckpointError: as `load`; or the base is not to be had, which is an `OSError` too.
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
    """A parameter that the manifest names and the model does not have."""
    there = {name for name, _ in model.named_parameters()}
    for key in ("head", "unfrozen", "vocabulary"):
        if unknown := sorted(set(manifest[key] or ()) - there):
            return f"{key} names {show(unknown[0])}, which this {type(model).__name__} does not have"
    return None


def _mismatch(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], also: bool = True) -> str | None:
    """Return what is wrong between parameters and the tensors for them, or None.

    Args:
        places: the parameters by name.
        tensors: the tensors by name.
        also: whether there must be no other tensors.
    """
    if missing := sorted(places.keys() - tensors.keys()):
        return f"it lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if also and (extra := sorted(tensors.keys() - places.keys())):
        return f"the model has no {show(extra[0])}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
    for name, place in places.items():  # in the model's order: that of a file is another each time
        tensor = tensors[name]
        if tensor.shape != place.shape:
            return f"{name} is {show(tuple(tensor.shape))} there and {tuple(place.shape)} here"
        if not tensor.is_floating_point():
            return f"{name} holds {tensor.dtype}, not floating-point numbers"
    return None
