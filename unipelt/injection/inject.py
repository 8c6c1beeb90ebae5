"""Add submodules to a model by a checked configuration, and remove them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.config.parts import LoRAConfig
from unipelt.files.messages import show
from unipelt.hosts.locate import InjectionError, find_stacks
from unipelt.hosts.quantised import find_obstacle
from unipelt.hosts.vocabulary import resized_vocabulary
from unipelt.injection.attach import build, build_prompt, install, install_prompt, install_tokens
from unipelt.injection.balance_hooks import add_balance, balances
from unipelt.injection.parameters import bias_names, head_names, kept_names, set_trainable
from unipelt.injection.precision import widen
from unipelt.injection.state import Injection, injection_of
from unipelt.injection.token_hooks import build_tokens, with_token_ids
from unipelt.injection.wire import check_names, detach
from unipelt.submodules.lora import LoRA
from unipelt.submodules.outputs import matrix_of
from unipelt.submodules.room import own_buffers, own_parameters, placed_terms, rooms


def inject_as(
    model: PreTrainedModel, config: UniPELTConfig, *, deployed: bool, head: frozenset[str] | None
) -> PreTrainedModel:
    """Add submodules to a model as `inject` does, with two facts that a checkpoint holds.

    Args:
        model: the model, changed in place.
        config: configuration of the submodules.
        deployed: whether prefixes are plain parameters, without the reparameterisation network.
        head: names of the head's parameters; None to find them by `head_names`.

    Returns:
        The same model.

    Raises:
        InjectionError: the model cannot take the submodules, and has not changed.
    """
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(
            f"inject takes a PreTrainedModel of transformers, not {type(model).__name__}{model_inside(model)}"
        )
    if getattr(model, "unipelt_injection", None) is not None or any(True for _ in rooms(model)):
        raise InjectionError("this model carries submodules already; call unipelt.remove(model) first")
    check_names(model)
    config = with_token_ids(model, config)
    stacks = find_stacks(model, config) if config.has_submodules else []
    injection = Injection(
        config=config,
        deployed=deployed,
        head=head_names(model) if head is None else head,
        vocabulary=resized_vocabulary(model),
        required_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        replaced={name: vars(model)[name] for name in REPLACED if name in vars(model)},
    )
    if unknown := injection.head - injection.required_grad.keys():
        raise InjectionError(f"this {type(model).__name__} has no head parameter {show(sorted(unknown)[0])}")
    if obstacle := find_obstacle(model, config, injection.head):
        raise InjectionError(obstacle)
    record: Any = model
    record.unipelt_injection = injection
    try:
        for found in stacks:
            install(model, build(model, found, config, deployed), config)
        if config.prompt is not None:
            install_prompt(model, stacks[0], *build_prompt(model, stacks[0], config))
        if config.tokens is not None:
            install_tokens(model, build_tokens(model, config))
        if balances(config):
            add_balance(model)
        set_trainable(model, injection)
        if config.bitfit and not bias_names(model) - injection.head:
            raise InjectionError(f"bitfit trains biases, and this {type(model).__name__} has none")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        widened = trained & injection.head if config.dtype == "float32" else set()
        injection.originals = {
            name: parameter.detach().to("meta" if parameter.is_meta else "cpu", copy=True)
            for name, parameter in model.named_parameters()
            if name in injection.required_grad and (name in trained or name in injection.head)
        }
        widen(model, widened)
        # Transformers does not save these names, and Trainer expects exactly these to be missing when it loads
        kept = {*kept_names(model), *own_buffers(model)}
        record._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in kept}
        if getattr(model, "is_quantized", False):
            record._hf_peft_config_loaded = True  # otherwise Trainer refuses to train a quantised model
    except BaseException:
        strip(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(injection.required_grad[name])
        raise
    return model


def model_inside(model: Any) -> str:
    """Return what to inject instead of a module that is no PreTrainedModel but holds one, for the end of a sentence."""
    if not isinstance(model, nn.Module) or hasattr(model, "peft_config"):  # a PeftModel holds a set already
        return ""
    held = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    if not held:
        return ""
    name, inner = held[0]  # outer modules come first
    adapter = ""
    if callable(getattr(model, "add_adapter", None)):
        adapter = (
            ", or call its method add_adapter(unipelt.PeftConfig(...)), which makes a folder that "
            f"{type(model).__name__} opens"
        )
    return f"; inject the {type(inner).__name__} in it, model.get_submodule({name!r}){adapter}"


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Remove all submodules in place, so that the model is as it was before `inject`, bit for bit.

    Pretrained parameters that trained (the head, biases, with `train_base` every weight), or that low-rank terms were
    merged into (`unipelt.fold`), get their former values back.

    Args:
        model: an injected model.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no injection, is a task of `unipelt.Tasks` (which has `delete`), or has lost or
            reshaped a pretrained parameter.
    """
    injection = injection_of(model)
    if injection.shares:
        raise ValueError("this model is one of several tasks on one base; call delete(name) of their unipelt.Tasks")
    before = injection.before
    _check_as_it_was(model, injection)
    strip(model)
    for name, parameter in model.named_parameters():
        if name in before:
            value = before[name]
            if value.dtype == parameter.dtype:
                parameter.data.copy_(value)
            else:  # the parameter trained in float32, and its base is in half precision
                parameter.data = value.to(parameter.device, copy=True)
        if name in injection.required_grad:
            parameter.grad = None
            parameter.requires_grad_(injection.required_grad[name])
    return model


def _check_as_it_was(model: PreTrainedModel, injection: Injection) -> None:
    """Raise `ValueError` if a pretrained parameter is missing, or has another shape than before `inject`."""
    ours = own_parameters(model).keys()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name not in ours}
    if gone := sorted(injection.required_grad.keys() - shapes.keys()):
        raise ValueError(
            f"the parameter {gone[0]!r} is no longer in the model, so it cannot be put back; nothing was removed"
        )
    for name, value in injection.before.items():
        if shapes[name] != value.shape:
            raise ValueError(
                f"the parameter {name!r} was {tuple(value.shape)} when submodules were added and is "
                f"{tuple(shapes[name])} now, so it cannot be put back; nothing was removed"
            )


def start_from_weights(model: PreTrainedModel, lora: LoRAConfig) -> None:
    """Initialise low-rank terms as the principal parts of their weights (`lora.start: pissa`).

    `inject_as` does not call this function, because a checkpoint holds the initial values of a loaded model. Raises
    `InjectionError` for a weight that is not finite, after the removal of all submodules.
    """
    try:
        for placed in placed_terms(model):
            if not isinstance(placed.term, LoRA):
                continue
            weight = matrix_of(placed.host, placed.term.outputs)
            if not weight.is_meta and not weight.isfinite().all():
                raise InjectionError(f"{placed.path}.weight is not finite, and has no singular values to start from")
            placed.term.start(weight, gated=lora.gate)
    except BaseException:
        remove(model)
        raise


def check_memory(model: PreTrainedModel) -> None:
    """Raise `InjectionError` for a parameter on the device `meta`, unless accelerate loads its numbers for each pass.

    Inside `torch.device("meta")` nothing is checked, because only shapes are needed there.
    """
    if torch.get_default_device().type == "meta":
        return
    name = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if name is None:
        return
    module: Any = model.get_submodule(name.rpartition(".")[0])
    if getattr(module, "_hf_hook", None) is None:
        raise InjectionError(
            f"{name} is on the device meta and has no numbers, and submodules start beside those; load the model first"
        )


def strip(model: nn.Module) -> None:
    """Remove all submodules and the record of the injection; the caller restores parameters and `requires_grad`."""
    detach(model)
    injection: Injection | None = model.__dict__.pop("unipelt_injection", None)
    if injection is not None:
        for name in REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(injection.replaced)


REPLACED = ("_keys_to_ignore_on_save", "save_pretrained", "push_to_hub", "_hf_peft_config_loaded")
"""Attributes of the model that injection sets (`checkpoint.bind` sets two of them), and that removal restores."""
