"""Replace the numbers of an injected model's submodules by those of another checkpoint, in place."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from unipelt.checkpoint.base_model import check_base
from unipelt.checkpoint.load import mismatch
from unipelt.checkpoint.manifest import CheckpointError, warn_of_nonfinite
from unipelt.checkpoint.peft_form import read_folder
from unipelt.files.messages import show_path
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of


def swap(model: PreTrainedModel, folder: str | Path, *, compare_base: bool = True) -> PreTrainedModel:
    """Replace the numbers of the submodules and of the head by those of another checkpoint of the same method.

    The parameters stay the same objects, and only their numbers change. So a compiled model is not compiled again, and
    a server can change the task between two requests. Wait for the passes that run before you call it.

    Args:
        model: an injected model, changed in place.
        folder: a folder as for `unipelt.load`, of the same method, in the same form (deployed or not), not folded.
        compare_base: compare the fingerprint of the base, for which all its weights are read. Leave this out for
            checkpoints that you know.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is damaged, or is of another method, form or base. The model is unchanged.
        ValueError: the model carries no submodules, or PEFT holds them.
    """
    injection = injection_of(model)
    manifest, tensors = read_folder(Path(folder))
    where = f"the checkpoint in {show_path(folder)}"
    if injection.folded is not None or manifest["folded"] is not None:
        raise CheckpointError(f"{where} or this model is folded, and constants are no numbers to swap; load it instead")
    if manifest["format"] == 1:
        raise CheckpointError(f"{where} is of an old format; load it onto a base, save it again, and swap that")
    if manifest["unipelt"] != injection.config:
        raise CheckpointError(f"{where} is of another method than this model; unipelt.remove(model), then load it")
    if manifest["deployed"] != injection.deployed:
        forms = ("deployed", "not deployed") if manifest["deployed"] else ("not deployed", "deployed")
        raise CheckpointError(
            f"{where} is {forms[0]}, and this model is {forms[1]}; save both in one form (unipelt.save, deploy=...)"
        )
    held = set(kept_names(model))
    if manifest["head"] is None:  # the checkpoint has no head, so the model keeps its own
        held -= injection.head
    places = {name: parameter for name, parameter in model.named_parameters() if name in held}
    if problem := mismatch(places, tensors):
        raise CheckpointError(f"{where} does not fit this {type(model).__name__}: {problem}")
    if compare_base and "fingerprint" in manifest["base"]:
        check_base(model, manifest["base"])
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    warn_of_nonfinite(tensors, where)
    return model
