"""Save the trained parameters, without the frozen base.

A folder holds `model.safetensors` (submodules, gates, head, trained biases), `unipelt.json` (method and base) and
`README.md` (a model card). It has no `config.json`, so that Transformers does not load it as a whole model by mistake.
The checkpoints of a Trainer have the same form. Beside it, `save_beside` writes the form of PEFT's, which Transformers
reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from unipelt.checkpoint.base_model import base_location, base_origin, describe_base
from unipelt.checkpoint.manifest import (
    ADAPTER_WEIGHTS,
    FORMAT,
    MANIFEST,
    NEXT,
    WEIGHTS,
    finish_interrupted_save,
    warn_of_nonfinite,
)
from unipelt.checkpoint.model_card import model_card
from unipelt.checkpoint.peft_form import (
    check_carried,
    check_type,
    find_uncarried_of,
    remove_folder,
    write_folder,
)
from unipelt.files.atomic import write_whole
from unipelt.files.messages import show_path
from unipelt.hosts.vocabulary import resized_vocabulary
from unipelt.injection.parameters import is_sharded, kept_names, parameter_counts, unfrozen_names
from unipelt.injection.state import injection_of
from unipelt.submodules.entry import Entry, join_rows
from unipelt.submodules.prefix import Prefix, PrefixNetwork
from unipelt.submodules.room import own_buffers, own_parameters

CARD = "README.md"


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    deploy: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    peft: bool = False,
) -> Path:
    """Write the trained parameters: submodules, gates, head, trained biases. The frozen base is not written.

    The embedding rows of a resized vocabulary (`resize_token_embeddings`) are written too, trained or not, because the
    base does not hold them.

    Args:
        model: an injected model.
        folder: created if absent; other files in the folder are left alone, except that PEFT's form of an older
            checkpoint (`save_pretrained`) is removed. A failed write leaves no partial file. The manifest, which holds
            the SHA-256 of the weights, is written after the weights.
        deploy: fold the prefix's reparameterisation network away. The logits stay the same, the prefix is smaller, and
            further training trains the prefix directly. A folded model is saved in this form, with the parameters from
            before folding and the constants of the gates: loading folds the model again.
        state_dict: the model's whole state dict, if it had to be gathered from several processes.
        base: the public name of the base model (`user/name` on the hub), in place of its location on this machine.
        base_revision: a branch, a tag or a commit of `base`.
        peft: write the form of PEFT's type `UNIPELT` instead: `adapter_model.safetensors` and `adapter_config.json`.
            Both `peft.PeftModel.from_pretrained` and `unipelt.load` read this form. It holds no fingerprint of the
            base.

    Returns:
        The folder.

    Raises:
        ValueError: the model carries no submodules; or PEFT cannot hold the model, and the message gives the reason.
        OSError: the folder cannot be written.
    """
    injection = injection_of(model)
    injection.vocabulary |= resized_vocabulary(model)  # the base may be resized after `inject`
    whole: Mapping[str, Any] = dict(model.named_parameters()) if state_dict is None else state_dict
    if sharded := [name for name, tensor in whole.items() if is_sharded(tensor)]:
        raise ValueError(
            f"each process holds only a part of {sharded[0]!r}; gather the state dict in all (get_model_state_dict of "
            "torch.distributed.checkpoint.state_dict, with full_state_dict) and pass it on as state_dict"
        )
    folder = Path(folder)
    if peft:
        check_carried(model, folder)
    tensors = _trained_tensors(model, whole, deploy=deploy)
    warn_of_nonfinite(tensors, f"what is saved to {show_path(folder)}")
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; save needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    deployed = (deploy or injection.deployed) and injection.config.prefix is not None
    remove_folder(folder)
    if peft:
        origin = base_origin(model) | base_location(model, base, base_revision)
        write_folder(model, folder, tensors, origin, deployed=deployed)
        described = {"base": origin, "deployed": deployed, "weights": {"file": ADAPTER_WEIGHTS}}
        write_whole(folder / CARD, model_card(injection.config, parameter_counts(model), described).encode())
        return folder
    weights = dump_tensors(tensors, metadata={"format": "pt"})
    manifest = {
        "format": FORMAT,
        "unipelt": injection.config.to_dict(),
        "deployed": deployed,
        "head": sorted(injection.head),
        "unfrozen": sorted(unfrozen_names(model)),
        "vocabulary": sorted(injection.vocabulary),
        "base": describe_base(model, whole) | base_location(model, base, base_revision),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    if injection.folded is not None:
        manifest["folded"] = injection.folded.constants
    text = json.dumps(manifest, indent=2) + "\n"
    # The manifest names the valid weights by their SHA-256: the old ones until it is replaced, then the new ones,
    # under either file name. So an interrupted save leaves one whole checkpoint, the old or the new.
    finish_interrupted_save(folder)
    write_whole(folder / NEXT, weights)
    try:
        write_whole(folder / MANIFEST, text.encode())
    except OSError:
        (folder / NEXT).unlink(missing_ok=True)
        raise
    os.replace(folder / NEXT, folder / WEIGHTS)
    write_whole(folder / CARD, model_card(injection.config, parameter_counts(model), manifest).encode())
    return folder


def save_beside(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the checkpoint of `save`, and beside it the form of PEFT's type `UNIPELT`, if PEFT's form can hold it.

    With PEFT's form, `from_pretrained` of Transformers reads the folder, and so does every library that calls it, such
    as sentence-transformers. An interrupted write leaves no form of PEFT's of another model.

    Raises:
        FileExistsError: the folder holds an adapter of another type of PEFT's. Nothing was written.
        ValueError, OSError: as `save`.
    """
    folder = Path(folder)
    carried = find_uncarried_of(model) is None
    if carried:
        check_type(folder)
    save(model, folder)
    if not carried:
        return
    injection = injection_of(model)
    tensors = _trained_tensors(model, dict(model.named_parameters()), deploy=False)
    origin = base_origin(model) | base_location(model, None, None)
    deployed = injection.deployed and injection.config.prefix is not None
    write_folder(model, folder, tensors, origin, deployed=deployed)


def _trained_tensors(model: PreTrainedModel, whole: Mapping[str, Tensor], *, deploy: bool) -> dict[str, Tensor]:
    folded = injection_of(model).folded
    # a folded model is saved with its tensors from before folding: its present parameters have other names and shapes
    left_out = own_parameters(model).keys() if folded else set()
    tensors = {name: whole[name] for name in kept_names(model) if name not in left_out}
    tensors |= folded.tensors if folded else {}
    if deploy:
        networks = {module: path for path, module in model.named_modules() if isinstance(module, PrefixNetwork)}
        prefixes = {}
        for network, path in networks.items():
            weights = {name: whole[f"{path}.{name}"] for name, _ in network.named_parameters()}
            with torch.no_grad():
                prefixes[network] = functional_call(network, weights)
        for path, module in model.named_modules():
            for network in module.network if isinstance(module, Prefix) else ():
                tensors[f"{path}.keys_values"] = prefixes[network][module.index]
        for path in networks.values():
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.")}
    for path, module in model.named_modules():
        if isinstance(module, Entry):
            join_rows(module, tensors, f"{path}.", None)
    tensors |= own_buffers(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
