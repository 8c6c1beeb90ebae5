"""Save and load what was trained, and only that.

A folder holds `model.safetensors` (submodules, gates, head, trained biases), `unipelt.json` (what they belong to) and
`README.md` (a model card). It has no `config.json`, so Transformers cannot take it for a whole model by mistake; a
Trainer's checkpoints are such folders too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.attach import count_term
from unipelt.card import model_card
from unipelt.config import ConfigError, UniPELTConfig, flatten, read_mapping
from unipelt.fold import Constants, fold_constants
from unipelt.hub import HubError, cached_commit, download, is_repository, may_be_base
from unipelt.inject import InjectionError, _inject, remove
from unipelt.parameters import injection_of, kept_names, parameter_counts, submodule_parameters, unfrozen_names
from unipelt.places import find_stacks
from unipelt.plain import read_bytes, shorten, show, show_path
from unipelt.prefix import Prefix, PrefixNetwork
from unipelt.quantised import describe_numbers, is_quantised
from unipelt.spread import FoldError

WEIGHTS = "model.safetensors"
NEXT = f"{WEIGHTS}.next"
MANIFEST = "unipelt.json"
FORMAT = 1
MOST_MODULES = 1_000
"""Layers, and whatever else a base has many of, that `from_pretrained` builds because a manifest says so."""

NO_MATTER = frozenset(
    {
        # what it is called, and what it was written by and for
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "tokenizer_class"),
        *("id2label", "label2id", "finetuning_task", "task_specific_params", "problem_type"),
        # the same numbers by another way; a dtype or a quantisation shows in the weights
        *("dtype", "torch_dtype", "quantization_config", "use_cache", "chunk_size_feed_forward", "return_dict"),
        *("output_attentions", "output_hidden_states", "deterministic_flash_attn", "pretraining_tp"),
        # where training or generation starts
        *("initializer_range", "initializer_factor", "initializer_cutoff_factor", "init_std"),
        *("encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "num_beams", "early_stopping", "max_length"),
    }
)
"""Fields of a model's configuration that change no output of a given batch in evaluation mode."""
_UNBUILDABLE = (TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError)
_KINDS: dict[type[Any], str] = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")  # positions, pooling and shifted labels need them

logger = logging.get_logger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is broken, or belongs to another model; nothing was changed."""


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    deploy: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    base: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """Write what was trained: submodules, gates, head, trained biases; not the frozen base.

    Args:
        model: an injected model.
        folder: made if absent; other files in it are left alone. Each file is written whole or not at all, the
            manifest, which holds the weights' SHA-256, last.
        deploy: fold the prefix's reparameterisation network away. The logits stay the same; the prefix is smaller
            and, if it is trained further, it is trained directly. A folded model is saved as what it was folded
            from, in this form, with the gates' constants: loading folds again.
        state_dict: the model's whole state dict, where it had to be gathered from several processes.
        base: what others know the base model by (`user/name` on the hub), in place of where it was loaded from here.
        base_revision: a branch, a tag or a commit of `base`.

    Returns:
        The folder.

    Raises:
        ValueError: nothing was injected.
        OSError: the folder cannot be written.
    """
    injection = injection_of(model)
    whole: Mapping[str, Any] = dict(model.named_parameters()) if state_dict is None else state_dict
    if sharded := [name for name, tensor in whole.items() if _is_sharded(tensor)]:
        raise ValueError(
            f"each process holds only a part of {sharded[0]!r}; gather the state dict in all (get_model_state_dict of "
            "torch.distributed.checkpoint.state_dict, with full_state_dict) and pass it on as state_dict"
        )
    tensors = _trained_tensors(model, whole, deploy=deploy)
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; save needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    weights = dump_tensors(tensors, metadata={"format": "pt"})
    manifest = {
        "format": FORMAT,
        "unipelt": injection.config.to_dict(),
        "deployed": (deploy or injection.deployed) and injection.config.prefix is not None,
        "head": sorted(injection.head),
        "unfrozen": sorted(unfrozen_names(model)),
        "base": describe_base(model, whole) | _whereabouts(model, base, base_revision),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    if injection.folded is not None:
        manifest["folded"] = injection.folded.constants
    text = json.dumps(manifest, indent=2) + "\n"
    # The manifest decides: until it is replaced the old weights are the checkpoint, from then on the new ones are,
    # under their first name or the last. So whatever breaks off in between, one of the two is there whole.
    _settle(folder)
    write_whole(folder / NEXT, weights)
    try:
        write_whole(folder / MANIFEST, text.encode())
    except OSError:
        (folder / NEXT).unlink(missing_ok=True)
        raise
    os.replace(folder / NEXT, folder / WEIGHTS)
    write_whole(folder / "README.md", model_card(injection.config, parameter_counts(model), manifest).encode())
    return folder


def load(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put what `save` wrote onto a base model that the caller holds, in place.

    Args:
        model: the base model that it was trained on, with the same head class; nothing injected yet.
        folder: what `save`, or a Trainer, wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is broken, or belongs to another model.
        InjectionError: the model carries submodules already. After any error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"load takes a PreTrainedModel of transformers, not {type(model).__name__}")
    manifest, tensors = _read(Path(folder))
    _check_base(model, manifest["base"])
    if problem := _unknown_name(model, manifest):
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {problem}")
    if problem := _impossible_size(model, manifest["unipelt"], manifest["deployed"], tensors):
        raise CheckpointError(f"the checkpoint in {folder} does not fit its own configuration: {problem}")
    try:
        _inject(model, manifest["unipelt"], deployed=manifest["deployed"], head=frozenset(manifest["head"]))
    except InjectionError as error:
        if getattr(model, "unipelt_injection", None) is not None:
            raise
        raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {error}") from error
    held = {*kept_names(model), *manifest["unfrozen"]}
    places = {name: parameter for name, parameter in model.named_parameters() if name in held}
    if problem := _mismatch(places, tensors):
        remove(model)
        raise CheckpointError(f"the checkpoint in {folder} does not fit this {type(model).__name__}: {problem}")
    injection = injection_of(model)
    unfrozen = set(manifest["unfrozen"])
    injection.originals |= {name: p.detach().cpu().clone() for name, p in places.items() if name in unfrozen}
    try:
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
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
            that, only the manifest and the weights are read.
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
        As `load`; and what the base's `from_pretrained` raises when the base is not to be had.
    """
    shared: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = find_checkpoint(source, (MANIFEST, WEIGHTS), revision, **shared)
    manifest, tensors = _read(folder)
    described = manifest["base"]
    cls = getattr(transformers, described["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or cls.forward is nn.Module.forward:
        raise CheckpointError(
            f"{described['class']!r} is not a model class of transformers; build the base model and "
            "call unipelt.load(model, folder)"
        )
    name, commit = find_base(source, described, base, base_revision)
    if problem := _endless(described["config"], tensors):
        raise CheckpointError(f"{source}: the base that {MANIFEST} describes cannot be meant: {problem}")
    config_class: Any = cls.config_class
    values = _without_back_ends(described["config"])
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the head as newly initialised; it is loaded next
    try:
        try:
            config = config_class.from_dict(values)
        except Exception as error:  # whatever a class of Transformers makes of values that it cannot mean
            raise TypeError(" ".join(str(error).split())) from error
        options = {"use_safetensors": True, "config": config, "revision": commit or "main", **shared, **kwargs}
        model = cls.from_pretrained(name, **options)
    except (*_UNBUILDABLE, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{source}: the base that {MANIFEST} describes cannot be built: {shorten(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    return load(model, folder).eval()


def find_checkpoint(source: str | Path, files: Sequence[str], revision: str | None, **options: Any) -> Path:
    """The folder of a checkpoint: the one that was given, or that of the hub's cache that these files were put into.

    Args:
        source: a folder, or `user/name` on the hub; what is on the disk comes first.
        files: to be brought from the hub, as far as they are there.
        revision: as `unipelt.hub.download` takes it.
        options: likewise `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: there is no such folder, and on the hub no checkpoint of ours.
        HubError: as `unipelt.hub.download`.
        ValueError: a revision of a folder was asked for.
    """
    if os.path.isdir(source) or not isinstance(source, str) or not is_repository(source):
        if revision is not None:
            raise ValueError(
                f"{show_path(source)} is a folder, which has no revisions; base_revision is that of a base"
            )
        return Path(source)
    try:
        folder = download(source, files, revision=revision, **options)
    except HubError as error:
        raise HubError(f"there is no folder {source!r} here; {error}") from error.__cause__
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{source!r} on the hub is not a checkpoint of unipelt: it has no {MANIFEST}")
    return folder


def find_base(
    source: str | Path, described: Mapping[str, Any], base: str | Path | None, base_revision: str | None
) -> tuple[str, str | None]:
    """Where a checkpoint's base is, and its revision.

    Args:
        source: of the checkpoint.
        described: what its manifest says of its base.
        base: where the caller says that it is.
        base_revision: likewise.

    Raises:
        CheckpointError: nobody says where, or it was in a folder on another machine.
    """
    if base is not None:
        return str(base), base_revision
    name: str = described["name_or_path"]
    if not name:
        raise CheckpointError(
            "the base model was built in memory, so it cannot be restored by name; say base=..., or build it and "
            "call unipelt.load(model, folder)"
        )
    if not os.path.isdir(source) and not may_be_base(name):  # it came from the hub, perhaps from a stranger
        raise CheckpointError(
            f"{source}: its base was in a folder where it was trained ({show_path(name)}); say base=..., where it is "
            "for you"
        )
    return name, base_revision or described["revision"]


def _without_back_ends(values: Any) -> Any:
    """A configuration less what back-ends are called, which may name code on the hub that Transformers would run.

    Nor does a checkpoint say how its base is quantised: that the caller does, who knows what the machine can run.
    """
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if key != "quantization_config"}
        return {key: _without_back_ends(value) for key, value in kept.items() if "_implementation" not in key}
    return [_without_back_ends(value) for value in values] if isinstance(values, list) else values


def _settle(folder: Path) -> None:
    """Finish a save that broke off after its manifest was written: its weights must not be taken for a draft."""
    try:
        weights = (folder / NEXT).read_bytes()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest["weights"]["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # there is none, or no manifest that could name it
    if hashlib.sha256(weights).hexdigest() == digest:
        os.replace(folder / NEXT, folder / WEIGHTS)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then in its place. Raises `OSError`, which names it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise
        # the file, not its draft; where no space is left the system names none at all
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder has become read-only, say
            beside.unlink()


def _trained_tensors(model: PreTrainedModel, whole: Mapping[str, Tensor], *, deploy: bool) -> dict[str, Tensor]:
    folded = injection_of(model).folded
    tensors = {name: whole[name] for name in kept_names(model)} | dict(folded.tensors if folded else {})
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
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def describe_base(model: PreTrainedModel, whole: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest says of the base: class, origin, configuration, what it computes by, fingerprint of its weights.

    Args:
        model: an injected model.
        whole: its parameters by name, gathered where each process holds a part.
    """
    injection = injection_of(model)
    name = model.config._name_or_path
    # FSDP2 puts a class of its own in front of the model's
    cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))
    on_hub = bool(name) and not os.path.isdir(name) and may_be_base(name)
    known: Mapping[str, Tensor] = injection.before
    if any(_is_sharded(parameter) for parameter in model.parameters()):
        known = {**whole, **known}
    return {
        "class": cls.__name__,
        "name_or_path": os.path.abspath(name) if name and os.path.isdir(name) else name,
        "revision": getattr(model.config, "_commit_hash", None) or (cached_commit(name) if on_hub else None),
        "config": json.loads(model.config.to_json_string(use_diff=True)),
        "computation": _computation(model),
        "fingerprint": _fingerprint(model, injection.head | unfrozen_names(model), known),
    }


def _whereabouts(model: PreTrainedModel, base: str | None, revision: str | None) -> dict[str, Any]:
    """Where the base of a manifest is, if the caller knows better than the model."""
    if base is None and revision is None:
        return {}
    return {"name_or_path": model.config._name_or_path if base is None else base, "revision": revision}


def _computation(model: PreTrainedModel) -> dict[str, Any]:
    """What of the configuration the numbers depend on, defaults included, nested fields with dots in their names.

    All that is not known to be harmless counts: a field that nobody thought of is refused rather than missed.
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
    """The first field in which two bases compute otherwise, or None.

    Only fields that both have are compared, since versions of Transformers add some and drop others; and no token
    that one of the two has not set, which a base is often given later.
    """
    for name in sorted(saved.keys() & here.keys()):
        unset = name in _TOKENS and None in (saved[name], here[name])
        if saved[name] != here[name] and not unset:
            return f"its {name} was {show(saved[name])} and is {show(here[name])} here"
    return None


def _fingerprint(model: PreTrainedModel, apart: Collection[str], before: Mapping[str, Tensor]) -> dict[str, str]:
    """What identifies a pretrained base: a SHA-256 over a sample of every parameter.

    Submodules and the names `apart` do not count; where a name has a value in `before`, that does. Of quantised
    weights the names count alone: another device may round otherwise, and a quantiser packs them as it needs them.
    """
    ours = {name for _, name, _ in submodule_parameters(model)}
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
        sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
        digest.update(sample.numpy().tobytes())
    return {"sha256": digest.hexdigest(), "dtype": ", ".join(sorted(dtypes))}


def _check_base(model: PreTrainedModel, base: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the base is not the one that was trained on."""
    if getattr(model, "unipelt_injection", None) is not None:
        return  # _inject says so
    kind = base["config"].get("model_type")
    if model.config.model_type != kind:
        raise CheckpointError(
            f"the checkpoint is for a {show(kind)} model, and this is a {model.config.model_type!r} model"
        )
    if problem := _other_computation(base["computation"], _computation(model)):
        raise CheckpointError(
            "this is not the base model that the checkpoint was trained on "
            f"({_source(base)}): {problem}; build the base with the same configuration"
        )
    saved, here = base["fingerprint"], _fingerprint(model, base["apart"], {})
    if saved["dtype"] != here["dtype"]:
        logger.warning(
            f"the checkpoint was trained on a base in {saved['dtype']} and this one is in {here['dtype']}, "
            "so it cannot be checked that it is the same base"
        )
    elif saved["sha256"] != here["sha256"]:
        raise CheckpointError(
            f"this is not the base model that the checkpoint was trained on ({_source(base)}): its weights differ"
        )


def _source(base: Mapping[str, Any]) -> str:
    """Where a base came from, for a message."""
    return show_path(base["name_or_path"]) or "built in memory"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a checkpoint, checked. Raises `FileNotFoundError` or `CheckpointError`."""
    if not os.path.isfile(folder / MANIFEST):  # which, unlike that of a Path, takes a name too long for one not there
        raise FileNotFoundError(f"{show_path(folder)} is not a checkpoint of unipelt: it has no {MANIFEST}")
    if not any((folder / name).is_file() for name in (WEIGHTS, NEXT)):
        raise FileNotFoundError(f"{folder} is not a checkpoint of unipelt: it has no {WEIGHTS}")
    try:
        raw = read_mapping(folder / MANIFEST)
        if type(raw.get("format")) is not int or raw["format"] != FORMAT:
            raise ConfigError(f"format must be {FORMAT}, not {show(raw.get('format'))}; a newer unipelt may read it")
        base = _typed(raw, "base", dict)
        found = _typed(base, "fingerprint", dict)
        _only(raw, ("format", "unipelt", "deployed", "folded", "head", "unfrozen", "base", "weights"), "")
        _only(base, ("class", "name_or_path", "revision", "config", "computation", "fingerprint"), "base.")
        head, unfrozen = _names(raw, "head"), _names(raw, "unfrozen")
        if base.get("revision") is not None:
            _typed(base, "revision", str)
        weights = _typed(raw, "weights", dict)
        if weights.get("file") != WEIGHTS:
            raise ConfigError(f"weights.file must be {WEIGHTS!r}, not {show(weights.get('file'))}")
        manifest = {
            "unipelt": UniPELTConfig.from_dict(_typed(raw, "unipelt", dict)),
            "deployed": _typed(raw, "deployed", bool),
            "folded": _constants(raw) if "folded" in raw else None,
            "head": head,
            "unfrozen": unfrozen,
            "base": {
                "class": _typed(base, "class", str),
                "name_or_path": _typed(base, "name_or_path", str),
                "revision": base.get("revision"),
                "config": _typed(base, "config", dict),
                # checkpoints of before it was kept are compared by their weights alone
                "computation": _typed(base, "computation", dict) if "computation" in base else {},
                "fingerprint": {key: _typed(found, key, str) for key in ("sha256", "dtype")},
                "apart": {*head, *unfrozen},
            },
        }
        digest = _typed(weights, "sha256", str)
    except ConfigError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    contents = [read_bytes(path) for path in (folder / WEIGHTS, folder / NEXT) if path.is_file()]
    content = next((content for content in contents if hashlib.sha256(content).hexdigest() == digest), None)
    if content is None:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {MANIFEST} describes (its SHA-256 differs): it is damaged, or "
            "from another checkpoint"
        )
    try:
        return manifest, load_tensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a valid safetensors file: {shorten(error)}") from error


def _typed(values: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    if key not in values or not isinstance(values[key], kind):
        seen = show(values[key]) if key in values else "left out"
        raise ConfigError(f"{key} must be {_KINDS[kind]}, not {seen}")
    return values[key]


def _names(values: Mapping[str, Any], key: str) -> list[str]:
    names = _typed(values, key, list)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} must be a list of names, not {show(names)}")
    return names


def _constants(values: Mapping[str, Any]) -> Constants:
    """The constants that gates were folded to; that the gates are there is checked on the model."""
    folded: dict[str, Any] = _typed(values, "folded", dict)
    for path in folded:
        for name, constant in _typed(folded, path, dict).items():
            if constant is not None and not (type(constant) in (int, float) and 0 < constant <= 1):
                raise ConfigError(
                    f"folded: {show(name)} at {show(path)} must be above 0 and at most 1, or null, not {show(constant)}"
                )
    return folded


def _only(values: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in keys:
            raise ConfigError(f"unknown key {show(where + key)}; the keys here are {', '.join(keys)}")


def _endless(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What of a base's configuration would take hours or all memory to build, before its weights tell it is wrong.

    Transformers builds a model of nothing but shapes first, so large matrices are no matter; many modules are, and
    so are labels, which get a name each.
    """
    sizes = {size for tensor in tensors.values() if tensor.numel() for size in tensor.shape}
    for name, value in flatten(config).items():
        if type(value) is not int:
            continue
        if value > MOST_MODULES and any(word in name for word in ("layer", "group", "expert")):
            return f"{show(name)} is {show(value)}, and at most {MOST_MODULES:,} are built"
        if name == "num_labels" and not 0 <= value <= MOST_MODULES and value not in sizes:
            return f"num_labels is {show(value)}, and no tensor has that size"
    return None


def _unknown_name(model: PreTrainedModel, manifest: Mapping[str, Any]) -> str | None:
    """A parameter that the manifest names and the model does not have."""
    there = {name for name, _ in model.named_parameters()}
    for key in ("head", "unfrozen"):
        if unknown := sorted(set(manifest[key]) - there):
            return f"{key} names {show(unknown[0])}, which this {type(model).__name__} does not have"
    return None


def _impossible_size(
    model: PreTrainedModel, config: UniPELTConfig, deployed: bool, tensors: Mapping[str, Tensor]
) -> str | None:
    """A size in the configuration that no tensor has, or that all are too small for: found before memory is taken."""
    try:
        stacks = find_stacks(model, config)
    except ValueError:
        return None  # why it does not fit is said when it is injected
    layers = [layer for stack in stacks for layer in stack.layers.values()]
    width = min(place.query.inputs for layer in layers for place in (layer.attention, layer.cross) if place is not None)
    there = {size for tensor in tensors.values() for size in tensor.shape}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    sizes = {}
    # attention to an encoder takes the other submodules alone
    if config.adapter is not None and any(layer.adapted is not None for layer in layers):
        sizes["adapter.bottleneck"] = config.adapter.bottleneck
    if config.prefix is not None:
        sizes["prefix.length"] = config.prefix.length
        if not deployed:
            sizes["prefix.hidden"] = config.prefix.hidden
    if config.lora is not None:
        sizes["lora.rank"] = config.lora.rank
    parts = (config.adapter, config.prefix, config.lora, *config.more)
    if config.gate.network != "linear" and any(part is not None and part.gate for part in parts):
        sizes["gate.hidden"] = config.gate.hidden
    for name, size in sizes.items():
        if size not in there:
            return f"{name} is {size}, and no tensor has that size"
        if size * width > numbers:  # each is one side of a matrix that is as long as a state, or longer, on the other
            return f"{name} is {size}, and its {numbers} numbers are too few for that"
    for part in config.more:
        found = next((place for layer in layers for place in layer.terms if place.config is part), None)
        needed = 0 if found is None else count_term(found)
        if needed > numbers:
            return f"{part.name} needs {needed} numbers in one place, and it has {numbers} in all"
    return None


def _mismatch(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong between the parameters of a model and the tensors for them, or None."""
    if missing := sorted(places.keys() - tensors.keys()):
        return f"it lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if extra := sorted(tensors.keys() - places.keys()):
        return f"the model has no {show(extra[0])}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            return f"{name} is {tuple(tensor.shape)} there and {tuple(places[name].shape)} here"
        if not tensor.is_floating_point():
            return f"{name} holds {tensor.dtype}, not floating-point numbers"
    return None
