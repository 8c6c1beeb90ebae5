"""Put submodules into a pretrained model and take them out again: select, attach, count, freeze."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.config.methods import LoRAConfig, UniPELTConfig
from unipelt.config.presets import resolve
from unipelt.files.strict import show
from unipelt.hosts.locate import InjectionError, find_stacks
from unipelt.hosts.quantised import find_obstacle
from unipelt.injection.attach import attach, attach_prompt, check_counts
from unipelt.injection.detach import detach
from unipelt.injection.parameters import (
    Injection,
    bias_names,
    head_names,
    injection_of,
    kept_names,
    set_trainable,
    submodule_parameters,
)
from unipelt.submodules.lora import NAMES, LoRA, matrix_of


def inject(
    model: PreTrainedModel, config: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl"
) -> PreTrainedModel:
    """Add gated Adapter, Prefix and LoRA modules to a pretrained model, in place, and freeze what does not train.

    The model stays the same `PreTrainedModel`: its own parameters keep their names, and `Trainer`, pipelines,
    accelerate and `copy.deepcopy` work as before. `model.save_pretrained` then writes what `unipelt.save` writes, and
    `model.push_to_hub` uploads what `unipelt.push_to_hub` uploads.

    Args:
        model: a model of Transformers, or of your own (`unipelt.register_family`), with or without a head. A part
            that its checkpoint did not hold (a pooler that starts at random) trains with the head; the head of a
            language model, tied to its embeddings or not, belongs to what was pretrained and is frozen.
        config: a preset's name (`unipelt.PRESETS`), a `UniPELTConfig`, a dict, or a path to JSON or YAML.

    Returns:
        The same model.

    Raises:
        ConfigError: the configuration cannot be meant.
        InjectionError: the model carries submodules already, is of an architecture that is not described, or cannot
            take one of them; the message says why.
    """
    resolved = resolve(config)
    inject_as(model, resolved, deployed=False, head=None)
    if resolved.lora is not None and resolved.lora.start == "pissa":
        _start_from_weights(model, resolved.lora)
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """Take everything out again: the model as it was before `inject`, bit for bit, in place.

    Parameters of the model's own that trained (the head, biases, with `train_base` every weight), or that low-rank
    terms were merged into (`unipelt.fold`), get back the values that they had. Raises `ValueError` if nothing was
    injected, and for a task of `unipelt.Tasks`, which is deleted there.
    """
    injection = injection_of(model)
    if injection.shares:
        raise ValueError("this model is one of several tasks on one base; call delete(name) of their unipelt.Tasks")
    before = injection.before
    _strip(model)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.copy_(before[name])
        parameter.grad = None
        parameter.requires_grad_(injection.required_grad[name])
    return model


def _start_from_weights(model: PreTrainedModel, lora: LoRAConfig) -> None:
    """Not a part of `inject_as`: what is loaded has its start in its file, and computes none."""
    try:
        for path, host in model.named_modules():
            for term in (getattr(host, name, None) for name in NAMES):
                if not isinstance(term, LoRA):
                    continue
                weight = matrix_of(host, term.rows)
                if not weight.is_meta and not weight.isfinite().all():
                    raise InjectionError(f"{path}.weight is not finite, and has no singular values to start from")
                term.start(weight, gated=lora.gate)
    except BaseException:
        remove(model)
        raise


def inject_as(
    model: PreTrainedModel, config: UniPELTConfig, *, deployed: bool, head: frozenset[str] | None
) -> PreTrainedModel:
    """`inject`, with two things that a checkpoint knows: the prefix's form, and which parameters are the head."""
    if not isinstance(model, PreTrainedModel):
        raise InjectionError(f"inject takes a PreTrainedModel of transformers, not {type(model).__name__}")
    if getattr(model, "unipelt_injection", None) is not None or any(True for _ in submodule_parameters(model)):
        raise InjectionError("this model carries submodules already; call unipelt.remove(model) first")
    stacks = find_stacks(model, config) if config.has_submodules else []
    injection = Injection(
        config=config,
        deployed=deployed,
        head=head_names(model) if head is None else head,
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
            attach(model, found, config, deployed)
        if config.prompt is not None:
            attach_prompt(model, stacks[0], config.prompt, config.gate)
        check_counts(model, config, stacks)
        set_trainable(model, injection)
        if config.bitfit and not bias_names(model) - injection.head:
            raise InjectionError(f"bitfit trains biases, and this {type(model).__name__} has none")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        injection.originals = {
            name: parameter.detach().to("meta" if parameter.is_meta else "cpu", copy=True)
            for name, parameter in model.named_parameters()
            if name in injection.required_grad and (name in trained or name in injection.head)
        }
        # Transformers drops these names when it saves, and Trainer expects just them to be missing when it loads
        kept = set(kept_names(model))
        record._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in kept}
        record.save_pretrained = partial(_save_pretrained, model)
        record.push_to_hub = partial(_push_to_hub, model)
        if getattr(model, "is_quantized", False):
            record._hf_peft_config_loaded = True  # or Trainer takes it for a quantised model that nothing was added to
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
    from unipelt.checkpoint.checkpoint import save  # it imports this module: loading injects

    if push_to_hub:
        raise ValueError("push_to_hub is no option of an injected model's save_pretrained; call unipelt.push_to_hub")
    if is_main_process:
        save(model, save_directory, state_dict=state_dict)


def _push_to_hub(model: PreTrainedModel, repo_id: str, **options: Any) -> str:
    """An injected model's `push_to_hub`: what `unipelt.push_to_hub` does."""
    from unipelt.checkpoint.push import push_to_hub  # it imports this module: saving does

    return push_to_hub(model, repo_id, **options)


REPLACED = ("_keys_to_ignore_on_save", "save_pretrained", "push_to_hub", "_hf_peft_config_loaded")


def _strip(model: nn.Module) -> None:
    """Take out everything, and the record; the parameters' values and flags are the caller's."""
    detach(model)
    injection: Injection | None = model.__dict__.pop("unipelt_injection", None)
    if injection is not None:
        for name in REPLACED:
            model.__dict__.pop(name, None)
        model.__dict__.update(injection.replaced)
