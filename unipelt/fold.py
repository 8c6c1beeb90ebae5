"""After training: gates that turned out nearly constant become constants, and what they scale is folded away.

Shapes: W prefix width, L prefix length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.adapter import Adapter, adapt_norm, adapt_output
from unipelt.attention import Site, enter_attention, insert_prefix, leave_attention
from unipelt.detach import drop_hooks, refuse_training
from unipelt.gate import Gates
from unipelt.lora import NAMES, LoRA, add_low_rank
from unipelt.parameters import (
    Folded,
    Injection,
    ParameterCounts,
    injection_of,
    kept_names,
    parameter_counts,
    submodule_parameters,
    unfrozen_names,
)
from unipelt.plain import show
from unipelt.prefix import NETWORKS, Prefix, PrefixNetwork, enter_stack, leave_stack
from unipelt.prompt import Prompt
from unipelt.spread import FoldError, GatePlace, find_gates, measure_gates
from unipelt.term import Term

Outcome = Literal["merged", "constant", "dropped", "kept"]
Constants = Mapping[str, Mapping[str, float | None]]
"""Path of a `Gates` module -> name of one of its gates -> its constant, or None where its submodule is dropped."""

FOLDABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    injection = injection_of(model)
    _check_arguments(tolerance, closed)
    if injection.shares:
        raise FoldError(
            "this model shares its base with other tasks, and folding would merge its terms into their weights; save "
            "it, and fold what unipelt.from_pretrained gives"
        )
    if injection.folded is not None:
        raise FoldError("this model is folded already; to fold it otherwise, start from the model before folding")
    _check_gates(model)
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


def fold_constants(model: PreTrainedModel, constants: Constants) -> int:
    """Fold gates to given constants, in place: `fold` without the measuring, and what loading does again.

    Args:
        model: an injected model that is not folded.
        constants: of the gates that are to go; the others are kept.

    Returns:
        How many low-rank terms were merged into weights.

    Raises:
        FoldError: a gate is not there, a constant is not above 0 and at most 1, or as `fold`. The model is as it was.
    """
    injection = injection_of(model)
    _check_gates(model)
    gates = find_gates(model)
    settled = _settle(model, gates, constants)
    _check_weights(model, settled)
    with torch.no_grad(), _without_autocast(model):
        prefixes = _deployed_prefixes(model)
        merged, count = _merged_weights(model, settled)
        injection.folded = _remember(model, injection, constants, prefixes, merged)
        for name, weight in merged.items():
            model.get_parameter(name).copy_(weight)
        for path, both in prefixes.items():
            _deploy(model.get_submodule(path), both)
        _drop_networks(model)
        for attention, site in _sites(model):
            _shrink_gates(attention, site, [gate for gate in gates if gate.module is attention.gates], settled)
        for host in list(model.modules()):
            _fold_host(host, settled)
        _tidy_sites(model)
    injection.deployed = True
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    model.register_forward_pre_hook(refuse_training)
    model.eval()
    return count


def _check_arguments(tolerance: float, closed: float) -> None:
    for name, value, most in (("tolerance", tolerance, math.inf), ("closed", closed, 1.0)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < most:
            bound = "" if most == math.inf else " and below 1"
            raise FoldError(f"{name} must be a number, 0 or above{bound}, not {value!r}")


def _check_gates(model: nn.Module) -> None:
    """Raise `FoldError` for gates that no constant between 0 and 1 of one submodule can stand for."""
    gate = injection_of(model).config.gate
    has_gates = any(isinstance(module, Gates) for module in model.modules())
    if has_gates and (gate.shared or gate.activation != "sigmoid"):
        raise FoldError("shared gates, and gates that are not between 0 and 1, are not folded")


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """What is folded is computed in its own precision, whatever the caller evaluates in."""
    with ExitStack() as stack:
        for kind in {"cpu", model.device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _constant(
    gate: GatePlace, mean: float, std: float, tolerance: float, closed: float
) -> float | Literal["kept"] | None:
    """What a gate becomes: a constant, None (its submodule is dropped), or that it is kept."""
    if std > tolerance or isinstance(gate.target, Term):
        return "kept"
    if (mean < closed or mean == 0) and not _takes_attention(gate.target):
        return None
    if mean == 0 or _serves_positions(gate.target):
        return "kept"
    return min(mean, 1.0)  # a mean of token weights in float32 may be a rounding above 1


def _takes_attention(target: Any) -> bool:
    """Whether it is a prefix or a prompt that takes attention even when its gate is closed."""
    return isinstance(target, Prompt) or (isinstance(target, Prefix) and target.gating == "scale")


def _serves_positions(target: Any) -> bool:
    """Whether it is a low-rank term that its weight is sometimes used without, so that it cannot be merged."""
    return isinstance(target, LoRA) and target.skips_ungated_calls


def _outcome(gate: GatePlace, constant: float | Literal["kept"] | None) -> Outcome:
    if constant == "kept":
        return "kept"
    if constant is None:
        return "dropped"
    return "merged" if isinstance(gate.target, LoRA) else "constant"


def _settle(model: nn.Module, gates: list[GatePlace], constants: Constants) -> dict[nn.Module, float | None]:
    """The constant of every submodule that loses its gate, None if it is dropped; low-rank terms without one too."""
    known = {(gate.path, gate.name): gate.target for gate in gates}
    settled: dict[nn.Module, float | None] = {}
    for path, named in constants.items():
        for name, constant in named.items():
            if (path, name) not in known:
                raise FoldError(f"the model has no gate {show(name)} at {show(path)}")
            target = known[path, name]
            if isinstance(target, Term):
                raise FoldError(f"{name!r} at {path!r}: only adapters, prefixes, prompts and LoRA are folded")
            if constant is None and _takes_attention(target):
                what = "a prompt" if isinstance(target, Prompt) else "a prefix under scale gating"
                raise FoldError(f"{name!r} at {path!r}: {what} takes attention and is not dropped")
            if constant is not None and not 0 < constant <= 1:
                raise FoldError(f"{name!r} at {path!r}: a gate is above 0 and at most 1, not {constant!r}")
            if constant is not None and _serves_positions(target):
                raise FoldError(f"{name!r} at {path!r}: this term serves one of two uses of a weight: it is not merged")
            scale = target.gated_scale if isinstance(target, LoRA) else 1.0
            settled[target] = None if constant is None else constant * scale
    for module in model.modules():
        if isinstance(module, LoRA) and module.gates is None and module.low is None and module.gate is None:
            settled[module] = module.scale
    return settled


def _check_weights(model: nn.Module, settled: Mapping[nn.Module, float | None]) -> None:
    """Raise `FoldError` if nothing can be merged into a weight that a low-rank term is to be merged into."""
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for path, leaf in model.named_modules():
        if not _constant_terms(leaf, settled):
            continue
        weight: Any = leaf._parameters.get("weight")
        if weight is None:
            problem = "is no parameter of its own (a parametrization, perhaps)"
        elif weight.is_meta:
            problem = "is not in memory (offloaded)"
        elif type(weight) is not nn.Parameter or weight.dtype not in FOLDABLE:
            kind = type(weight).__name__ if type(weight) is not nn.Parameter else weight.dtype
            problem = f"is {kind} (quantised or sharded)"
        elif holders[id(weight)] > 1:
            problem = "is shared with another module"
        else:
            continue
        raise FoldError(f"nothing can be merged into {path}.weight: it {problem}; fold a model of plain weights")


def _constant_terms(leaf: nn.Module, settled: Mapping[nn.Module, float | None]) -> list[tuple[LoRA, float]]:
    """The low-rank terms of a projection that are to be merged, each with its constant."""
    terms = [term for name in NAMES if isinstance(term := getattr(leaf, name, None), LoRA)]
    return [(term, constant) for term in terms if (constant := settled.get(term)) is not None]


def _merged_weights(model: nn.Module, settled: Mapping[nn.Module, float | None]) -> tuple[dict[str, Tensor], int]:
    """`W + sum of c B A`, by the weight's name, on the CPU so that every machine rounds alike; and how many terms."""
    merged = {}
    count = 0
    for path, leaf in model.named_modules():
        constants = _constant_terms(leaf, settled)
        if not constants:
            continue
        old: Any = leaf.weight
        kind = torch.promote_types(old.dtype, torch.float32)
        weight = old.detach().to("cpu", kind, copy=True)
        for term, constant in constants:
            low, high = (side.detach().to("cpu", kind) for side in term.pair())
            update = constant * (high @ low)
            outputs = weight.t() if isinstance(leaf, Conv1D) else weight
            rows = outputs.unflatten(0, (term.rows.groups, -1)).narrow(1, term.rows.start, term.rows.size)
            rows += update.unflatten(0, (term.rows.groups, term.rows.size))
        merged[f"{path}.weight"] = weight.to(old.dtype)
        count += len(constants)
    return merged, count


def _deployed_prefixes(model: nn.Module) -> dict[str, Tensor]:
    """Keys and values (2, L, W) of every prefix that a network computes, by its path."""
    shared = {module: module() for module in model.modules() if isinstance(module, PrefixNetwork)}
    return {
        path: shared[network][module.index].clone(memory_format=torch.contiguous_format)
        for path, module in model.named_modules()
        for network in (module.network if isinstance(module, Prefix) else ())
    }


def _remember(
    model: PreTrainedModel,
    injection: Injection,
    constants: Constants,
    prefixes: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
) -> Folded:
    """What saving, loading and removing need of a model that is about to be folded."""
    networks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, PrefixNetwork))
    ours = {name for _, name, _ in submodule_parameters(model) if not name.startswith(networks)}
    trained = merged.keys() & set(kept_names(model))
    tensors = {name: weight for name, weight in model.named_parameters() if name in ours or name in trained}
    tensors |= {f"{path}.keys_values": nn.Parameter(both) for path, both in prefixes.items()}
    return Folded(
        constants={path: dict(named) for path, named in constants.items()},
        tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
        weights={name: model.get_parameter(name).detach().to("cpu", copy=True) for name in merged},
        unfrozen=frozenset(unfrozen_names(model)),
    )


def _deploy(prefix: Any, both: Tensor) -> None:
    prefix.keys_values = nn.Parameter(both)
    prefix.network = ()


def _drop_networks(model: nn.Module) -> None:
    for owner in list(model.modules()):
        for name in NETWORKS:
            if isinstance(getattr(owner, name, None), PrefixNetwork):
                delattr(owner, name)
                drop_hooks(owner, (enter_stack, leave_stack))


def _sites(model: nn.Module) -> list[tuple[Any, Site]]:
    return [(module, vars(module)["unipelt_site"]) for module in model.modules() if "unipelt_site" in vars(module)]


def _shrink_gates(
    attention: Any, site: Site, gates: list[GatePlace], settled: Mapping[nn.Module, float | None]
) -> None:
    """Keep the rows of an attention's gates whose submodules are not settled."""
    rows = [gate.row for gate in gates if gate.target not in settled]
    if len(rows) == len(gates):
        return
    site.targets = tuple(site.targets[row] for row in rows)
    if not rows:
        attention.gates = None
        return
    left: Gates = attention.gates
    left.names = tuple(left.names[row] for row in rows)
    left.bias = nn.Parameter(left.bias[rows])
    if left.has_input:
        left.weight = nn.Parameter(left.weight[rows])


def _fold_host(host: Any, settled: Mapping[nn.Module, float | None]) -> None:
    """Fold what one module of the host carries."""
    terms = [name for name in NAMES if isinstance(term := getattr(host, name, None), LoRA) and term in settled]
    for name in terms:
        delattr(host, name)
    if terms and not any(isinstance(getattr(host, name, None), LoRA) for name in NAMES):
        drop_hooks(host, (add_low_rank,))
    adapter = getattr(host, "adapter", None)
    if isinstance(adapter, Adapter) and adapter in settled:
        constant = settled[adapter]
        if constant is None:
            del host.adapter
            drop_hooks(host, (adapt_norm, adapt_output))
        else:
            adapter.up.weight.mul_(constant)
            adapter.up.bias.mul_(constant)
            adapter.gates = adapter.tokens = None
    prompt = getattr(host, "prompt", None)
    if isinstance(prompt, Prompt) and prompt in settled:
        constant = settled[prompt]
        assert constant is not None  # it takes attention, and is not dropped
        prompt.embedding.mul_(constant)
        prompt.gates = None
    prefix = getattr(host, "prefix", None)
    if isinstance(prefix, Prefix) and prefix in settled:
        constant = settled[prefix]
        if constant is None:
            _drop_prefix(host)
            return
        prefix.gate = None
        if prefix.gating == "scale":
            assert prefix.keys_values is not None
            prefix.keys_values.mul_(constant)
        elif prefix.gating == "added":
            assert prefix.keys_values is not None
            prefix.keys_values[1].mul_(constant)
        else:
            prefix.mass = math.log(constant)


def _drop_prefix(attention: Any) -> None:
    """Take a prefix out of an attention."""
    del attention.prefix
    site: Site = attention.unipelt_site
    if site.config is not None:
        attention.config = site.config
        site.config = None
    if site.inserts:
        site.inserts = ()
        drop_hooks(attention, (leave_attention,))
        for leaf in attention.modules():
            if vars(leaf).pop("unipelt_rows", None) is not None:
                drop_hooks(leaf, (insert_prefix,))


def _tidy_sites(model: nn.Module) -> None:
    """Let attentions do no more than what is left to do."""
    wanted = {id(module.tokens) for module in model.modules() if isinstance(module, (Adapter, LoRA, Term))}
    for attention, site in _sites(model):
        site.tokens = tuple(slot for slot in site.tokens if id(slot) in wanted)
        site.inside = tuple(slot for slot in site.inside if id(slot) in wanted)
        left = bool(attention.gates is not None or site.tokens or site.inside)
        site.masked = site.masked and left
        if left or site.inserts:
            continue
        drop_hooks(attention, (enter_attention,))
        if not hasattr(attention, "prefix"):
            del attention.unipelt_site, attention.gates
