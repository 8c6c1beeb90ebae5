"""Load and write an injected BERT's weights under the names of the authors' release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unipelt.checkpoint.manifest import CheckpointError
from unipelt.injection.state import injection_of
from unipelt.submodules.entry import Part
from unipelt.submodules.room import OwnPart, own_parameters, own_parts

_ADAPTER = re.compile(r"\.adapters\.([^.]+)\.")
_POSITION_IDS = re.compile(r"(^|\.)embeddings\.position_ids$")
_PREFIX_GATE = re.compile(r"\.attention\.self\.prefix_gate\.(weight|bias)$")
_CENTRAL_GATE = re.compile(r"\.attention\.self\.prefix_central_gate\.(weight|bias)$")


@dataclass(frozen=True)
class _Place:
    """The location of a tensor of the release in this model: a parameter, or some rows of one."""

    parameter: Tensor
    part: Part | None = None

    def view(self, tensor: Tensor) -> Tensor:
        return tensor if self.part is None else self.part.of(tensor)


def load_release_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """Load weights that the authors' release saved into an injected BERT, in place.

    Every tensor must have a place in the model, or be one that the release never used (the gate of an absent prefix,
    BERT's old `position_ids` buffer). The adapter's name in the keys may be any name.

    Args:
        model: a BERT injected with the method of the weights. The release averages gates over padding too, so equal
            logits need `GateConfig(pooling="mean")`.
        state_dict: the tensors of the whole model, by the release's names.

    Returns:
        The same model.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model or has another shape. The model is unchanged.
        ValueError: the model carries no submodules.
    """
    places = _places(model)
    unknown, wrong = [], []
    given: dict[str, Tensor] = {}
    adapters = {match[1] for name in state_dict if (match := _ADAPTER.search(name))}
    if len(adapters) > 1:
        raise CheckpointError(
            f"the state dict holds several adapters ({', '.join(sorted(adapters))}); keep one of them"
        )
    for name, tensor in state_dict.items():
        key = _ADAPTER.sub(".adapters.*.", name)
        if key in places:
            given[key] = tensor
            if tuple(tensor.shape) != tuple(places[key].view(places[key].parameter).shape):
                wrong.append(f"{name} {tuple(tensor.shape)}")
        elif not _never_used(name, state_dict):
            unknown.append(name)
    missing = sorted(places.keys() - given.keys())
    for what, names in (
        ("have no place in this model", unknown),
        ("are missing", missing),
        ("have another shape", wrong),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(
                f"{len(names)} of the release's tensors {what}: {shown}; inject what the weights were trained with"
            )
    with torch.no_grad():
        for key, tensor in given.items():
            places[key].view(places[key].parameter).copy_(tensor)
    return model


def release_state_dict(
    model: PreTrainedModel, adapter: str = "adapter", *, gradients: bool = False
) -> dict[str, Tensor]:
    """Return an injected BERT's weights under the names of the authors' release.

    Args:
        model: an injected BERT.
        adapter: the adapter's name, which is part of the release's keys.
        gradients: return each parameter's gradient instead, and leave out parameters without one.

    Returns:
        Tensors by name, detached copies. Raises `ValueError` if the model carries no submodules.
    """
    named = {}
    for key, place in _places(model).items():
        tensor = place.parameter.grad if gradients else place.parameter
        if tensor is not None:
            named[key.replace(".adapters.*.", f".adapters.{adapter}.")] = place.view(tensor).detach().clone()
    return named


def _places(model: PreTrainedModel) -> dict[str, _Place]:
    """Return the place of every parameter of an injected BERT by the release's name, with `*` for an adapter's name."""
    if model.config.model_type != "bert":
        raise CheckpointError(f"the release gates BERT only, and this is a {model.config.model_type!r} model")
    if injection_of(model).folded is not None:
        raise CheckpointError("this model is folded, and the release knows only gates and terms of their own")
    if injection_of(model).deployed:
        raise CheckpointError("the release saves the prefix's network, which this deployed model no longer has")
    if more := injection_of(model).config.more:
        raise CheckpointError(f"the release has adapter, prefix, LoRA and their gates, and this model {more[0].name!r}")
    if injection_of(model).config.tokens is not None:
        raise CheckpointError("the release trains no embeddings of tokens, and this model does")
    if injection_of(model).config.prompt is not None:
        raise CheckpointError("the release has adapter, prefix, LoRA and their gates, and this model a prompt")
    adapter = injection_of(model).config.adapter
    if adapter is not None and adapter.mixture is not None:
        raise CheckpointError("the release has one adapter in a layer, and this model a mixture of adapters")
    prefix, lora = injection_of(model).config.prefix, injection_of(model).config.lora
    if prefix is not None and not prefix.reparameterize:
        raise CheckpointError("the release saves the prefix's network, which a flat prefix (reparameterize) has not")
    if prefix is not None and prefix.softmax != "shared":
        raise CheckpointError("the release has a prefix in the text's softmax, and this model's has one of its own")
    if lora is not None and not (
        {*lora.places} <= {"query", "value"}
        and lora.start == "zero"
        and not lora.is_function
        and not (lora.gate and lora.gating != "replace")
    ):
        raise CheckpointError(
            "the release has plain LoRA of queries and values that starts at zero and whose gate replaces the scale, "
            "and this model's is another"
        )
    places = {_release_name(own): _Place(own.parameter, own.part) for own in own_parts(model)}
    ours = own_parameters(model).keys()
    places |= {name: _Place(parameter) for name, parameter in model.named_parameters() if name not in ours}
    return places


_NETWORK = {"embedding": "prefix_enc_embed.weight", "w1": "prefix_embed_MLP.0", "w2": "prefix_embed_MLP.2"}


def _release_name(own: OwnPart) -> str:
    """Return the release's name of a part of an injected parameter."""
    host = own.room.rpartition(".")[0]  # the layer, or the stack of a network
    first, _, rest = own.part.name.partition(".")
    end = own.part.name.rpartition(".")[2]
    if first == "prefix_network":
        module, _, parameter = rest.partition(".")
        return f"{host}.{_NETWORK[module]}" + (f".{parameter}" if parameter else "")
    if first == "adapter":
        return f"{host}.output.adapters.*.{'adapter_down.0' if 'down' in rest else 'adapter_up'}.{end}"
    if first == "gate":
        gate = own.part.gate
        if gate == "adapter":
            return f"{host}.output.adapters.*.gate.{end}"
        return f"{host}.attention.self.{'prefix_gate' if gate == 'prefix' else f'{gate[5:]}.lora_gate'}.{end}"
    return f"{host}.attention.self.{first.removeprefix('lora_')}.lora_{end}"


def _never_used(name: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Return whether the release saved this tensor without reading it."""
    has_prefix = any(".prefix_enc_embed." in other or other.startswith("prefix_enc_embed.") for other in state_dict)
    has_lora = any(other.endswith(".lora_A") for other in state_dict)
    if _PREFIX_GATE.search(name):
        return not has_prefix
    if _CENTRAL_GATE.search(name):
        return not has_prefix and not has_lora
    return bool(_POSITION_IDS.search(name))
