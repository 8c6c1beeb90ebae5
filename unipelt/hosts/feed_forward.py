"""Find in a recorded pass where a layer's feed-forward network is added to the residual, and its projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unipelt.hosts.probe import Call, gradients, random_like
from unipelt.hosts.projections import FoundAttention, is_projection
from unipelt.hosts.rows import width_of


@dataclass
class Joined:
    """The place where one layer's feed-forward network is added to the residual, and the network's projections.

    Paths start from the layer, as in `Stack`. `gate` is the path of the projection whose activation scales the output
    of another projection. `width` is the width of the tensor that is added, and `sized` the path of a module with as
    many outputs. In a layer without a feed-forward network, the place is the output of the attention or of another
    module that mixes tokens (a state-space layer); `adapted` is then `attention` or `mixer`.
    """

    norm: str = ""
    output: str = ""
    up: str = ""
    down: str = ""
    gate: str = ""
    width: int = 0
    sized: str = ""
    adapted: Literal["feed_forward", "attention", "mixer"] = "feed_forward"


def find_joined(layer: Call, inside: Sequence[Call], attentions: Sequence[FoundAttention]) -> Joined | None:
    """Find the module whose output is added (pre-LN) or the norm that reads the sum (post-LN); None without either."""
    if layer.output is None or not attentions:
        return None
    times = Counter(id(call.module) for call in inside)
    once = [call for call in inside if call.output is not None and times[id(call.module)] == 1]
    calls = [call for call in once if not _of_attention(call, attentions)]
    always = [call for call in calls if not _is_one_of_several(call, layer)]
    found = Joined()
    added = find_added(layer.output, always)
    if added is not None:
        found.output = _below(added, layer)
    else:
        added = _find_norm(found, layer, always) or _find_middle(found, layer, inside, always)
    if added is None:
        return _behind_attention(inside, attentions)
    found.width = _shape(added)[-1]
    if mixer := find_mixer(layer, added, inside):
        return mixer
    _find_projections(found, layer, added, calls)
    paths = [path for path in (found.norm, found.output, found.down) if path]
    found.sized = next((path for path in paths if width_of(layer.module.get_submodule(path)) == found.width), "")
    return found


def find_mixer(layer: Call, added: Call, inside: Sequence[Call]) -> Joined | None:
    """Return the place behind a module with projections that mixes tokens (a state-space layer); None for any other."""
    own = [call for call in inside if added.contains(call) and is_projection(call.module)]
    if not own or not _mixes_tokens(added):
        return None
    width = _shape(added)[-1]
    sized = next((_below(call, layer) for call in own if width_of(call.module) == width), "")
    return Joined(output=_below(added, layer), width=width, sized=sized, adapted="mixer")


def _is_one_of_several(call: Call, layer: Call) -> bool:
    """Return whether a module is in a dictionary of modules, of which a pass calls only some (one a language)."""
    owner: nn.Module = layer.module
    if not call.path.startswith(f"{layer.path}."):  # a module that several layers share
        return False
    for name in _below(call, layer).split("."):
        if isinstance(owner, nn.ModuleDict):
            return True
        owner = owner.get_submodule(name)
    return False


def _find_norm(found: Joined, layer: Call, calls: Sequence[Call]) -> Call | None:
    """Find the norm that gives the layer's output and reads the sum, and set its path; return the module added."""
    assert layer.output is not None
    for norm in reversed(calls):
        if not _is_norm(norm) or not _is(norm.output, layer.output):
            continue
        added = find_added(next(iter(norm.inputs.values())), [call for call in calls if call.end < norm.start])
        if added is not None:
            found.norm = _below(norm, layer)
            return added
    return None


def _find_middle(found: Joined, layer: Call, inside: Sequence[Call], calls: Sequence[Call]) -> Call | None:
    """Find the module added in a sum that a norm in the middle of the layer reads, and set its path; return it."""
    assert layer.output is not None
    for norm in reversed(inside):
        total = next(iter(norm.inputs.values()), None)
        if total is None or not _is_norm(norm) or total.shape != layer.output.shape:
            continue
        added = find_added(total, [call for call in calls if call.end < norm.start and _shape(call) == total.shape])
        if added is not None:
            found.output = _below(added, layer)
            return added
    return None


def _mixes_tokens(added: Call) -> bool:
    """Return whether a module's output at one token depends on its input at other tokens (a state-space layer does)."""
    given = next(iter(added.inputs.values()), None)
    if given is None or given.dim() != 3 or _shape(added)[:2] != given.shape[:2]:
        return False
    direction = random_like(_out(added))
    direction[:, :-1] = 0
    gradient = gradients(_out(added), [given], direction)[0]
    return gradient is not None and bool(gradient[:, :-1].any())


def _behind_attention(inside: Sequence[Call], attentions: Sequence[FoundAttention]) -> Joined | None:
    """Return the end of the attention as the place, if the layer has no projection behind the attention."""
    own = next((found for found in attentions if not found.crosses), None)
    if own is None or not own.attention.output:
        return None
    behind = [call for call in inside if is_projection(call.module) and call.start > own.softmax.end]
    if len(behind) != 1 or behind[0].output is None:
        return None
    path = own.attention.output
    return Joined(output=path, width=_shape(behind[0])[-1], sized=path, adapted="attention")


def _below(call: Call, layer: Call) -> str:
    return call.path.removeprefix(f"{layer.path}.")


def _of_attention(call: Call, attentions: Sequence[FoundAttention]) -> bool:
    """Return whether a module is an attention, is inside or around one, or holds one of its projections."""
    for found in attentions:
        if call.module is found.call.module or found.call.contains(call) or call.contains(found.call):
            return True
        if any(id(module) in found.linears for module in call.module.modules()):
            return True
    return False


def find_added(total: Tensor, calls: Sequence[Call]) -> Call | None:
    """Return the outermost module whose output, up to a constant factor, is one summand of `total`; None without one.

    Of several such modules, the one with the most parameters is returned.
    """
    if not total.requires_grad:
        return None
    direction = random_like(total)
    flat = total.flatten(0, -2).shape  # some layers put all tokens of a batch in one dimension
    shapes = (total.shape, flat)
    fitting = [call for call in calls if call.alone and _shape(call) in shapes and call.output is not total]
    found = []
    for call, gradient in zip(fitting, gradients(total, [_out(call) for call in fitting], direction), strict=True):
        if gradient is None:
            continue
        gradient = gradient.reshape(total.shape)
        factor = (gradient * direction).sum() / (direction * direction).sum()
        if factor.abs() < 1e-6 or not torch.allclose(gradient, factor * direction, rtol=1e-3, atol=1e-5):
            continue
        rest = total - factor * _out(call).reshape(total.shape)
        if rest.abs().max() > 1e-3 * total.abs().max():
            found.append(call)
    plain = [call for call in found if not isinstance(call.module, (nn.Dropout, nn.Identity, nn.Sequential))]
    plain = [call for call in plain if not hasattr(call.module, "adapter")]
    outermost = [call for call in plain if not any(other.contains(call) for other in plain)]
    return max(outermost, key=lambda call: sum(p.numel() for p in call.module.parameters()), default=None)


def _is(given: Tensor | None, total: Tensor) -> bool:
    """Return whether a tensor equals another up to a constant factor."""
    if given is None or given.shape != total.shape or not given.requires_grad:
        return False
    factor = (given * total).sum() / (given * given).sum()
    return bool(factor.abs() > 1e-6) and torch.allclose(factor * given, total, rtol=1e-3, atol=1e-5)


def _is_norm(call: Call) -> bool:
    """Return whether a module reads one tensor and has parameters, but no matrices."""
    parameters = list(call.module.parameters())
    return bool(parameters) and all(parameter.dim() < 2 for parameter in parameters) and len(call.inputs) == 1


def _shape(call: Call) -> torch.Size:
    return _out(call).shape


def _out(call: Call) -> Tensor:
    assert call.output is not None
    return call.output


def _find_projections(found: Joined, layer: Call, added: Call, calls: Sequence[Call]) -> None:
    """Find the first projection, the last one and the gate, by the gradients of the added tensor; set their paths."""
    tokens = _shape(added)[:-1].numel()
    linears = [call for call in calls if is_projection(call.module) and _shape(call)[:-1].numel() == tokens]
    reach = gradients(_out(added), [_out(call) for call in linears])
    reaching = [call for call, gradient in zip(linears, reach, strict=True) if gradient is not None]
    reaching = [call for call in reaching if call is added or call.end <= added.end]
    last = [call for call in reaching if _shape(call)[-1] == _shape(added)[-1]]
    if not last:
        return
    down = last[-1]
    read = next(iter(down.inputs.values()))
    if not read.requires_grad:
        return
    others = [call for call in reaching if call.end < down.start]
    direction = random_like(read)
    firsts: list[tuple[Call, bool]] = []
    for call, gradient in zip(others, gradients(read, [_out(call) for call in others], direction), strict=True):
        if gradient is None or _out(call).shape[-1] not in (read.shape[-1], 2 * read.shape[-1]):
            continue
        linear = torch.isclose((gradient * _out(call)).sum(), (direction * read).sum(), rtol=1e-3, atol=1e-5)
        firsts.append((call, bool(linear)))
    found.down = _below(down, layer)
    if not firsts:
        return
    plain = [call for call, linear in firsts if linear]
    up = plain[0] if plain else firsts[0][0]
    found.up = _below(up, layer)
    gates = [call for call, _ in firsts if call is not up]
    if len(gates) == 1:
        found.gate = _below(gates[0], layer)
