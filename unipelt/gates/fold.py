"""After training: gates that turned out nearly constant become constants, and what they scale is folded away."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from unipelt.gates.measure import FoldError, GateTarget, find_gates, measure_gates
from unipelt.gates.merge import check_gates, fold_constants
from unipelt.injection.parameters import ParameterCounts, parameter_counts
from unipelt.injection.state import host_of, injection_inside
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import DEFAULT, rooms

Outcome = Literal["merged", "constant", "dropped", "kept"]


@dataclass(frozen=True)
class FoldedGate:
    """One gate of one layer: its values over the data, and what became of it.

    Attributes:
        path: of the module that computes it, from the model.
        name: as `unipelt.record_gates` calls it.
        mean, std, minimum, maximum: over all examples (population standard deviation); of a gate with a number a
            token, over all real tokens of all examples; where layers are shared, over all passes through them.
        outcome: `merged` (its low-rank term is in the weight), `constant` (its adapter, prefix or prompt is scaled for
            good), `dropped` (it is closed, and its submodule gone) or `kept`.
    """

    path: str
    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    outcome: Outcome


@dataclass(frozen=True)
class FoldReport:
    """What `unipelt.fold` found and did; `str` of it is a table.

    Attributes:
        gates: every gate of every layer.
        examples: how many examples the gates were recorded over.
        tolerance, closed: what was asked for.
        merged: how many low-rank terms are in the weights now, those without a gate included.
        before, after: parameter counts.
    """

    gates: tuple[FoldedGate, ...]
    examples: int
    tolerance: float
    closed: float
    merged: int
    before: ParameterCounts
    after: ParameterCounts

    @property
    def outcomes(self) -> dict[str, int]:
        """How many gates were merged, became constant, were dropped, were kept."""
        found = Counter(gate.outcome for gate in self.gates)
        return {name: found[name] for name in ("merged", "constant", "dropped", "kept")}

    def __str__(self) -> str:
        width = max([4, *(len(gate.name) for gate in self.gates)])
        rows = [f"layer  {'gate':<{width}}    mean     std     min     max"] if self.gates else []
        for gate in self.gates:
            layer = re.search(r"\.(\d+)\.", gate.path)
            rows.append(
                f"{layer[1] if layer else '-':>5}  {gate.name:<{width}}  {gate.mean:6.4f}  {gate.std:6.4f}  "
                f"{gate.minimum:6.4f}  {gate.maximum:6.4f}  {gate.outcome}"
            )
        counts = ", ".join(f"{count} {name}" for name, count in self.outcomes.items())
        return "\n".join(
            [
                *rows,
                f"{len(self.gates)} gates over {self.examples:,} examples: {counts}",
                f"{self.merged} low-rank terms merged; beside the base {self.before.deployed:,} parameters before "
                f"(deployed), {self.after.deployed:,} after",
            ]
        )


def fold(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] = (),
    *,
    tolerance: float = 0.05,
    closed: float = 0.01,
) -> FoldReport:
    """Freeze nearly constant gates of a trained model and fold away what they scale, in place.

    A gate whose standard deviation over the data is at most `tolerance` becomes the constant c, its mean. Then

    - a low-rank term is merged: `W += c B A`, computed in float32 and rounded once to the weight's type. So is a term
      without a gate, with `c = alpha / r`;
    - an adapter's `up` is multiplied by c; a closed one goes, with its second pass through the norm;
    - a prefix under `scale` gating is multiplied by c; under `mass` gating (all causal attention) `log c` becomes a
      constant beside the mask; one with a softmax of its own has its values multiplied by c; of the last two a closed
      one goes;
    - a prompt is multiplied by c.

    Gates that vary are kept, and go on to be computed. A prefix under `scale` and a prompt are never dropped, since a
    closed one still takes attention (paper, footnote 3). A gate of DeBERTa-v2's query is kept, unless closed: its
    projection serves relative positions too, which the gated term keeps out of. The reparameterisation networks go as
    well (the deployed form).

    The model stays a `PreTrainedModel`, in evaluation mode, of which nothing trains: a forward pass in training mode
    with gradients is refused. `unipelt.save` and `unipelt.load` give the same folded model again, bit for bit;
    `unipelt.remove` gives the base again, bit for bit.

    Args:
        model: an injected model, trained.
        batches: inputs of the model, as `model(**batch)` takes them, on any device; at least two examples. Real
            tokens are told from padding by `attention_mask` (`decoder_attention_mask` for a decoder behind an
            encoder). May be empty for a model without gates.
        tolerance: the largest standard deviation of a gate that counts as constant; a gate is between 0 and 1.
        closed: a constant gate with a mean below this is closed.

    Returns:
        Every gate's statistics and what became of it, and parameter counts before and after.

    Raises:
        FoldError: the model is folded already, has nothing to fold, has a weight that nothing can be merged into
            (quantised, sharded, offloaded, shared with another module), a gate that is not finite or was never
            computed; or an argument cannot be meant. The model is as it was.
        ValueError: nothing was injected.
    """
    model = host_of(model)
    injection = injection_inside(model)
    _check_arguments(tolerance, closed)
    if injection.shares:
        raise FoldError(
            "this model shares its base with other tasks, and folding would merge its terms into their weights; save "
            "it, and fold what unipelt.from_pretrained gives"
        )
    if others := sorted({name for _, room in rooms(model) for name in room} - {DEFAULT}):
        raise FoldError(
            f"fold takes a model with one set, called {DEFAULT!r}, and this has {', '.join(others)}; delete all sets "
            "but one (delete_adapter), and fold what unipelt.from_peft(model) gives"
        )
    if injection.folded is not None:
        raise FoldError("this model is folded already; to fold it otherwise, start from the model before folding")
    check_gates(model)
    gates = find_gates(model)
    if not gates and not any(isinstance(module, (LoRA, PrefixNetwork)) for module in model.modules()):
        raise FoldError(f"this {type(model).__name__} has nothing to fold: no gate, no LoRA, no prefix network")
    values, examples = measure_gates(model, gates, batches) if gates else ({}, 0)
    constants: dict[str, dict[str, float | None]] = {}
    told = []
    for gate in gates:
        mean, std, low, high = values[gate.path][:, gate.row].tolist()
        constant = _constant(gate, mean, std, tolerance, closed)
        if constant != "kept":
            constants.setdefault(gate.path, {})[gate.name] = constant
        told.append(FoldedGate(gate.path, gate.name, mean, std, low, high, _outcome(gate, constant)))
    before = parameter_counts(model)
    merged = fold_constants(model, constants)
    return FoldReport(tuple(told), examples, tolerance, closed, merged, before, parameter_counts(model))


def _check_arguments(tolerance: float, closed: float) -> None:
    for name, value, most in (("tolerance", tolerance, math.inf), ("closed", closed, 1.0)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < most:
            bound = "" if most == math.inf else " and below 1"
            raise FoldError(f"{name} must be a number, 0 or above{bound}, not {value!r}")


def _constant(
    gate: GateTarget, mean: float, std: float, tolerance: float, closed: float
) -> float | Literal["kept"] | None:
    """What a gate becomes: a constant, None (its submodule is dropped), or that it is kept."""
    if std > tolerance or not gate.target.folds_to:
        return "kept"
    if (mean < closed or mean == 0) and not gate.target.takes_attention:
        return None
    if mean == 0 or getattr(gate.target, "once", False):
        return "kept"
    return min(mean, 1.0)  # a mean of token weights in float32 may be a rounding above 1


def _outcome(gate: GateTarget, constant: float | Literal["kept"] | None) -> Outcome:
    if constant == "kept":
        return "kept"
    if constant is None:
        return "dropped"
    return gate.target.folds_to
