"""The parameters of submodules, those of the head, those that train, and the numbers of all these.

The parameters of submodules are those in rooms; no part of a name is used to find them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.hosts.families import FAMILIES
from unipelt.hosts.quantised import is_quantised
from unipelt.hosts.vocabulary import resized_vocabulary
from unipelt.injection.state import Injection, host_of, injection_inside
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import own_parameters, own_parts, rooms


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, as `unipelt.parameter_counts` returns them.

    Attributes:
        trained: parameters that the method trains, without the head (as in the paper's Table 4).
        deployed: parameters that remain after training: plain prefixes replace the reparameterisation network, and the
            initial values of LoRA (`LoRAConfig.start`) count too.
        head: parameters of the head that train, with the parts of the base that its checkpoint did not hold.
        base: parameters of the pretrained model, without head and without submodules.
        submodules: parameters that train, by submodule (`adapter`, `prefix`, `lora`, …, `bitfit`, `base`), without
            gates.
        deployed_submodules: parameters that remain after training, by submodule, without gates.
        gates: parameters by gate (`adapter`, `prefix`, `lora_query`, `prompt`, …), over all layers; `network` counts
            the networks in front of gates.
    """

    trained: int
    deployed: int
    head: int
    base: int
    submodules: dict[str, int]
    deployed_submodules: dict[str, int]
    gates: dict[str, int]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.submodules.items())
        gates = [f"{name} {count:,}" for name, count in self.gates.items()]
        rows = [", ".join(gates[start : start + 4]) for start in range(0, len(gates), 4)]
        share = 100 * self.trained / self.base if self.base else 0.0
        return "\n".join(
            [
                f"trained   {self.trained:>12,}  ({share:.2f} % of the base's {self.base:,})",
                *([f"            {parts}"] if parts else []),
                *(f"            {'gates: ' if row == rows[0] else '       '}{row}" for row in rows),
                f"deployed  {self.deployed:>12,}",
                f"head      {self.head:>12,}",
            ]
        )


_WITHOUT_TASK = (
    transformers.MODEL_MAPPING,
    transformers.MODEL_FOR_PRETRAINING_MAPPING,
    transformers.MODEL_FOR_MASKED_LM_MAPPING,
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
"""Model classes, by configuration, that are pretrained as a whole."""


def head_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters of the task's head, and of parts of the base that its checkpoint did not hold.

    The head is all parameters outside the base model. The output head of a language model is not counted: it was
    pretrained with the base, and often shares the weight of the embeddings.

    Transformers marks every parameter that it loads. If some parameters of a model have the mark, those without it
    started at random (for example a pooler). Embeddings and the output head of a resized vocabulary are left out,
    because resizing makes a new parameter from old rows.
    """
    outside = _outside_base(model)
    resized = resized_vocabulary(model)
    embeddings = {id(parameter) for parameter in _embeddings(model)}
    loaded = {id(parameter) for parameter in model.parameters() if getattr(parameter, "_is_hf_initialized", False)}
    if loaded and not any(is_quantised(parameter) and id(parameter) in loaded for parameter in model.parameters()):
        loaded |= _quantised_afterwards(model, loaded)
    names = []
    for name, parameter in model.named_parameters():
        fresh = bool(loaded) and id(parameter) not in loaded and id(parameter) not in embeddings
        if id(parameter) in outside or (fresh and name not in resized):
            names.append(name)
    return frozenset(names)


def _quantised_afterwards(model: nn.Module, loaded: set[int]) -> set[int]:
    """Return the ids of loaded weights that lost their mark by quantisation.

    A quantised weight counts as loaded if all parameters of its module that are not quantised have the mark.
    """
    return {
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if is_quantised(parameter)
        and all(id(other) in loaded for other in module.parameters(recurse=False) if not is_quantised(other))
    }


def _outside_base(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of a task's head."""
    kind, base = type(model.config), model.base_model
    known: tuple[Any, ...] = tuple(mapping[kind] for mapping in _WITHOUT_TASK if kind in mapping)
    if isinstance(model, known):
        return set()
    if base is not model:
        inside = list(base.parameters())
    elif model.config.model_type in FAMILIES:
        # a few classes have no separate base model, and hold its parts beside the head
        parts = {stack.layers.partition(".")[0] for stack in FAMILIES[model.config.model_type].stacks}
        inside = [parameter for part in parts for parameter in getattr(model, part, nn.Module()).parameters()]
        inside += _embeddings(model)
    else:
        return set()
    output = model.get_output_embeddings()
    inside += [] if output is None else output.parameters()
    there = {id(parameter) for parameter in inside}
    return {id(parameter) for parameter in model.parameters()} - there


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the input embedding; Perceiver's is a bare parameter."""
    held: Any = model.get_input_embeddings()
    return [held] if isinstance(held, nn.Parameter) else list(held.parameters())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of a tensor (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def bias_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the model's own biases, which BitFit trains."""
    ours = own_parameters(model).keys()
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if name not in ours and (name.rpartition(".")[2] == "bias" or name.endswith("_bias"))
    )


def set_trainable(model: PreTrainedModel, injection: Injection) -> None:
    """Let the parameters train that the configuration chooses, and freeze all others."""
    config = injection.config
    ours = own_parameters(model).keys()
    frozen = {own.full_name for own in own_parts(model) if own.part.frozen}
    biases = bias_names(model) if config.bitfit else frozenset()
    for name, parameter in model.named_parameters():
        if name in ours:
            train = name not in frozen
        elif name in injection.head:
            train = config.train_head or name in biases
        else:
            train = config.train_base or name in biases
        parameter.requires_grad_(train)


def kept_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that a checkpoint holds: submodules, the head, and all others that train.

    A frozen head is kept too, because the base's checkpoint does not hold the head. For the same reason, a vocabulary
    of another size is kept.
    """
    injection = injection_inside(model)
    ours = own_parameters(model).keys()
    also = {
        *injection.head,
        *injection.vocabulary,
        *injection.originals,
        *(injection.folded.unfrozen if injection.folded else ()),
    }
    return [
        name for name, parameter in model.named_parameters() if name in ours or name in also or parameter.requires_grad
    ]


def unfrozen_names(model: nn.Module) -> set[str]:
    """Return the names of pretrained parameters that train by the caller's choice, and not by the configuration."""
    injection = injection_inside(model)
    ours = own_parameters(model).keys()
    known = {*ours, *injection.vocabulary, *(injection.originals.keys() - injection.unfrozen)}
    return {name for name in kept_names(model) if name not in known}


def parameter_counts(model: PreTrainedModel) -> ParameterCounts:
    """Count an injected model's parameters, trained and deployed. Raises `ValueError` if nothing was injected.

    In a folded model no parameter trains, and `deployed` counts the parameters that remain beside the base.
    """
    model = host_of(model)
    injection = injection_inside(model)
    trained: Counter[str] = Counter()
    deployed: Counter[str] = Counter()
    gates: Counter[str] = Counter()
    trained_gates = 0
    for own in own_parts(model):
        count = own.size
        if own.part.kind == "gate":
            gates[own.part.gate] += count
            trained_gates += count if own.parameter.requires_grad else 0
        else:
            trained[own.part.kind] += count if own.parameter.requires_grad else 0
            deployed[own.part.kind] += count
    for module in (one for _, room in rooms(model) for one in room.modules() if isinstance(one, PrefixNetwork)):
        deployed["prefix"] += module.deployed_count - sum(parameter.numel() for parameter in module.parameters())
    ours = own_parameters(model).keys()
    head = base = 0
    for name, parameter in model.named_parameters():
        if name in ours:
            continue
        if name not in injection.head:
            base += parameter.numel()
        if not parameter.requires_grad:
            continue
        if name in injection.head and injection.config.train_head:
            head += parameter.numel()
        else:
            part = "bitfit" if injection.config.bitfit else "base"
            trained[part] += parameter.numel()
            deployed[part] += parameter.numel()
    in_gates = sum(gates.values())
    if injection.folded is not None:
        trained.clear()
    return ParameterCounts(
        trained=sum(trained.values()) + trained_gates,
        deployed=sum(deployed.values()) + in_gates,
        head=head,
        base=base,
        submodules=dict(trained),
        deployed_submodules=dict(deployed),
        gates=dict(gates),
    )
