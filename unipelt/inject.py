"""Put submodules into a pretrained model and take them out again: select, build, substitute, count, freeze."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.adapter import Adapter, AdapterNorm
from unipelt.attention import Site, check_back_end, enter_attention, redirect
from unipelt.config import UniPELTConfig, resolve
from unipelt.families import FAMILIES, Stack
from unipelt.gate import Gates, Slot
from unipelt.lora import LoRALinear
from unipelt.parameters import (
    Injection,
    head_names,
    injection_of,
    kept_names,
    set_trainable,
    submodule_parameters,
)
from unipelt.prefix import Prefix, PrefixNetwork


class InjectionError(ValueError):
    """A model that cannot take these submodules; the model is as it was."""


@dataclass(frozen=True)
class _Layer:
    """One layer's places, found and checked before anything is changed.

    Host modules take attributes that their types do not declare, hence `Any`.
    """

    module: Any
    attention: Any
    query: Any
    value: Any
    norm: Any


def inject(
    model: PreTrainedModel, config: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl"
) -> PreTrainedModel:
    """Add gated Adapter, Prefix and LoRA modules to a pretrained model, in place, and freeze what does not train.

    The model stays the same `PreTrainedModel`: its own parameters keep their names, and `Trainer`, pipelines,
    accelerate and `copy.deepcopy` work as before. `model.save_pretrained` then writes what `unipelt.save` writes.

    Args:
        model: a model of Transformers, with or without a head. A head part that its checkpoint did not hold (a
            pooler that starts at random) trains with the head.
        config: a preset's name (`unipelt.PRESETS`), a `UniPELTConfig`, a dict, or a path to JSON or YAML.

    Returns:
        The same model.

    Raises:
        ConfigError: the configuration cannot be meant.
        InjectionError: the model carries submodules already, or is of an architecture that is not supported.
    """
    return _inject(model, resolve(config), deployed=False, head=None)


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Take everything out again: the model as it was before `inject`, bit for bit, in place.

    Parameters of the model's own that trained (the head, biases, with `train_base` every weight) get back the
    values that they had. Raises `ValueError` if nothing was injected.
    """
    injection = injection_of(model)
    _strip(model)
    for name, parameter in model.named_parameters():
        if name in injection.originals:
            parameter.data.copy_(injection.originals[name])
        parameter.grad = None
        parameter.requires_grad_(injection.required_grad[name])
    return model


def _inject(
    model: PreTrainedModel, config: UniPELTConfig, *, deployed: bool, head: frozenset[str] | None
) -> PreTrainedModel:
    """`inject`, with two things that a checkpoint knows: the prefix's form, and which parameters are the head."""
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"inject takes a PreTrainedModel of transformers, not {type(model).__name__}")
    if getattr(model, "unipelt_injection", None) is not None or any(True for _ in submodule_parameters(model)):
        raise InjectionError("this model carries submodules already; call unipelt.remove(model) first")
    layers = _find_layers(model, config) if config.has_submodules else {}
    injection = Injection(
        config=config,
        deployed=deployed,
        head=head_names(model) if head is None else head,
        required_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        replaced={name: vars(model)[name] for name in REPLACED if name in vars(model)},
    )
    if unknown := injection.head - injection.required_grad.keys():
        raise InjectionError(f"this {type(model).__name__} has no head parameter {sorted(unknown)[0]!r}")
    record: Any = model
    record.unipelt_injection = injection
    try:
        if layers:
            _add(model, FAMILIES[model.config.model_type], layers, config, deployed)
        _check_counts(model, config, len(layers))
        set_trainable(model, injection)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        injection.originals = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if name in injection.required_grad and (name in trained or name in injection.head)
        }
        # Transformers drops these names when it saves, and Trainer expects just them to be missing when it loads
        kept = set(kept_names(model))
        record._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in kept}
        record.save_pretrained = partial(_save_pretrained, model)
    except BaseException:
        _strip(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(injection.required_grad[name])
        raise
    return model


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """An injected model's `save_pretrained`: what `unipelt.save` writes, so that a Trainer's checkpoints are ours."""
    from unipelt.checkpoint import save  # it imports this module: loading injects

    if push_to_hub:
        raise ValueError("push_to_hub is not supported for an injected model; save it and upload the folder")
    if is_main_process:
        save(model, save_directory, state_dict=state_dict)


def _find_layers(model: PreTrainedModel, config: UniPELTConfig) -> dict[int, _Layer]:
    """The chosen layers by index, every place checked. Raises `InjectionError`."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise InjectionError(f"there is no description of {kind!r} models; supported are {', '.join(FAMILIES)}")
    if getattr(model.config, "is_decoder", False):
        raise InjectionError(f"a causal {kind!r} (is_decoder=True) is not supported: gates average over all tokens")
    stack = FAMILIES[kind]
    try:
        layers = list(_layers(model, stack))
        found = {index: _find_layer(layer, stack) for index, layer in enumerate(layers)}
    except AttributeError as error:
        raise InjectionError(f"this {type(model).__name__} is not built as {kind!r} models are: {error}") from error
    if config.prefix is not None:
        check_back_end(model.config._attn_implementation)
    chosen = range(len(layers)) if config.layers is None else config.layers
    if outside := [index for index in chosen if index >= len(layers)]:
        raise InjectionError(
            f"layers names {outside[0]}, but the model's {len(layers)} layers are 0 to {len(layers) - 1}"
        )
    return {index: found[index] for index in chosen}


def _find_layer(layer: nn.Module, stack: Stack) -> _Layer:
    attention = layer.get_submodule(stack.attention)
    query, value = attention.get_submodule(stack.query), attention.get_submodule(stack.value)
    norm = layer.get_submodule(stack.norm)
    for place, leaf, kind in (
        (stack.query, query, nn.Linear),
        (stack.value, value, nn.Linear),
        (stack.norm, norm, nn.LayerNorm),
    ):
        if type(leaf) is not kind:
            raise InjectionError(f"{place} is a {type(leaf).__name__}; submodules attach to a plain {kind.__name__}")
    taken = [name for name in ("gates", "prefix", "unipelt_site") if hasattr(attention, name)]
    if taken:
        raise InjectionError(f"{type(attention).__name__} has an attribute {taken[0]!r} of its own")
    return _Layer(layer, attention, query, value, norm)


def _add(
    model: PreTrainedModel, stack: Stack, layers: Mapping[int, _Layer], config: UniPELTConfig, deployed: bool
) -> None:
    network = None
    if config.prefix is not None and not deployed:
        like = next(iter(layers.values())).value.weight
        network = PrefixNetwork(model.config.hidden_size, like.shape[0], len(layers), config.prefix, like)
        owner = _owner(model, stack)
        owner.prefix_network = network
        owner.register_forward_pre_hook(_share_network)
    for place, layer in enumerate(layers.values()):
        _add_to_layer(layer, place, config, network)
    for module in model.modules():
        if isinstance(module, (Adapter, Gates, Prefix, PrefixNetwork)):
            module.train(model.training)
    _owner(model, stack).register_forward_pre_hook(_wake_checkpointing)


def _add_to_layer(layer: _Layer, place: int, config: UniPELTConfig, network: PrefixNetwork | None) -> None:
    attention, like = layer.attention, layer.value.weight
    hidden = layer.value.in_features
    gated: dict[str, str] = {}  # gate -> the attribute of the attention that it scales
    if config.prefix is not None and config.prefix.gate:
        gated["prefix"] = "prefix"
    if config.lora is not None and config.lora.gate:
        gated |= {
            "lora_query": _name_in(attention, layer.query),
            "lora_value": _name_in(attention, layer.value),
        }
    adapter_gate = config.adapter is not None and config.adapter.gate
    masked = config.gate.pooling == "masked_mean"
    tokens = Slot() if masked and adapter_gate else None
    if gated or tokens is not None or config.prefix is not None:
        attention.unipelt_site = Site(
            targets=tuple(gated.values()),
            mask_index=list(inspect.signature(attention.forward).parameters).index("attention_mask"),
            masked=masked and (bool(gated) or adapter_gate),
            tokens=tokens,
            config=redirect(attention) if config.prefix is not None else None,
        )
        attention.gates = Gates(hidden, tuple(gated), config.gate, like) if gated else None
        attention.register_forward_pre_hook(enter_attention, with_kwargs=True)
    if config.prefix is not None:
        attention.prefix = Prefix(place, like.shape[0], config.prefix, network, like)
    if config.lora is not None:
        for leaf in (layer.query, layer.value):
            leaf.__class__ = LoRALinear
            leaf.add_low_rank(config.lora)
    if config.adapter is not None:
        norm = layer.norm
        norm.__class__ = AdapterNorm
        norm.adapter = Adapter(hidden, config.adapter, like)
        norm.gates = Gates(hidden, ("adapter",), config.gate, like) if config.adapter.gate else None
        norm.tokens = tokens
    if adapter_gate and getattr(layer.module, "chunk_size_feed_forward", None):
        # a gate averages over all of a text, so its feed-forward block is not cut; that changes no other number
        layer.module.unipelt_chunk_size = layer.module.chunk_size_feed_forward
        layer.module.chunk_size_feed_forward = 0


def _name_in(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in module.named_children() if child is part)


def _layers(model: PreTrainedModel, stack: Stack) -> Any:
    return model.base_model.get_submodule(stack.layers)


def _owner(model: PreTrainedModel, stack: Stack) -> nn.Module:
    """The module that owns a stack's list of layers: it owns the network of their prefixes too."""
    return model.base_model.get_submodule(stack.layers.rpartition(".")[0])


def _share_network(owner: Any, args: tuple[Any, ...]) -> None:
    """Show every prefix of this very copy of the model (a replica, say) this copy's network."""
    network = owner.prefix_network
    for module in owner.modules():
        if isinstance(module, Prefix):
            module.network = (network,)


def _wake_checkpointing(owner: Any, args: tuple[Any, ...]) -> None:
    """Reentrant gradient checkpointing needs an input that requires a gradient; frozen embeddings give none."""
    if not (torch.is_grad_enabled() and args and isinstance(args[0], Tensor)):
        return
    for module in owner.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            checkpoint = module._gradient_checkpointing_func
            if getattr(checkpoint, "keywords", {}).get("use_reentrant", True) and not args[0].requires_grad:
                args[0].requires_grad_(True)
            return


REPLACED = ("_keys_to_ignore_on_save", "save_pretrained")
HOOKS = (enter_attention, _share_network, _wake_checkpointing)


def _strip(model: nn.Module) -> None:
    """Undo `_add` wherever it got to; the parameters' values and flags are the caller's."""
    module: Any
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in HOOKS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module, LoRALinear):
            module.drop_low_rank()
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(module, AdapterNorm):
            for name in ("adapter", "gates", "tokens"):
                if hasattr(module, name):
                    delattr(module, name)
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
        site: Site | None = module.__dict__.pop("unipelt_site", None)
        if site is not None:
            if site.config is not None:
                module.config = site.config
            for name in ("gates", "prefix"):
                if hasattr(module, name):
                    delattr(module, name)
        if isinstance(getattr(module, "prefix_network", None), PrefixNetwork):
            del module.prefix_network
        if "unipelt_chunk_size" in module.__dict__:
            module.chunk_size_feed_forward = module.__dict__.pop("unipelt_chunk_size")
    injection: Injection | None = model.__dict__.pop("unipelt_injection", None)
    if injection is not None:
        for name in REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(injection.replaced)


def _check_counts(model: PreTrainedModel, config: UniPELTConfig, layers: int) -> None:
    """Count what was added, and fail if it is wrong."""
    found = Counter(type(module) for module in model.modules())
    attention_gates = bool((config.prefix and config.prefix.gate) or (config.lora and config.lora.gate))
    adapter_gate = bool(config.adapter and config.adapter.gate)
    expected = {
        Adapter: layers * bool(config.adapter),
        LoRALinear: 2 * layers * bool(config.lora),
        Prefix: layers * bool(config.prefix),
        Gates: layers * (attention_gates + adapter_gate),
    }
    for kind, count in expected.items():
        if found[kind] != count:
            raise InjectionError(
                f"{layers} layers should carry {count} {kind.__name__} modules, but {found[kind]} are there: "
                f"some layers of this {type(model).__name__} share modules or are built otherwise"
            )
