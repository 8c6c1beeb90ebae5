"""Replace nearly constant gates of a trained model by constants, and fold the constants into the weights."""

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
from unipelt.submodules.prefix import PrefixNetwork
from unipelt.submodules.room import DEFAULT, rooms

Outcome = Literal["merged", "constant", "dropped", "kept"]


@dataclass(frozen=True)
class FoldedGate:
    """One gate of one layer: its values over the data, and the result of folding.

    Attributes:
        path: the path, from the model, of the module that computes the gate.
        name: the gate's name, as in `unipelt.record_gates`.
        mean, std, minimum, maximum: statistics over all examples (`std` is the population standard deviation). For a
            gate with one value per token: over all real tokens of all examples. Where layers are shared: over all
            passes through the layer.
        outcome: `merged` (its low-rank term is in the weight), `constant` (its adapter, prefix or prompt is scaled
            permanently), `dropped` (the gate is closed, and its submodule is removed) or `kept`.
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
    """The result of `unipelt.fold`; `str` of the report is a table.

    Attributes:
        gates: every gate of every layer.
        examples: number of examples over which the gates were recorded.
        tolerance, closed: the arguments of `fold`.
        merged: number of low-rank terms that are now in the weights, including those without a gate.
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
        """The number of gates by outcome: merged, constant, dropped, kept."""
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
    """Replace nearly constant gates of a trained model by constants, and fold the constants away, in place.

    A gate with a standard deviation of at most `tolerance` over the data becomes the constant c, its mean. Then

    - a low-rank term is merged: `W += c B A`, computed in float32 and rounded once to the weight's type. A term
      without a gate is merged too, with `c = alpha / r`;
    - a tuner of PEFT's is merged in the same way, `W += c (W' - W)`, if PEFT can merge it into a weight W' and no other
      term is at its outputs. LoRA beside a tuner of PEFT's is kept;
    - an adapter's `up` is multiplied by c. An adapter with a closed gate is removed, with its second pass through the
      norm;
    - a prefix under `scale` gating is multiplied by c. Under `mass` gating (all causal attention) `log c` becomes a
      constant that is added to the mask. A prefix with a separate softmax has its values multiplied by c. A prefix of
      the last two kinds is removed if its gate is closed;
    - a prompt is multiplied by c.

    Gates that vary are kept, and are still computed. A prefix under `scale` gating and a prompt are never dropped,
    because they take attention even with a closed gate (paper, footnote 3). A gate of DeBERTa-v2's query is kept,
    unless closed: its projection also serves relative positions, from which the gated term is left out. The
    reparameterisation networks are removed (the deployed form).

    The model stays a `PreTrainedModel`, in evaluation mode, without trainable parameters: a forward pass in training
    mode with gradients raises an error. `unipelt.save` and `unipelt.load` restore the same folded model, bit for bit;
    `unipelt.remove` restores the base, bit for bit.

    Args:
        model: an injected model, trained.
        batches: inputs of the model, as `model(**batch)` takes them, on any device; at least two examples.
            `attention_mask` (`decoder_attention_mask` for a decoder with an encoder) marks the real tokens. May be
            empty for a model without gates.
        tolerance: the largest standard deviation of a gate that counts as constant; a gate is between 0 and 1.
        closed: a constant gate with a mean below this value is closed.

    Returns:
        The statistics and the outcome of every gate, and parameter counts before and after.

    Raises:
        FoldError: the model is folded already; has nothing to fold; has a weight into which nothing can be merged
            (quantised, sharded, offloaded, shared with another module); has a gate that is not finite or was never
            computed; or an argument is not valid. The model is unchanged.
        ValueError: the model carries no submodules.
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
    if not gates and not any(
        isinstance(module, PrefixNetwork) or getattr(module, "folds_to", "") == "merged" for module in model.modules()
    ):
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
    """Return the constant of a gate, None if its submodule is dropped, or "kept"."""
    if std > tolerance or not gate.target.folds_to:
        return "kept"
    if (mean < closed or mean == 0) and not gate.target.takes_attention:
        return None
    if mean == 0 or getattr(gate.target, "once", False):
        return "kept"
    return min(mean, 1.0)  # rounding in float32 can give a mean slightly above 1


def _outcome(gate: GateTarget, constant: float | Literal["kept"] | None) -> Outcome:
    if constant == "kept":
        return "kept"
    if constant is None:
        return "dropped"
    return gate.target.folds_to
