"""Convert an injected model into a `PeftModel` and back, in place."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from unipelt.bridges.peft_socket.config import PeftConfig
from unipelt.bridges.peft_socket.heads import copies, plain_name, replace_module, wrappers
from unipelt.bridges.peft_socket.register import require_peft
from unipelt.bridges.peft_socket.room import PeftRoom, strip
from unipelt.checkpoint.bind import bind
from unipelt.injection.inject import REPLACED
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import host_of, injection_inside, injection_of
from unipelt.submodules.room import DEFAULT, rooms


def wrap(model: PreTrainedModel, task_type: str | None, adapter_name: str) -> Any:
    """Implement `to_peft`."""
    injection = injection_of(model)
    config = PeftConfig(injection.config, task_type=task_type, deployed=injection.deployed)
    return require_peft().get_peft_model(model, config, adapter_name)


def unwrap(peft_model: Any) -> PreTrainedModel:
    """Implement `from_peft`."""
    model: PreTrainedModel = host_of(peft_model)
    if not any(isinstance(room, PeftRoom) for _, room in rooms(model)):
        raise ValueError(f"this {type(peft_model).__name__} carries no set of unipelt")
    record: Any = model
    names = list(record.peft_config)
    if len(names) != 1:
        raise ValueError(f"from_peft takes a model with one set, and this has {', '.join(names) or 'none'}")
    name = names[0]
    held = {path for path, _ in copies(model, name)}
    if other := next((path for path, _ in wrappers(model) if path not in held), None):
        raise ValueError(f"PEFT wraps {other}, and unipelt.inject knows no such training")
    injection = injection_inside(model)
    injection.config, injection.deployed = record.peft_config[name].unipelt, record.peft_config[name].deployed
    injection.head = frozenset(plain_name(one) for one in injection.head)
    for path, wrapper in list(copies(model, name)):
        for inner, parameter in wrapper.original_module.named_parameters():
            injection.originals[f"{path}.{inner}"] = parameter.detach().to("cpu", copy=True)
        replace_module(model, path, wrapper.modules_to_save[name])
    for one, parameter in model.named_parameters():
        if one in injection.head and one not in injection.originals:
            injection.originals[one] = parameter.detach().to("cpu", copy=True)
    for _, room in rooms(model):
        assert isinstance(room, PeftRoom)
        strip(room)
        room._modules = {DEFAULT if there == name else there: added for there, added in room._modules.items()}
        room.active = DEFAULT
    vars(model).pop("peft_config")
    injection.replaced = {one: vars(model)[one] for one in REPLACED if one in vars(model)}
    if injection.replaced.pop("_hf_peft_config_loaded", False):
        del record._hf_peft_config_loaded
    kept = set(kept_names(model))
    record._keys_to_ignore_on_save = {one for one in model.state_dict() if one not in kept}
    return bind(model)
