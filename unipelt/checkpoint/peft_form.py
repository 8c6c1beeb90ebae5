"""Read and write a folder in PEFT's form of type `UNIPELT`: `adapter_config.json` and `adapter_model.safetensors`.

PEFT writes such a folder for a `PeftModel`, and `save` writes one with `peft=True`. This module does not need PEFT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import transformers
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.checkpoint.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FORMAT,
    MANIFEST,
    MOST_BYTES,
    CheckpointError,
    MissingBaseError,
    read_checkpoint,
)
from unipelt.config.methods import UniPELTConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.files.atomic import write_whole
from unipelt.files.messages import shorten, show, show_path
from unipelt.files.strict import read_bytes
from unipelt.injection.balance_hooks import balances
from unipelt.injection.parameters import unfrozen_names
from unipelt.injection.state import injection_of
from unipelt.submodules.room import DEFAULT, ROOM

TYPE = "UNIPELT"
"""PEFT's name of the method."""
_PREFIX = "base_model.model."  # PEFT's prefix of every name in a file
_PICKLE = "adapter_model.bin"
_TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "TOKEN_CLS": ("AutoModelForTokenClassification", transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING),
    "CAUSAL_LM": ("AutoModelForCausalLM", transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    "FEATURE_EXTRACTION": ("AutoModel", transformers.MODEL_MAPPING),
}
"""PEFT's tasks: for each task, the auto class that builds a base, and its model classes by configuration."""
_AUTO = {auto for auto, _ in _TASKS.values()}


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read manifest and tensors of a checkpoint, or of a folder in PEFT's form, in the form of `read_checkpoint`.

    A folder in PEFT's form holds no configuration and no fingerprint of the base: they are left out of the manifest.
    The head is None if the folder holds none and the method trains none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is damaged, or belongs to another method of PEFT.
    """
    # False for a name that is too long for the system, where Path.is_file would fail
    if os.path.isfile(folder / MANIFEST) or not os.path.isfile(folder / ADAPTER_CONFIG):
        return read_checkpoint(folder)
    try:
        return _read(folder)
    except ConfigError as error:
        raise CheckpointError(f"{show_path(folder / ADAPTER_CONFIG)} cannot be read: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = read_mapping(folder / ADAPTER_CONFIG, MOST_BYTES)
    if values.get("peft_type") != TYPE:
        raise CheckpointError(
            f"{show_path(folder)} is a folder of PEFT's, and its peft_type is {show(values.get('peft_type'))}, not "
            f"{TYPE}; unipelt.load_peft reads LoRA, (IA)3 and prompts of PEFT's"
        )
    if values.get("trainable_token_indices"):
        raise CheckpointError(
            f"{show_path(folder)} holds single rows of the embeddings (trainable_token_indices), which PEFT "
            "trained beside the method; load it with PEFT"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise CheckpointError(
                f"{show_path(folder)} holds {_PICKLE}, a pickle, which is not read; save it from PEFT again, with "
                "safe_serialization=True (the default)"
            )
        raise FileNotFoundError(f"{show_path(folder)} is no whole folder of PEFT's: it has no {ADAPTER_WEIGHTS}")
    for key, kind, what in (
        ("method", dict, "a mapping"),
        ("deployed", bool, "true or false"),
        ("head", (list, type(None)), "a list of names"),
        ("base_model_name_or_path", (str, type(None)), "a text"),
        ("revision", (str, type(None)), "a text"),
        ("task_type", (str, type(None)), "a text"),
        ("auto_mapping", (dict, type(None)), "a mapping"),
    ):
        if not isinstance(values.get(key), kind):
            raise ConfigError(f"{key} must be {what}, not {show(values.get(key))}")
    try:
        read = load_tensors(read_bytes(folder / ADAPTER_WEIGHTS))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{show_path(folder / ADAPTER_WEIGHTS)} is not a valid safetensors file: {shorten(error)}"
        ) from error
    tensors = {_our_name(name): tensor for name, tensor in sorted(read.items())}
    config = UniPELTConfig.from_dict(values["method"])
    beside = [name for name in tensors if ROOM not in name.split(".")]
    heads = tuple(f"{path}." for path in values["head"] or ())
    head = [name for name in beside if name.startswith(heads)] if config.train_head else beside
    manifest = {
        "format": FORMAT,
        "unipelt": config,
        "deployed": values["deployed"],
        "folded": None,
        "head": head if config.train_head or head else None,
        "unfrozen": [name for name in beside if name not in head],
        "vocabulary": [],
        "base": {
            "class": _class_name(values),
            "name_or_path": values.get("base_model_name_or_path") or "",
            "revision": values.get("revision"),
        },
    }
    return manifest, tensors


def build_base_of_peft(
    source: str | Path, described: Mapping[str, Any], name: str, revision: str | None, **options: Any
) -> PreTrainedModel:
    """Build the base of a folder in PEFT's form, with the configuration at the location of the base.

    Args:
        source: the location of the folder, for messages.
        described: the manifest's entry on the base, from `read_folder`.
        name: the location of the base.
        revision: the revision of a base on the hub.
        options: passed to the class's `from_pretrained`, which reads only safetensors by default.

    Raises:
        CheckpointError: the folder does not name the class of the base, or the base cannot be built.
        MissingBaseError: the base cannot be found or read.
    """
    cls: Any = getattr(transformers, described["class"], None) if described["class"] else None
    is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    if not is_model and described["class"] not in _AUTO:
        raise CheckpointError(
            f"{show_path(source)} does not say which class of transformers its base has; build the base model and call "
            "unipelt.load(model, folder)"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning on a new head: the head is loaded next
    try:
        model: PreTrainedModel = cls.from_pretrained(
            name, **{"use_safetensors": True, "trust_remote_code": False, "revision": revision or "main", **options}
        )
    except OSError as error:
        raise MissingBaseError(
            f"{show_path(source)}: its base, {show_path(name)}, cannot be had: {shorten(error)}; say base=..., where "
            "it is"
        ) from error
    except (TypeError, ValueError, LookupError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{show_path(source)}: its base cannot be built: {shorten(error)}") from error
    finally:
        logging.set_verbosity(level)
    return model


def check_carried(model: PreTrainedModel, folder: Path) -> None:
    """Raise `ValueError` if PEFT's form cannot hold the model, or the folder holds a checkpoint of another form."""
    if problem := find_uncarried_of(model):
        raise ValueError(problem)
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{show_path(folder)} holds a checkpoint of unipelt's own form; name another folder")


def find_uncarried_of(model: PreTrainedModel) -> str | None:
    """Return the reason why PEFT's form cannot hold an injected model, or None."""
    injection = injection_of(model)
    if problem := find_uncarried(injection.config):
        return problem
    if injection.folded is not None:
        return (
            "this model was folded, and a folder of PEFT's says nothing of that; call unipelt.merge, or unipelt.save "
            "without peft=True"
        )
    if also := sorted(unfrozen_names(model) | injection.vocabulary):
        return f"{also[0]} is kept beside the head, and PEFT cannot carry it; save without peft=True"
    return None


def check_type(folder: Path) -> None:
    """Raise `FileExistsError` if the folder holds an adapter of another type of PEFT's."""
    if os.path.lexists(folder / ADAPTER_CONFIG) and not _is_ours(folder):
        raise FileExistsError(
            f"{show_path(folder / ADAPTER_CONFIG)} is of another adapter of PEFT's, which is not overwritten; name "
            "another folder"
        )


def remove_folder(folder: Path) -> None:
    """Remove the files in PEFT's form that stand beside a checkpoint of `save`. Others are left alone."""
    if (folder / MANIFEST).is_file() and _is_ours(folder):
        (folder / ADAPTER_CONFIG).unlink()
        (folder / ADAPTER_WEIGHTS).unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    try:
        return bool(read_mapping(folder / ADAPTER_CONFIG, MOST_BYTES).get("peft_type") == TYPE)
    except (OSError, ConfigError):
        return False


def find_uncarried(config: UniPELTConfig) -> str | None:
    """Return the reason why PEFT's form cannot hold a method, or None."""
    for name, what in (("bitfit", "biases of the base"), ("train_base", "every weight of the base")):
        if getattr(config, name):
            return (
                f"{name} trains {what}, and PEFT has no place for a second value of those; use unipelt.inject and "
                "unipelt.save"
            )
    if config.tokens is not None:
        return "tokens trains rows of the vocabulary, and PEFT has trainable_token_indices for those; leave tokens out"
    if balances(config):
        return (
            "a mixture with balance adds to the loss of the model, and PEFT has no place for that; take balance 0, or "
            "unipelt.inject and unipelt.save"
        )
    if tuners := [part for part in config.more if isinstance(part, PeftTermConfig)]:
        return (
            f"{tuners[0].name} is a tuner of PEFT's itself, which PEFT cannot hold inside the type {TYPE}; train it "
            "alone and write it with unipelt.save_peft, or keep the model whole with unipelt.save"
        )
    return None if config.has_submodules else "this method adds nothing to a model, so PEFT has nothing to carry"


def write_folder(
    model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor], base: Mapping[str, Any], *, deployed: bool
) -> None:
    """Write a folder in PEFT's form.

    Args:
        model: an injected model that passed `check_carried`.
        folder: an existing folder.
        tensors: the trained parameters, by the model's names, on the CPU.
        base: class, location and revision of the base, from `base_origin`.
        deployed: whether prefixes have the deployed form.
    """
    injection = injection_of(model)
    held = dict.fromkeys(name.rpartition(".")[0] for name in sorted(injection.head))
    whole = dict(tensors)
    for path in held:
        for name, tensor in model.get_submodule(path).state_dict(prefix=f"{path}.").items():
            if name not in whole:  # PEFT copies whole modules
                whole[name] = tensor.detach().cpu().contiguous()
    task = _task_of(model, base["class"]) if injection.config.train_head else None  # a task makes PEFT train the head
    named = {"base_model_class": base["class"], "parent_library": _module_of(base["class"])}
    values = {
        "auto_mapping": None if task else named,
        "base_model_name_or_path": base["name_or_path"] or None,
        "deployed": deployed,
        "head": list(held) if injection.config.train_head else [],
        "inference_mode": True,
        "method": injection.config.to_dict(),
        "modules_to_save": list(held) or None,
        "peft_type": TYPE,
        "revision": base["revision"],
        "task_type": task,
        "trainable_token_indices": None,
    }
    written = {_their_name(name): tensor for name, tensor in whole.items()}
    write_whole(folder / ADAPTER_WEIGHTS, dump_tensors(written, metadata={"format": "pt"}))
    write_whole(folder / ADAPTER_CONFIG, f"{json.dumps(values, indent=2)}\n".encode())


def _class_name(values: Mapping[str, Any]) -> str | None:
    """Return the name of the Transformers class that builds the base, or None if the configuration names none."""
    if values["task_type"] in _TASKS:
        return _TASKS[values["task_type"]][0]
    mapping = values["auto_mapping"] or {}
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    known = isinstance(name, str) and isinstance(library, str) and library.split(".")[0] == "transformers"
    return name if known else None


def _task_of(model: PreTrainedModel, class_name: str) -> str | None:
    """Return PEFT's task for which the auto class builds this model class, or None."""
    kind: Any = type(model.config)
    for task, (_, built) in _TASKS.items():
        if kind in built and getattr(built[kind], "__name__", None) == class_name:
            return task
    return None


def _module_of(class_name: str) -> str:
    return str(getattr(getattr(transformers, class_name, None), "__module__", "transformers"))


def _our_name(name: str) -> str:
    """Return the name here of a tensor in PEFT's file.

    `base_model.model.bert.….unipelt.up.weight` becomes `bert.….unipelt.default.up.weight`.
    """
    steps = name.removeprefix(_PREFIX).split(".")
    if ROOM in steps:
        steps.insert(steps.index(ROOM) + 1, DEFAULT)
    return ".".join(steps)


def _their_name(name: str) -> str:
    """Return the name in PEFT's file: the inverse of `_our_name`."""
    steps = name.split(".")
    if ROOM in steps:
        del steps[steps.index(ROOM) + 1]
    return _PREFIX + ".".join(steps)
