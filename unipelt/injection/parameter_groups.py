"""Parameter groups for an optimizer: a learning rate for each part of a method, and weight decay for matrices alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unipelt.injection.state import host_of, injection_inside
from unipelt.submodules.entry import Entry
from unipelt.submodules.room import own_parts, rooms

Key = tuple[str, float, bool]


def parameter_groups(
    model: PreTrainedModel,
    *,
    lr: float,
    weight_decay: float = 0.0,
    gate: float | None = None,
    head: float | None = None,
    lora_b: float | None = None,
    **rates: float,
) -> list[dict[str, Any]]:
    """Return an optimizer's groups of all parameters that train, with a learning rate for each part.

        groups = unipelt.parameter_groups(model, lr=1e-3, weight_decay=0.01, prefix=1e-2, head=1e-3)
        optimizer = torch.optim.AdamW(groups)

    Weight decay applies to the matrices of every submodule, of gates and of the head. It applies to no bias, and to no
    other parameter with one dimension (norms, learned factors).

    If a gate has another learning rate than the rows that share its matrix product, the entry that holds both keeps
    them as two parameters from then on. The names in checkpoints do not change.

    Args:
        model: an injected model.
        lr: learning rate of every part without a learning rate of its own.
        weight_decay: weight decay of matrices.
        gate: learning rate of all gates; None for `lr`.
        head: learning rate of the head; None for `lr`.
        lora_b: learning rate of LoRA's B, which LoRA+ (Hayou et al., 2024) sets to about 16 times that of A; None for
            the learning rate of LoRA.
        rates: learning rates by submodule: `adapter`, `prefix`, `lora`, `prompt`, `ia3`, …

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name` (the part).

    Raises:
        ValueError: the model has no injection or no such part, a learning rate is not a positive number, or the weight
            decay is below 0.
    """
    model = host_of(model)
    injection = injection_inside(model)
    kinds = {own.part.kind for own in own_parts(model)} - {"gate"}
    if unknown := sorted(rates.keys() - kinds):
        raise ValueError(f"this model has no submodule {unknown[0]!r}; it has {', '.join(sorted(kinds)) or 'none'}")
    named = {"lr": lr, "gate": gate, "head": head, "lora_b": lora_b, **rates}
    for name, rate in named.items():
        if rate is not None and not (_is_number(rate) and 0 < rate < 1e6):
            raise ValueError(f"{name} must be a learning rate above 0, not {rate!r}")
    if not (_is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be 0 or above, not {weight_decay!r}")
    of_gate = lr if gate is None else gate
    for entry in _entries(model):
        if any(rates.get(part.kind, lr) != of_gate for part in entry.parts if part.row):
            entry.separate()
    groups: dict[Key, dict[str, Any]] = {}
    for name, parameter, part, rate in _trained(model, injection.head, lr, of_gate, head, lora_b, rates):
        decays = parameter.dim() > 1 and not name.endswith("bias")
        key = (part, rate, decays)
        if key not in groups:
            groups[key] = {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0, "name": part}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def print_trainable_parameters(model: PreTrainedModel) -> None:
    """Print the number of parameters that train, the number of all, and their ratio in percent, in PEFT's format."""
    injection_inside(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _entries(model: nn.Module) -> Iterator[Entry]:
    for _, room in rooms(model):
        yield from (module for module in room.modules() if isinstance(module, Entry))


def _trained(
    model: nn.Module,
    head_names: frozenset[str],
    lr: float,
    of_gate: float,
    head: float | None,
    lora_b: float | None,
    rates: dict[str, float],
) -> Iterator[tuple[str, nn.Parameter, str, float]]:
    """Yield each parameter that trains: its name, the parameter, the part that it belongs to, and its learning rate."""
    owners: dict[int, tuple[str, str]] = {}
    for own in own_parts(model):
        # a gate and rows in one parameter have one learning rate, and the part is named after the rows
        if own.part.kind != "gate" or id(own.parameter) not in owners:
            owners[id(own.parameter)] = (own.part.kind, own.part.name)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in owners:
            kind, part = owners[id(parameter)]
            rate = of_gate if kind == "gate" else rates.get(kind, lr)
            if kind == "lora" and lora_b is not None and part.endswith(".B"):
                kind, rate = "lora_b", lora_b
            yield name, parameter, kind, rate
        elif name in head_names:
            yield name, parameter, "head", lr if head is None else head
        else:
            yield name, parameter, "base", lr
