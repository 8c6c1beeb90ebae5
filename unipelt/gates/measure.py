"""How much gates vary over data, and where they are.

Shapes: B examples, T tokens, G gates that read the same input, N values of a gate, P parts (calls of a gate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.injection.attention_hooks import Site
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.term import Term


class FoldError(ValueError):
    """A model that cannot be folded, or not so; the message says why. The model is as it was."""


@dataclass(frozen=True)
class GatePlace:
    """A gate, and where it is.

    Attributes:
        path: of its `Gates` module.
        row: its place there.
        target: the submodule that it scales.
        mask: the model's input that tells real tokens from padding in what it reads.
    """

    path: str
    name: str
    row: int
    module: Gates
    target: Any
    mask: str


def find_gates(model: PreTrainedModel) -> list[GatePlace]:
    """Every gate of an injected model, in the order of its modules."""
    behind_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    found = []
    for path, module in model.named_modules():
        site: Site | None = vars(module).get("unipelt_site")
        host: Any = module
        if site is not None and host.gates is not None:
            targets = [host.get_submodule(".".join(target)) for target in site.targets]
        elif isinstance(module, (Adapter, LoRA, Prompt, Term)) and module.gates is not None:
            targets = [module]
        else:
            continue
        for row, (name, target) in enumerate(zip(host.gates.names, targets, strict=True)):
            mask = "attention_mask"
            if isinstance(module, (LoRA, Term)) and module.crosses:  # it reads the other text
                mask = "attention_mask" if behind_encoder else "encoder_attention_mask"
            elif behind_encoder and name.startswith(("decoder.", "cross.")):
                mask = "decoder_attention_mask"
            found.append(GatePlace(f"{path}.gates", name, row, host.gates, target, mask))
    return found


def measure_gates(
    model: PreTrainedModel, gates: list[GatePlace], batches: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], int]:
    """Run the model over the data, in evaluation mode, and look at its gates.

    Args:
        model: an injected model; its modes are put back.
        gates: as `find_gates` gave them; at least one.
        batches: inputs of the model; padding does not count where a gate has a number a token.

    Returns:
        Mean, population standard deviation, minimum and maximum of the gates, (4, G) in float64 by the path of their
        module; and how many examples there were.

    Raises:
        FoldError: there are fewer than two examples, a gate is not finite or was never computed, or a batch is no
            mapping.
    """
    parts: dict[str, list[Tensor]] = {gate.path: [] for gate in gates}
    inputs: dict[str, Any] = {}
    examples = 0
    in_front = sum(len(module.embedding) for module in model.modules() if isinstance(module, Prompt))

    def keep(gate: GatePlace, module: Any, args: Any, output: Tensor) -> None:
        values = output if output.dim() == 3 else output.unflatten(0, (_batch_size(inputs), -1))
        mask = inputs.get(gate.mask)
        if in_front and isinstance(mask, Tensor):
            mask = nn.functional.pad(mask, (in_front, 0), value=1)
        if values.shape[1] > 1 and isinstance(mask, Tensor) and mask.shape == values.shape[:2]:
            values = values[mask.to(values.device).bool()]
        parts[gate.path].append(_sums(values.flatten(0, -2).cpu().double()))

    hooks = {gate.path: (gate.module, partial(keep, gate)) for gate in gates}
    with _evaluating(model), _hooked(hooks.values()), torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise FoldError(f"batches must hold mappings of the model's inputs, not {type(batch).__name__}")
            inputs = {
                name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            examples += _batch_size(inputs)
            model(**inputs)
    if examples < 2:
        raise FoldError(f"how much a gate varies shows over at least two examples, and batches held {examples}")
    if absent := [path for path, found in parts.items() if not found]:
        raise FoldError(f"the gates at {absent[0]!r} were never computed in these batches")
    values = {path: _spread(torch.stack(found)) for path, found in parts.items()}
    for gate in gates:
        if not values[gate.path][:, gate.row].isfinite().all():
            raise FoldError(f"the gate {gate.name!r} at {gate.path!r} is not finite over these batches")
    return values, examples


def _batch_size(inputs: Mapping[str, Any]) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)


def _sums(values: Tensor) -> Tensor:
    """Number, mean, sum of squared deviations, minimum and maximum, (5, G), of values (N, G)."""
    count, mean = values.new_full(values.shape[1:], len(values)), values.mean(dim=0)
    return torch.stack([count, mean, (values - mean).square().sum(dim=0), values.amin(dim=0), values.amax(dim=0)])


def _spread(parts: Tensor) -> Tensor:
    """Mean, standard deviation, minimum and maximum, (4, G), over all parts of (P, 5, G)."""
    count, mean, squares, low, high = parts.unbind(dim=1)
    total = count.sum(dim=0)
    middle = (count * mean).sum(dim=0) / total
    variance = (squares + count * (mean - middle).square()).sum(dim=0) / total
    return torch.stack([middle, variance.sqrt(), low.amin(dim=0), high.amax(dim=0)])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
