"""Find the gates of a model, and measure how much they vary over data.

Shapes: B examples, T tokens, G gates of one entry (they read the same input), N values of a gate, P parts (calls of
a gate).
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

from unipelt.files.progress import track
from unipelt.submodules.entry import Entry
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.room import layer_sets, rooms


class FoldError(ValueError):
    """A model cannot be folded, or not with these arguments; the message gives the reason. The model is unchanged."""


@dataclass(frozen=True)
class GateTarget:
    """A gate, and the submodule that the gate scales.

    Attributes:
        path: the path of the entry that computes the gate.
        name: the gate's name, as in `unipelt.record_gates`.
        entry: the entry.
        target: the submodule.
        mask: the name of the model's input that marks the real tokens in the gate's input.
    """

    path: str
    name: str
    entry: Entry
    target: Any
    mask: str

    @property
    def row(self) -> int:
        """The index of the gate among the gates of its entry."""
        return self.entry.gates.names.index(self.name)


def find_gates(model: PreTrainedModel) -> list[GateTarget]:
    """Return every gate of an injected model, in the order of its layers."""
    behind_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    paths = {module: path for path, module in model.named_modules() if isinstance(module, Entry)}
    found = []
    for _, _, part in layer_sets(model):
        scaled: dict[str, Any] = {term.gate_name: term for term in part.terms.values() if term.gate_name}
        if part.prefix is not None and part.prefix.gate_name:
            scaled[part.prefix.gate_name] = part.prefix
        for entry in (part.entry, *(term.entry for term in part.terms.values())):
            if entry is None:
                continue
            for name in entry.gates.names:
                target = scaled[name]
                mask = "attention_mask"
                if getattr(target, "crosses", False):  # the gate reads the encoder's output
                    mask = "attention_mask" if behind_encoder else "encoder_attention_mask"
                elif behind_encoder and name.startswith(("decoder.", "cross.")):
                    mask = "decoder_attention_mask"
                found.append(GateTarget(paths[entry], name, entry, target, mask))
    for _, room in rooms(model):
        for module in room.modules():
            if isinstance(module, Prompt) and module.entry is not None:
                found.append(GateTarget(paths[module.entry], "prompt", module.entry, module, "attention_mask"))
    return found


def measure_gates(
    model: PreTrainedModel, gates: list[GateTarget], batches: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], int]:
    """Run the model over the data in evaluation mode, and compute statistics of its gates.

    Args:
        model: an injected model; its training modes are restored afterwards.
        gates: at least one gate, from `find_gates`.
        batches: inputs of the model; padding is left out where a gate has one value per token.

    Returns:
        Mean, population standard deviation, minimum and maximum of the gates, (4, G) in float64, by the path of their
        entry; and the number of examples.

    Raises:
        FoldError: there are fewer than two examples, a gate is not finite or was never computed, or a batch is not a
            mapping.
    """
    parts: dict[str, list[Tensor]] = {gate.path: [] for gate in gates}
    inputs: dict[str, Any] = {}
    examples = 0
    in_front = sum(len(module.embedding) for module in model.modules() if isinstance(module, Prompt))

    def keep(gate: GateTarget, module: Any, args: Any, output: Tensor) -> None:
        values = output if output.dim() == 3 else output.unflatten(0, (_batch_size(inputs), -1))
        mask = inputs.get(gate.mask)
        if in_front and isinstance(mask, Tensor):
            mask = nn.functional.pad(mask, (in_front, 0), value=1)
        if values.shape[1] > 1 and isinstance(mask, Tensor) and mask.shape == values.shape[:2]:
            values = values[mask.to(values.device).bool()]
        parts[gate.path].append(_sums(values.flatten(0, -2).cpu().double()))

    hooks = {gate.path: (gate.entry.gates, partial(keep, gate)) for gate in gates}
    with _evaluating(model), _hooked(hooks.values()), torch.no_grad():
        for batch in track(batches, "measuring gates", "batch"):
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
    """Return count, mean, sum of squared deviations, minimum and maximum, (5, G), of values (N, G)."""
    count, mean = values.new_full(values.shape[1:], len(values)), values.mean(dim=0)
    return torch.stack([count, mean, (values - mean).square().sum(dim=0), values.amin(dim=0), values.amax(dim=0)])


def _spread(parts: Tensor) -> Tensor:
    """Return mean, standard deviation, minimum and maximum, (4, G), over all parts, (P, 5, G)."""
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
