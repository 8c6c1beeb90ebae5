"""UniPELT checkpoints of AdapterHub's `adapters` package, into a model of Transformers 5.

What that package computes in an encoder is what is computed here with gates that average over padding too
(`GateConfig(pooling="mean")`), so an adapter, a prefix and LoRA of its default kinds give the same logits. In a causal
decoder its gates average over tokens still to come, which is not done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.bridges.adapterhub_config import read_configuration
from unipelt.checkpoint.bind import bind
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.config.schema import ConfigError, read_mapping
from unipelt.files.messages import shorten, show, show_path
from unipelt.files.strict import read_bytes
from unipelt.hosts.families import FAMILIES
from unipelt.hosts.locate import InjectionError
from unipelt.injection.attention_hooks import Site
from unipelt.injection.inject import inject_as, remove
from unipelt.injection.parameters import head_names
from unipelt.injection.state import injection_of
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import Prefix, PrefixNetwork

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

_ADAPTERS_AT = {
    "bert": "output",
    "roberta": "output",
    "xlm-roberta": "output",
    "electra": "output",
    "distilbert": "output_adapters",
}
"""The models that are read: what `adapters` calls the owner of a layer's adapter after the feed-forward network."""

_HEADS: dict[str, dict[tuple[int, str, bool], dict[str, str]]] = {
    "bert": {
        (2, "tanh", False): {"1": "bert.pooler.dense", "4": "classifier"},
        (1, "tanh", True): {"1": "classifier"},
    },
    "roberta": {(2, "tanh", False): {"1": "classifier.dense", "4": "classifier.out_proj"}},
    "xlm-roberta": {(2, "tanh", False): {"1": "classifier.dense", "4": "classifier.out_proj"}},
    "electra": {(2, "gelu", False): {"1": "classifier.dense", "4": "classifier.out_proj"}},
    "distilbert": {(2, "relu", False): {"1": "pre_classifier", "4": "classifier"}},
}
"""Classification heads of `AutoAdapterModel` that are the head of Transformers' own class: by the model, then by
(layers, activation, whether the pooler is used); the module here for each of their linear layers."""

_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)\.")

logger = logging.get_logger(__name__)


def load_adapterhub(model: PreTrainedModel, folder: str | Path, *, head: bool = True) -> PreTrainedModel:
    """Inject what `save_adapter` of AdapterHub's `adapters` wrote, in place: UniPELT, or one or two parts of it.

    Its weights are read from `adapter.safetensors` alone. `adapters` 1.3 cannot write a prefix into such a file, since
    each layer holds the same one; `docs/bridges.md` has the lines that turn its pickles into it.

    Args:
        model: the base model that it was trained on; nothing injected yet.
        folder: with `adapter_config.json` and `adapter.safetensors`; with a head, `head_config.json` and
            `model_head.safetensors` too.
        head: whether to load a head that is there. That of `AutoAdapterModel` goes into a model for sequence
            classification where the two are the same function; BERT's replaces the pooler.

    Returns:
        The same model. Its gates average over padding too (`gate.pooling: mean`), as that package's do. A prefix whose
        network was ejected has the deployed form.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it is broken, belongs to another model, or holds what is not computed here; the message names
            it.
        InjectionError: the model carries submodules already. After any error the model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"load_adapterhub takes a PreTrainedModel of transformers, not {type(model).__name__}")
    if getattr(model, "unipelt_injection", None) is not None:
        raise InjectionError("this model carries submodules already; call unipelt.remove(model) first")
    folder = Path(folder)
    values, tensors = _read(folder, CONFIG, WEIGHTS, PICKLE)
    try:
        _check_model(model, values)
        name, given = _own(model, values, tensors)
        config, deployed, scaling = read_configuration(model, name, values, given)
        saved = _read_head(model, folder) if head else {}
        injected = bind(inject_as(model, config, deployed=deployed, head=head_names(model) | saved.keys()))
        try:
            ours = {**_sort(injected, name, given, scaling), **saved}
            for path, tensor in ours.items():
                _check_tensor(path, tensor, tuple(model.get_parameter(path).shape))
            with torch.no_grad():
                for path, tensor in ours.items():
                    model.get_parameter(path).copy_(tensor)
        except BaseException:
            remove(model)
            raise
    except CheckpointError as error:
        raise CheckpointError(f"{show_path(folder)} cannot be loaded: {error}") from error
    if left := sorted(injection_of(model).head - saved.keys()):
        logger.warning(
            f"no head was loaded from {folder} for {', '.join(left[:3])}{', …' if len(left) > 3 else ''}: the model's "
            "own is kept"
        )
    return model


def _read(folder: Path, config: str, weights: str, pickle: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A configuration and its tensors. Raises `FileNotFoundError` or `CheckpointError`."""
    if not (folder / config).is_file():
        raise FileNotFoundError(f"{show_path(folder)} is not a folder of AdapterHub's: it has no {config}")
    if not (folder / weights).is_file():
        if (folder / pickle).is_file():
            raise CheckpointError(
                f"{show_path(folder)} holds {pickle}, a pickle, which is not read; docs/bridges.md of unipelt has the "
                f"lines that turn it into {weights}"
            )
        raise FileNotFoundError(f"{show_path(folder)} is not a folder of AdapterHub's: it has no {weights}")
    try:
        values = read_mapping(folder / config)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    try:
        return values, load_tensors(read_bytes(folder / weights))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / weights} is not a valid safetensors file: {shorten(error)}") from error


def _check_model(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    kind = model.config.model_type
    if values.get("model_type") != kind:
        raise CheckpointError(f"it is for a {show(values.get('model_type'))} model, and this is a {kind!r} model")
    if kind not in _ADAPTERS_AT:
        raise CheckpointError(
            f"of AdapterHub's checkpoints those for {', '.join(_ADAPTERS_AT)} are read, not for {kind!r}"
        )
    if getattr(model.config, "is_decoder", False):
        raise CheckpointError(
            "in a causal decoder AdapterHub's gates average over tokens still to come, which is not done here"
        )
    version = values.get("version")
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match is None or not (1, 1) <= (int(match[1]), int(match[2])) < (2, 0):
        raise CheckpointError(
            f"it was written by version {show(version)}, and those of adapters 1.1 and later 1.x are read; load it "
            "there and save it again"
        )


def _own(
    model: PreTrainedModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """The adapter's name, and its tensors by names that start as this model's do."""
    name = values.get("name")
    if not isinstance(name, str) or not name or "." in name:
        raise CheckpointError(f"name must be the adapter's, not {show(name)}")
    start = f"{model.base_model_prefix}."
    has_base = model.base_model is not model
    given = {}
    for key, tensor in tensors.items():
        own = f"{start if has_base else ''}{key.removeprefix(start)}"
        if own in given:
            raise CheckpointError(f"{show(own)} is there twice")
        given[own] = tensor
    # each layer's module holds the shared prefix too
    for key in [key for key in given if ".prefix_tuning.pool." in key]:
        original = f"{start if has_base else ''}prefix_tuning.{key.partition('.prefix_tuning.pool.')[2]}"
        if original not in given or not torch.equal(given.pop(key), given[original]):
            raise CheckpointError(f"{show(key)} should be a copy of {show(original)}")
    return name, given


def _sort(model: PreTrainedModel, name: str, given: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The tensors by the names that they have in the injected model; every one is used, and none is missing."""
    left = dict(given)

    def take(key: str) -> Tensor:
        if key not in left:
            raise CheckpointError(f"it lacks {show(key)}")
        return left.pop(key)

    kind = model.config.model_type
    norm = FAMILIES[kind].stacks[0].norm
    start = "" if model.base_model is model else f"{model.base_model_prefix}."
    prefix = f"{start}prefix_tuning.prefix_tunings.{name}.self_prefix."
    ours: dict[str, Tensor] = {}
    prefixes: dict[str, Prefix] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRA):
            theirs = f"{path.rpartition('.')[0]}.loras.{name}."
            ours |= {f"{path}.A": take(f"{theirs}lora_A"), f"{path}.B": take(f"{theirs}lora_B")}
        elif isinstance(module, Adapter):
            theirs = f"{path.removesuffix(f'{norm}.adapter')}{_ADAPTERS_AT[kind]}.adapters.{name}."
            for inner, outer, factor in (("down", "adapter_down.0", 1.0), ("up", "adapter_up", scaling)):
                for part in ("weight", "bias"):
                    tensor = take(f"{theirs}{outer}.{part}")
                    ours[f"{path}.{inner}.{part}"] = tensor if factor == 1 else tensor * factor
            if module.gates is not None:
                ours |= _gates(f"{path}.gates", [f"{theirs}gate."], take)
        elif isinstance(site := getattr(module, "unipelt_site", None), Site) and isinstance(module.gates, Gates):
            owners = [
                f"{path}.prefix_tuning.prefix_gates.{name}."
                if target == ("prefix",)
                else f"{path}.{'.'.join(target[:-1])}.loras.{name}.gate."
                for target in site.targets
            ]
            ours |= _gates(f"{path}.gates", owners, take)
        elif isinstance(module, PrefixNetwork):
            ours[f"{path}.embedding"] = take(f"{prefix}wte.weight")
            for inner, outer in (("w1", "control_trans.0"), ("w2", "control_trans.2")):
                for part in ("weight", "bias"):
                    ours[f"{path}.{inner}.{part}"] = take(f"{prefix}{outer}.{part}")
        if isinstance(module, Prefix) and module.keys_values is not None:
            prefixes[path] = module
    if prefixes:
        # (L, layers, keys and values, W) in one row
        flat, (_, length, width) = take(f"{prefix}control_trans"), next(iter(prefixes.values())).keys_values.shape  # type: ignore[union-attr]
        _check_tensor(f"{prefix}control_trans", flat, (length * len(prefixes) * 2 * width,))
        rows = flat.view(length, len(prefixes), 2, width).permute(1, 2, 0, 3)
        ours |= {f"{path}.keys_values": rows[module.index] for path, module in prefixes.items()}
    if left:
        raise CheckpointError(
            f"it has {show(min(left))}{f' and {len(left) - 1} more' if len(left) > 1 else ''}, for which there is no "
            "place here"
        )
    return ours


def _gates(path: str, owners: list[str], take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Gates that are modules of their own there and rows of one parameter here."""
    both = {}
    for part in ("weight", "bias"):
        rows = [take(f"{owner}{part}") for owner in owners]
        if any(row.shape != rows[0].shape or len(row) != 1 for row in rows):
            raise CheckpointError(f"{show(f'{owners[0]}{part}')} and its likes are not of one shape, with one row each")
        both[f"{path}.{part}"] = torch.cat(rows)
    return both


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"what belongs to {show(name)} is {tuple(tensor.shape)} and should be {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"what belongs to {show(name)} holds {tensor.dtype}, not floating-point numbers")


def _read_head(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The head's tensors by the names that they have in this model; nothing if the folder holds none."""
    if not (folder / HEAD_CONFIG).is_file():
        return {}
    values, tensors = _read(folder, HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE)
    config, kind = values.get("config"), model.config.model_type
    advice = "load it with head=False to keep the model's own"
    if config is None:
        if values.get("model_class") != type(model).__name__:
            raise CheckpointError(
                f"its head is of a {show(values.get('model_class'))}, and this is a {type(model).__name__}; {advice}"
            )
        saved = dict(tensors)
        start = f"{model.base_model_prefix}."
        wanted = {name for name, _ in model.named_parameters() if not name.startswith(start)}
    else:
        if not isinstance(config, dict) or config.get("head_type") != "classification":
            raise CheckpointError(f"its head is {show(config)}, and not one for classification; {advice}")
        shape = tuple(config.get(field) for field in ("layers", "activation_function", "use_pooler"))
        known = _HEADS[kind]
        modules = next((modules for key, modules in known.items() if key == shape), None)
        if modules is None or config.get("bias") is not True:
            raise CheckpointError(
                f"its head has (layers, activation, pooler) {show(shape)}, and that of a model of Transformers' own is "
                f"{' or '.join(map(str, known))}; {advice}"
            )
        saved = {}
        for key, tensor in tensors.items():
            _, _, rest = key.partition(".")
            _, _, rest = rest.partition(".")  # heads.NAME.
            index, _, part = rest.partition(".")
            if index not in modules:
                raise CheckpointError(f"its head has {show(key)}, for which there is no place here; {advice}")
            saved[f"{modules[index]}.{part}"] = tensor
        wanted = {f"{module}.{part}" for module in modules.values() for part in ("weight", "bias")}
    if missing := sorted(wanted - saved.keys()):
        raise CheckpointError(f"its head lacks {show(missing[0])}; {advice}")
    parameters = dict(model.named_parameters())
    for name, tensor in saved.items():
        if name not in parameters:
            raise CheckpointError(f"this {type(model).__name__} has no {show(name)} for its head; {advice}")
        _check_tensor(name, tensor, tuple(parameters[name].shape))
    return saved
