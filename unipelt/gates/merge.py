"""Constants in the place of gates: what they scale goes into weights, and what is no longer computed goes.

Shapes: W prefix width, L prefix length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unipelt.files.messages import show
from unipelt.gates.measure import FoldError, GatePlace, find_gates
from unipelt.injection.attention_hooks import Site, enter_attention, insert_prefix, leave_attention
from unipelt.injection.detach import drop_hooks, refuse_training
from unipelt.injection.parameters import kept_names, submodule_parameters, unfrozen_names
from unipelt.injection.state import Folded, Injection, injection_of
from unipelt.submodules.adapter import Adapter, adapt_norm, adapt_output
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LORA_ATTRIBUTES, LoRA, add_low_rank
from unipelt.submodules.prefix import NETWORKS, Prefix, PrefixNetwork, enter_stack, leave_stack
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.term import Term

Constants = Mapping[str, Mapping[str, float | None]]
"""Path of a `Gates` module -> name of one of its gates -> its constant, or None where its submodule is dropped."""

FOLDABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    check_gates(model)
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


def check_gates(model: nn.Module) -> None:
    """Raise `FoldError` for gates that no constant between 0 and 1 of one submodule can stand for."""
    gate = injection_of(model).config.gate
    has_gates = any(isinstance(module, Gates) for module in model.modules())
    if has_gates and (gate.shared or gate.activation != "sigmoid"):
        raise FoldError("shared gates, and gates that are not between 0 and 1, are not folded")


def takes_attention(target: Any) -> bool:
    """Whether it is a prefix or a prompt that takes attention even when its gate is closed."""
    return isinstance(target, Prompt) or (isinstance(target, Prefix) and target.gating == "scale")


def serves_positions(target: Any) -> bool:
    """Whether it is a low-rank term that its weight is sometimes used without, so that it cannot be merged."""
    return isinstance(target, LoRA) and target.skips_ungated_calls


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """What is folded is computed in its own precision, whatever the caller evaluates in."""
    with ExitStack() as stack:
        for kind in {"cpu", model.device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
            if constant is None and takes_attention(target):
                what = "a prompt" if isinstance(target, Prompt) else "a prefix under scale gating"
                raise FoldError(f"{name!r} at {path!r}: {what} takes attention and is not dropped")
            if constant is not None and not 0 < constant <= 1:
                raise FoldError(f"{name!r} at {path!r}: a gate is above 0 and at most 1, not {constant!r}")
            if constant is not None and serves_positions(target):
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
    terms = [term for name in LORA_ATTRIBUTES if isinstance(term := getattr(leaf, name, None), LoRA)]
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
    terms = [
        name for name in LORA_ATTRIBUTES if isinstance(term := getattr(host, name, None), LoRA) and term in settled
    ]
    for name in terms:
        delattr(host, name)
    if terms and not any(isinstance(getattr(host, name, None), LoRA) for name in LORA_ATTRIBUTES):
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
