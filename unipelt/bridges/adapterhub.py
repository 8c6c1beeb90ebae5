"""Load UniPELT checkpoints of AdapterHub's `adapters` package into a model of Transformers 5.

In an encoder, that package and this one compute the same function if gates average over padding too
(`GateConfig(pooling="mean")`), so an adapter, a prefix and LoRA of the default kinds give the same logits. In a causal
decoder, the gates of that package average over later tokens, which this package does not compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from unipelt.hosts.locate import InjectionError
from unipelt.injection.inject import inject_as, remove
from unipelt.injection.parameters import head_names
from unipelt.injection.state import injection_of
from unipelt.submodules.room import OwnPart, layer_sets, own_parts, placed_terms

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"

_ADAPTERS_AT = {
    "bert": "output",
    "roberta": "output",
    "xlm-roberta": "output",
    "electra": "output",
    "distilbert": "output_adapters",
}
"""The supported models, and `adapters`' name of the module that owns the adapter after the feed-forward network."""

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
"""Classification heads of `AutoAdapterModel` that equal the head of Transformers' own class, by the model type, then by
(layers, activation, whether the pooler is used): the module in this model for each linear layer of the head."""

_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)\.")

logger = logging.get_logger(__name__)


def load_adapterhub(model: PreTrainedModel, folder: str | Path, *, head: bool = True) -> PreTrainedModel:
    """Inject a checkpoint of AdapterHub's `save_adapter` in place: UniPELT, or one or two of its submodules.

    The weights are read from `adapter.safetensors` alone. `adapters` 1.3 cannot write a prefix into such a file,
    because the same prefix is in every layer; `docs/bridges.md` has code that converts its pickles.

    Args:
        model: the base model of the training, without submodules.
        folder: a folder with `adapter_config.json` and `adapter.safetensors`; with a head, also `head_config.json` and
            `model_head.safetensors`.
        head: whether to load a head that the folder holds. The head of `AutoAdapterModel` is loaded into a model for
            sequence classification if both compute the same function. For BERT, the pooler is loaded too.

    Returns:
        The same model. Its gates average over padding too (`gate.pooling: mean`), as in that package. A prefix with an
        ejected network has the deployed form.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: the checkpoint is damaged, belongs to another model, or holds something that this package does
            not compute; the message names it.
        InjectionError: the model carries submodules already. After any error the model is unchanged.
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
            ours = _sort(injected, name, given, scaling)
            ours += [_Value(path, model.get_parameter(path).detach(), tensor) for path, tensor in saved.items()]
            for value in ours:
                _check_tensor(value.name, value.tensor, tuple(value.place.shape))
            with torch.no_grad():
                for value in ours:
                    value.place.copy_(value.tensor)
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
    """Read a configuration and its tensors. Raises `FileNotFoundError` or `CheckpointError`."""
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
        return values, dict(sorted(load_tensors(read_bytes(folder / weights)).items()))  # the order in a file varies
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
    """Return the adapter's name, and its tensors under names with this model's base prefix, if the model has one."""
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
    # each layer's module also holds a copy of the shared prefix
    for key in [key for key in given if ".prefix_tuning.pool." in key]:
        original = f"{start if has_base else ''}prefix_tuning.{key.partition('.prefix_tuning.pool.')[2]}"
        if original not in given or not torch.equal(given.pop(key), given[original]):
            raise CheckpointError(f"{show(key)} should be a copy of {show(original)}")
    return name, given


@dataclass(frozen=True)
class _Value:
    """A tensor of the checkpoint, and its place in the model.

    Attributes:
        name: the name of the place in messages.
        place: a view into a parameter, without gradient.
        tensor: the tensor to copy into the place.
    """

    name: str
    place: Tensor
    tensor: Tensor


@dataclass(frozen=True)
class _Names:
    """The names in that package of the parts of injected parameters.

    Attributes:
        adapter: the adapter's name.
        prefix: the start of the prefix's names.
        owner: the name of the module that owns a layer's adapter.
        hosts: paths of the hosts of terms, by the layer's path and the term's name.
        attentions: paths of the attentions, by the layer's path.
    """

    adapter: str
    prefix: str
    owner: str
    hosts: Mapping[tuple[str, str], str]
    attentions: Mapping[str, str]

    def theirs(self, own: OwnPart) -> str:
        """Return the name in that package of a part; keys and values of all layers are one tensor in that package."""
        layer, (first, _, rest) = _layer(own), own.part.name.partition(".")
        end = rest.rpartition(".")[2]
        adapter, low_rank = f"{layer}.{self.owner}.adapters.{self.adapter}", f"loras.{self.adapter}"
        if first == "prefix":
            return f"{self.prefix}control_trans"
        if first == "prefix_network":
            return f"{self.prefix}{_NETWORK[rest]}"
        if first == "adapter":
            return f"{adapter}.{'adapter_down.0' if rest.startswith('down') else 'adapter_up'}.{end}"
        if first != "gate":
            return f"{self.hosts[layer, first]}.{low_rank}.lora_{end}"
        if own.part.gate == "adapter":
            return f"{adapter}.gate.{end}"
        if own.part.gate == "prefix":
            return f"{self.attentions[layer]}.prefix_tuning.prefix_gates.{self.adapter}.{end}"
        return f"{self.hosts[layer, own.part.gate]}.{low_rank}.gate.{end}"

    def ours(self, own: OwnPart) -> str:
        """Return the name of a part in messages: the path of its host, then its name."""
        layer = _layer(own)
        host = self.hosts.get((layer, own.part.name.partition(".")[0]), self.attentions.get(layer, layer))
        return f"{host}.{own.part.name}"


_NETWORK = {"embedding": "wte.weight"} | {
    f"{ours}.{end}": f"{theirs}.{end}"
    for ours, theirs in (("w1", "control_trans.0"), ("w2", "control_trans.2"))
    for end in ("weight", "bias")
}
"""The names in that package of the parts of a prefix's network."""


def _layer(own: OwnPart) -> str:
    """Return the path of the layer, or of the stack, that a part belongs to."""
    return own.room.rpartition(".")[0]


def _sort(model: PreTrainedModel, name: str, given: Mapping[str, Tensor], scaling: float) -> list[_Value]:
    """Return every tensor with its place in the injected model.

    Raises `CheckpointError` for a tensor that is missing or has no place.
    """
    left = dict(given)

    def take(key: str) -> Tensor:
        if key not in left:
            raise CheckpointError(f"it lacks {show(key)}")
        return left.pop(key)

    start = "" if model.base_model is model else f"{model.base_model_prefix}."
    names = _Names(
        adapter=name,
        prefix=f"{start}prefix_tuning.prefix_tunings.{name}.self_prefix.",
        owner=_ADAPTERS_AT[model.config.model_type],
        hosts={(placed.layer, placed.term.name): placed.path for placed in placed_terms(model)},
        attentions={layer: f"{layer}.{part.wiring.attention}" for layer, _, part in layer_sets(model)},
    )
    ours: list[_Value] = []
    first: dict[tuple[str, str], tuple[str, Tensor]] = {}  # the first gate of each entry
    prefixes: list[OwnPart] = []
    for own in own_parts(model):
        key = names.theirs(own)
        if own.part.name == "prefix.keys_values":
            prefixes.append(own)
            continue
        tensor = take(key)
        if own.part.kind == "gate":
            begin, row = first.setdefault((own.path, own.part.parameter), (key, tensor))
            if tensor.shape != row.shape or tensor.shape[:1] != (1,):
                raise CheckpointError(f"{show(begin)} and its likes are not of one shape, with one row each")
        factor = scaling if own.part.name.startswith("adapter.up.") else 1.0
        ours.append(_Value(names.ours(own), own.tensor, tensor if factor == 1 else tensor * factor))
    if prefixes:
        ours += _split(names, prefixes, take)
    if left:
        raise CheckpointError(
            f"it has {show(min(left))}{f' and {len(left) - 1} more' if len(left) > 1 else ''}, for which there is no "
            "place here"
        )
    return ours


def _split(names: _Names, prefixes: list[OwnPart], take: Callable[[str], Tensor]) -> Iterator[_Value]:
    """Yield each layer's keys and values from the flat tensor of all layers: (L, layers, keys and values, W)."""
    key, (_, length, width) = names.theirs(prefixes[0]), prefixes[0].tensor.shape
    flat = take(key)
    _check_tensor(key, flat, (length * len(prefixes) * 2 * width,))
    rows = flat.view(length, len(prefixes), 2, width).permute(1, 2, 0, 3)
    for own, tensor in zip(prefixes, rows, strict=True):
        yield _Value(names.ours(own), own.tensor, tensor)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"what belongs to {show(name)} is {tuple(tensor.shape)} and should be {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"what belongs to {show(name)} holds {tensor.dtype}, not floating-point numbers")


def _read_head(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the head's tensors by their names in this model; empty if the folder holds no head."""
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
