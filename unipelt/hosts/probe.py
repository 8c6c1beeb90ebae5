"""A recorded forward pass of a small model: the calls of its modules with their inputs, and its attentions.

Gradients answer all questions about the recorded pass. The output of a module is added to a residual if and only if the
gradient of the sum along every direction, taken at that output, is the direction itself. An output of a projection
belongs to the queries if and only if the queries have a gradient there. A layer is causal if and only if its outputs at
earlier tokens have no gradient at its inputs at later tokens. One backward pass gives the answer for all modules.

Shapes: B examples, T tokens, S keys, D width, H heads, d head size.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from unipelt.hosts.inputs import TOKENS

INTERFACE = "unipelt_probe"


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        module, path: the module, and its path from the base model.
        inputs: the arguments that are tensors, by name.
        start, end: positions in the order of all entries and exits.
        output: the output; of a tuple or list, the first item.
        alone: whether the module returned one tensor and nothing else.
    """

    module: nn.Module
    path: str
    inputs: dict[str, Any]
    start: int
    output: Tensor | None = None
    alone: bool = False
    end: int = -1

    def contains(self, other: Call | Softmax) -> bool:
        """Return whether the other call or attention took place inside this call."""
        return self.start < other.start and other.end < self.end


@dataclass(eq=False)
class Softmax:
    """One attention in the pass.

    Attributes:
        owner: the innermost module that was running; for the attention interface, its first argument.
        scores: (..., T, S), the logits; None if queries and keys are known.
        query, key, value: (B, H, T or S, d), the arguments of the attention function; None if only logits are known.
        weighted: the result: the attention weights if only logits are known, else the attention's output.
        interface: whether Transformers' attention interface was called.
        start, end: positions in the order of all entries and exits.
    """

    owner: nn.Module
    scores: Tensor | None
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weighted: Tensor
    interface: bool
    start: int
    end: int


@dataclass
class Pass:
    """A recorded pass.

    Attributes:
        calls: the calls of modules inside layers, in the order of their entry.
        attentions: all attentions, in their order.
        running: the calls that have not ended, the innermost last.
        clock: the last position in the order of events.
    """

    calls: list[Call] = field(default_factory=list)
    attentions: list[Softmax] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    clock: int = 0

    def tick(self) -> int:
        """Return the next position in the order of events."""
        self.clock += 2  # the odd positions are free for attentions that are found afterwards
        return self.clock


_WATCHED: ContextVar[Pass | None] = ContextVar("watched", default=None)


def watch(model: PreTrainedModel, batch: Mapping[str, Any]) -> Pass:
    """Run a small model once and record the calls and attentions in its layers. The model does not change."""
    base = model.base_model
    found = Pass()
    handles: list[Any] = []
    token = _WATCHED.set(found)
    try:
        with _by_probe(base), torch.enable_grad(), _Functions(found):
            for path, module in base.named_modules():
                if _in_a_list(base, path):
                    handles.append(module.register_forward_pre_hook(_entering(found, path), with_kwargs=True))
                    handles.append(module.register_forward_hook(_leaving(found), with_kwargs=True))
            model(**batch)
    finally:
        _WATCHED.reset(token)
        for handle in handles:
            handle.remove()
    return found


def gradients(of: Tensor, at: Sequence[Tensor], direction: Tensor | None = None) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of a tensor's entries; None at tensors that the sum does not depend on.

    Args:
        of: the tensor whose entries are summed.
        at: the tensors at which gradients are taken.
        direction: the weights of the sum, with the shape of `of`; random numbers if None.
    """
    if not of.requires_grad:
        return [None] * len(at)
    wanted = [tensor for tensor in at if tensor.requires_grad]
    direction = random_like(of) if direction is None else direction
    given = torch.autograd.grad(of, wanted, direction, retain_graph=True, allow_unused=True) if wanted else ()
    by_id = {id(tensor): gradient for tensor, gradient in zip(wanted, given, strict=True)}
    return [by_id.get(id(tensor)) for tensor in at]


def is_causal(layer: Call) -> bool:
    """Return whether a layer's outputs at earlier tokens have no gradient at its inputs at later tokens."""
    given = next((value for value in layer.inputs.values() if value.is_floating_point() and value.dim() >= 3), None)
    if given is None or layer.output is None:
        return False
    middle = given.shape[1] // 2
    direction = random_like(layer.output)
    direction[:, middle:] = 0
    gradient = gradients(layer.output, [given], direction)[0]
    return gradient is not None and not bool(gradient[:, middle:].any())


def random_like(tensor: Tensor) -> Tensor:
    """Return random numbers with a tensor's shape and dtype; every call returns the same numbers."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)).to(tensor.dtype)


def _in_a_list(base: nn.Module, path: str) -> bool:
    """Return whether a module is an item of a `ModuleList`, or inside one."""
    names = path.split(".")
    owner = base
    for name in names:
        if not name:
            return False
        if isinstance(owner, nn.ModuleList):
            return True
        owner = owner._modules[name]  # type: ignore[assignment]
    return False


def _entering(found: Pass, path: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        named = dict(zip(names, args, strict=False)) | kwargs
        inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        call = Call(module, path, inputs, found.tick())
        found.calls.append(call)
        found.running.append(call)

    return enter


def _leaving(found: Pass) -> Callable[..., Any]:
    """Make a hook that records a module's output and returns a copy; in-place changes do not reach the record."""

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = found.running.pop()
        call.end = found.tick()
        if isinstance(output, Tensor) and output.is_floating_point():
            call.output, call.alone = output, True
            return output.clone()
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            call.output = output[0]
            return type(output)((output[0].clone(), *output[1:]))
        return None

    return leave


_SOFTMAXES = (torch.softmax, Tensor.softmax, nn.functional.softmax)


class _Functions(TorchFunctionMode):
    """A mode that records every softmax over keys, in any module."""

    def __init__(self, found: Pass) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not self.found.running:
            return out
        owner = self.found.running[-1].module
        if function in _SOFTMAXES:
            scores = args[0] if args else kwargs["input"]
            if scores.dim() >= 3 and scores.requires_grad and min(scores.shape[-2:]) >= TOKENS:
                start = self.found.tick()
                self.found.attentions.append(
                    Softmax(owner, scores, None, None, None, out, False, start, self.found.tick())
                )
        elif function is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) > 2 else (kwargs["query"], kwargs["key"], kwargs["value"])
            start = self.found.tick()
            self.found.attentions.append(Softmax(owner, None, query, key, value, out, False, start, self.found.tick()))
        return out


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Record the arguments of an attention, and compute the attention by the model's own eager function."""
    found = _WATCHED.get()
    assert found is not None
    start, before = found.tick(), len(found.attentions)
    output = _eager(module)(module, query, key, value, attention_mask, *args, **kwargs)
    del found.attentions[before:]  # the same attention, recorded by its softmax
    found.attentions.append(Softmax(module, None, query, key, value, output[0], True, start, found.tick()))
    return output


def _eager(module: Any) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        for name, function in vars(sys.modules[cls.__module__]).items():
            if name == "eager_attention_forward":
                return function
    return AttentionInterface()["sdpa"]


@contextmanager
def _by_probe(base: nn.Module) -> Iterator[None]:
    """Inside the block, give modules of layers a copy of their configuration, which names the recording function."""
    before: list[tuple[Any, PreTrainedConfig]] = []
    try:
        for path, module in base.named_modules():
            own = vars(module).get("config")
            if isinstance(own, PreTrainedConfig) and _in_a_list(base, path) and not isinstance(module, PreTrainedModel):
                before.append((module, own))
                changed = copy.copy(own)
                changed._attn_implementation_internal = INTERFACE
                module.config = changed
        yield
    finally:
        for module, own in before:
            module.config = own


AttentionInterface.register(INTERFACE, _attend)
