"""Replace the submodules of an injected model by those of another configuration, and keep the trained values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.injection.hooks import put
from unipelt.injection.inject import REPLACED, inject_as, strip
from unipelt.injection.precision import widen_input
from unipelt.injection.state import injection_of
from unipelt.submodules.room import own_parameters, own_parts

Values = Mapping[tuple[str, str], Tensor]
"""The values of submodules, by the path of the owning module and the name of the part."""


def own_values(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Return a copy of every part of the parameters that were added to a model."""
    return {(own.path, own.part.name): own.tensor.clone() for own in own_parts(model)}


def reinject(model: PreTrainedModel, config: UniPELTConfig, values: Values) -> None:
    """Remove the submodules of a model and add those of `config`, in place. The rest of the model does not change.

    The head and all trained parameters of the base keep their present values. `unipelt.remove` still restores the base
    bit for bit. Random numbers are not drawn from the caller's generators.

    Args:
        model: an injected model that is not folded.
        config: a configuration whose submodules are all in `values`, such as the model's own with fewer submodules.
        values: the values of the submodules, as `own_values` returns them. They may have more submodules.
    """
    old = injection_of(model)
    ours = own_parameters(model).keys()
    trained = {name: one.requires_grad for name, one in model.named_parameters() if name not in ours}
    bound = {name: vars(model)[name] for name in REPLACED if name in vars(model) and name != "_keys_to_ignore_on_save"}
    widened = [module for module in model.modules() if widen_input in module._forward_pre_hooks.values()]
    strip(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(old.required_grad[name])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        inject_as(model, config, deployed=old.deployed, head=old.head)
    new = injection_of(model)
    new.originals, new.unfrozen, new.vocabulary = dict(old.originals), old.unfrozen, old.vocabulary
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(trained[name])
    for module in widened:  # the parameters are in float32 already, so injection has not put the hook again
        put(module, widen_input)
    vars(model).update(bound)
    for own in own_parts(model):
        own.tensor.copy_(values[own.path, own.part.name])
