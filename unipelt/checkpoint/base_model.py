"""The base of a checkpoint: describe it in the manifest, check a model against it, and build it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.checkpoint.manifest import ALL, MANIFEST, SAMPLE, CheckpointError, MissingBaseError
from unipelt.config.schema import flatten
from unipelt.files.hub import cached_commit, may_be_base
from unipelt.files.messages import shorten, show, show_path
from unipelt.hosts.quantised import describe_numbers, is_quantised
from unipelt.hosts.vocabulary import base_vocabulary_sizes, vocabulary_sizes
from unipelt.injection.parameters import is_sharded, unfrozen_names
from unipelt.injection.state import injection_of, is_injected
from unipelt.submodules.room import own_parameters

MOST_MODULES = 1_000
"""The largest number of layers, groups or experts that `from_pretrained` builds from a manifest."""

_BLOCK = 2**24  # numbers copied to the CPU at a time

NO_MATTER = frozenset(
    {
        # names, and the versions and classes that belong to the file
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "tokenizer_class"),
        *("id2label", "label2id", "finetuning_task", "task_specific_params", "problem_type"),
        # the result is the same; the fingerprint of the weights covers type and quantisation
        *("dtype", "torch_dtype", "quantization_config", "use_cache", "chunk_size_feed_forward", "return_dict"),
        *("output_attentions", "output_hidden_states", "deterministic_flash_attn", "pretraining_tp"),
        # initial values of training, and options of generation
        *("initializer_range", "initializer_factor", "initializer_cutoff_factor", "init_std"),
        *("encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "num_beams", "early_stopping", "max_length"),
    }
)
"""Fields of a model's configuration that change no output of a given batch in evaluation mode."""
_OF_HUB = ("token", "cache_dir", "local_files_only")
_UNBUILDABLE = (TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError)
_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")  # used for positions, pooling and labels

logger = logging.get_logger(__name__)


def describe_base(model: PreTrainedModel, whole: Mapping[str, Tensor], *, covers: str = ALL) -> dict[str, Any]:
    """Return the manifest's entry on the base: class, origin, configuration, compared fields, fingerprint of weights.

    Args:
        model: an injected model.
        whole: the model's parameters by name, gathered if each process holds a part.
        covers: the numbers that the fingerprint covers, `ALL` or `SAMPLE`.
    """
    injection = injection_of(model)
    known: Mapping[str, Tensor] = injection.before
    if any(is_sharded(parameter) for parameter in model.parameters()):
        known = {**whole, **known}
    return {
        **base_origin(model),
        "config": json.loads(model.config.to_json_string(use_diff=True)),
        "computation": _computation(model),
        "fingerprint": _fingerprint(
            model, injection.head | injection.vocabulary | unfrozen_names(model), known, sampled=covers == SAMPLE
        ),
    }


def base_origin(model: PreTrainedModel) -> dict[str, Any]:
    """Return class, location and revision of a model's base."""
    name = model.config._name_or_path
    # FSDP2 replaces the model's class by a subclass from torch
    cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))
    is_folder = os.path.isdir(name)
    on_hub = not is_folder and may_be_base(name)
    return {
        "class": cls.__name__,
        "name_or_path": os.path.abspath(name) if is_folder else name,
        "revision": getattr(model.config, "_commit_hash", None) or (cached_commit(name) if on_hub else None),
    }


def base_location(model: PreTrainedModel, base: str | None, revision: str | None) -> dict[str, Any]:
    """Return the base's name and revision as the caller overrides them; empty without an override."""
    if base is None and revision is None:
        return {}
    return {"name_or_path": model.config._name_or_path if base is None else base, "revision": revision}


def _computation(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration fields that can change the output, defaults included; nested names have dots.

    Every field that is not known to be harmless counts, so that an unknown field causes an error rather than a wrong
    base.
    """
    values = json.loads(model.config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in flatten({key: value for key, value in values.items() if key not in NO_MATTER}).items()
        if "drop" not in name
        and not name.endswith("_implementation")
        and (name in _TOKENS or not name.endswith("_token_id"))
    }


def _other_computation(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return a message on the first field that changes the computation between two bases, or None.

    Only fields that both have are compared, because versions of Transformers add and drop fields. A token id that one
    of the two has not set is not compared, because it is often set later.
    """
    for name in sorted(saved.keys() & here.keys()):
        unset = name in _TOKENS and None in (saved[name], here[name])
        if saved[name] != here[name] and not unset:
            return f"its {name} was {show(saved[name])} and is {show(here[name])} here"
    return None


def _fingerprint(
    model: PreTrainedModel, apart: Collection[str], before: Mapping[str, Tensor], *, sampled: bool = False
) -> dict[str, str]:
    """Return the fingerprint of a pretrained base: a SHA-256 over all numbers of its parameters.

    For quantised weights, only the names count, because the packed numbers depend on the device and the quantiser.
    Buffers do not count.

    Args:
        model: the base, injected or not. Submodules do not count.
        apart: names of parameters that do not count.
        before: values that count in place of a parameter's present values, by its name.
        sampled: take 64 numbers of every parameter, to compare with the fingerprints of earlier versions.
    """
    ours = own_parameters(model).keys()
    digest = hashlib.sha256()
    dtypes = set()
    for name, parameter in sorted(model.named_parameters()):
        if name in ours or name in apart:
            continue
        dtypes.add(describe_numbers(parameter))
        if is_quantised(parameter):
            digest.update(f"{name} quantised\n".encode())
            continue
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = before.get(name, parameter).detach().flatten()
        if sampled:
            digest.update(values[:: max(1, values.numel() // 64)][:64].float().cpu().numpy().tobytes())
            continue
        for block in values.split(_BLOCK):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy())
    found = {"sha256": digest.hexdigest(), "dtype": ", ".join(sorted(dtypes))}
    return found if sampled else {**found, "covers": ALL}


def check_base(model: PreTrainedModel, base: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the model, injected or not, is not the base of the checkpoint."""
    before = injection_of(model).before if is_injected(model) else {}
    kind = base["config"].get("model_type")
    if model.config.model_type != kind:
        raise CheckpointError(
            f"the checkpoint is for a {show(kind)} model, and this is a {model.config.model_type!r} model"
        )
    if problem := _other_computation(base["computation"], _computation(model)):
        remedy = "build the base with the same configuration"
        if base["vocabulary"] and "vocab_size" in problem:
            remedy = "give it as many rows by model.resize_token_embeddings(...)"
        raise CheckpointError(
            f"this is not the base model that the checkpoint was trained on ({_source(base)}): {problem}; {remedy}"
        )
    saved = base["fingerprint"]
    here = _fingerprint(model, base["apart"], before, sampled=saved["covers"] == SAMPLE)
    if saved["dtype"] != here["dtype"]:
        logger.warning(
            f"the checkpoint was trained on a base in {saved['dtype']} and this one is in {here['dtype']}, "
            "so it cannot be checked that it is the same base"
        )
    elif saved["sha256"] != here["sha256"]:
        raise CheckpointError(
            f"this is not the base model that the checkpoint was trained on ({_source(base)}): its weights differ"
        )


def find_base(
    source: str | Path, described: Mapping[str, Any], base: str | Path | None, base_revision: str | None
) -> tuple[str, str | None]:
    """Return location and revision of a checkpoint's base.

    Args:
        source: the location of the checkpoint, for messages.
        described: the manifest's entry on the base.
        base: the location that the caller gives, or None.
        base_revision: the revision that the caller gives, or None.

    Raises:
        CheckpointError: the location is unknown, or is a folder on another machine.
    """
    if base is not None:
        return str(base), base_revision
    name: str = described["name_or_path"]
    if not name:
        raise CheckpointError(
            "the base model was built in memory, so it cannot be restored by name; say base=..., or build it and "
            "call unipelt.load(model, folder)"
        )
    if not os.path.isdir(source) and not may_be_base(name):  # a checkpoint of the hub may come from a stranger
        raise CheckpointError(
            f"{source}: its base was in a folder where it was trained ({show_path(name)}); say base=..., where it is "
            "for you"
        )
    return name, base_revision or described["revision"]


def build_base(
    source: str | Path,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    revision: str | None,
    **options: Any,
) -> PreTrainedModel:
    """Build the base of a checkpoint, with its class and configuration.

    Args:
        source: the location of the checkpoint, for messages.
        described: the manifest's entry on the base.
        tensors: the tensors of the checkpoint; their sizes limit the sizes in the configuration.
        name: the location of the base.
        revision: the revision of a base on the hub.
        options: passed to the class's `from_pretrained`, which reads only safetensors by default.

    Raises:
        CheckpointError: the description is not of a model, or the model cannot be built.
        MissingBaseError: the base cannot be found or read.
    """
    cls = getattr(transformers, described["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or cls.forward is nn.Module.forward:
        raise CheckpointError(
            f"{described['class']!r} is not a model class of transformers; build the base model and "
            "call unipelt.load(model, folder)"
        )
    if problem := _endless(described["config"], tensors, vocabulary=bool(described["vocabulary"])):
        raise CheckpointError(f"{source}: the base that {MANIFEST} describes cannot be meant: {problem}")
    config_class: Any = cls.config_class
    values = _without_back_ends(described["config"])
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning on a new head: the head is loaded next
    try:
        try:
            config = config_class.from_dict(values)
        except Exception as error:  # classes of Transformers raise many kinds of errors for wrong values
            raise TypeError(" ".join(str(error).split())) from error
        given = {"use_safetensors": True, "config": config, "revision": revision or "main", **options}
        if "gguf_file" not in given and (file := _gguf_file(described["config"])):
            given["gguf_file"] = file
        wanted = vocabulary_sizes(config)
        own = wanted
        if described["vocabulary"]:
            hub = {key: given[key] for key in ("revision", *_OF_HUB) if key in given}
            own = base_vocabulary_sizes(config, name, **hub) or wanted
        for field, size in own.items():
            setattr(config.get_text_config(), field, size)
        model: PreTrainedModel = cls.from_pretrained(name, **given)
        if own != wanted:
            model.resize_token_embeddings(wanted["vocab_size"], mean_resizing=False)
    except OSError as error:
        raise MissingBaseError(
            f"{show_path(source)}: its base, {show_path(name)}, cannot be had: {shorten(error)}; say base=..., where "
            "it is"
        ) from error
    except (*_UNBUILDABLE, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{source}: the base that {MANIFEST} describes cannot be built: {shorten(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    return model


def _endless(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, vocabulary: bool) -> str | None:
    """Return which field of a base's configuration would take hours or all memory to build, or None.

    Transformers first builds the model without memory for its weights, so large matrices cost nothing there. Many
    modules do cost time, and so do many labels, because each label gets a name.
    """
    sizes = {size for tensor in tensors.values() if tensor.numel() for size in tensor.shape}
    for name, value in flatten(config).items():
        if type(value) is not int:
            continue
        if value > MOST_MODULES and any(word in name for word in ("layer", "group", "expert")):
            return f"{show(name)} is {show(value)}, and at most {MOST_MODULES:,} are built"
        if vocabulary and name.endswith("vocab_size") and value not in sizes:
            return f"{show(name)} is {show(value)}, and no tensor has that size"
        if name == "num_labels" and not 0 <= value <= MOST_MODULES and value not in sizes:
            return f"num_labels is {show(value)}, and no tensor has that size"
    return None


def _gguf_file(config: Mapping[str, Any]) -> str | None:
    """Return the GGUF file that a base was read from, inside its folder or repository; None for another base."""
    quantisation = config.get("quantization_config")
    file = quantisation.get("gguf_file") if isinstance(quantisation, dict) else None
    if not isinstance(file, str) or not file.endswith(".gguf"):
        return None
    return None if os.path.isabs(file) or ".." in Path(file).parts else file


def _without_back_ends(values: Any) -> Any:
    """Return a configuration without the names of back-ends, which may be code on the hub that Transformers would run.

    The quantisation is left out too: the caller chooses it, for the machine at hand.
    """
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key != "quantization_config"}
        return {key: _without_back_ends(value) for key, value in kept.items() if "_implementation" not in key}
    return [_without_back_ends(value) for value in values] if isinstance(values, list) else values


def _source(base: Mapping[str, Any]) -> str:
    """Return the location of a base, for a message."""
    return show_path(base["name_or_path"]) or "built in memory"
