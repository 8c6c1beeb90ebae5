"""One forward pass of a small model, watched: which module was called with what, and where attention took place.

What is asked of the pass afterwards is asked by gradients. The output of a module is what is added to a residual
exactly if the gradient of every projection of the sum is that projection; a row of a projection belongs to the queries
exactly if the queries have a gradient there; a layer is causal exactly if earlier outputs have no gradient at later
inputs. One backward pass answers for all modules at once.

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

from unipelt.hosts.shrink import FIRST_WORD, VOCABULARY

TOKENS, SOURCE_TOKENS = 9, 11
"""Length of the text, and of an encoder's text where a decoder reads the other."""
INTERFACE = "unipelt_probe"
_END = 2


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        module, path: the module, and its name in the base model.
        inputs: its arguments that are tensors, by name.
        output: what it gave; where that is a tuple, the first of it.
        alone: whether it gave a tensor and nothing else.
        start, end: places in the order of all entries and exits.
    """

    module: nn.Module
    path: str
    inputs: dict[str, Any]
    start: int
    output: Tensor | None = None
    alone: bool = False
    end: int = -1

    def contains(self, other: Call | Softmax) -> bool:
        """Whether the other took place inside this call."""
        return self.start < other.start and other.end < self.end


@dataclass(eq=False)
class Softmax:
    """One attention that took place.

    Attributes:
        owner: the innermost module that was running; where the attention interface was called, its first argument.
        scores: (..., T, S), the logits; None where queries and keys are known.
        query, key, value: (B, H, T or S, d), where the attention interface was given them.
        weighted: what came out: the weights, or the attention's output.
        interface: whether Transformers' attention interface was called.
        start, end: place in the order of all entries and exits.
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
    """A watched pass: calls of the modules inside layers, in the order of their entry, and every attention."""

    calls: list[Call] = field(default_factory=list)
    attentions: list[Softmax] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    clock: int = 0

    def tick(self) -> int:
        """The next place in the order of events."""
        self.clock += 1
        return self.clock


_WATCHED: ContextVar[Pass | None] = ContextVar("watched", default=None)


def watch(model: PreTrainedModel, batch: Mapping[str, Any]) -> Pass:
    """Run a small model once and record what happens in its layers. The model is as before afterwards."""
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


def text_batch(model: PreTrainedModel, *, crossing: bool = False, two: bool = True) -> dict[str, Any]:
    """Random texts, one of them padded, as a small model takes them; the same each time.

    Args:
        model: a small model.
        crossing: whether a model that is no encoder-decoder is given the states of an encoder.
        two: whether the decoder of an encoder-decoder is given a text of its own.
    """
    generator = torch.Generator().manual_seed(1)
    signature = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    try:
        words = getattr(model.get_input_embeddings(), "num_embeddings", None) or VOCABULARY
    except NotImplementedError:  # some models hash their characters
        words = VOCABULARY

    def text(tokens: int) -> Tensor:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (2, tokens), generator=generator) % words
        ids[:, -1] = _END
        return ids

    two = two and bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in signature
    ids = text(SOURCE_TOKENS if two else TOKENS)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0  # on the right: the first tokens of a causal model would see nothing else, and so everything
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if two:
        batch["decoder_input_ids"] = text(TOKENS)
    if crossing:
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        name = "encoder_hidden_states" if "encoder_hidden_states" in signature else "encoder_outputs"
        batch[name] = torch.randn(2, SOURCE_TOKENS, width, generator=generator, requires_grad=True)
    return {name: value for name, value in batch.items() if name in signature or "kwargs" in signature}


def gradients(of: Tensor, at: Sequence[Tensor], direction: Tensor | None = None) -> list[Tensor | None]:
    """Gradients of a random sum of a tensor's entries, or of one along `direction`."""
    if not of.requires_grad:
        return [None] * len(at)
    wanted = [tensor for tensor in at if tensor.requires_grad]
    direction = random_like(of) if direction is None else direction
    given = torch.autograd.grad(of, wanted, direction, retain_graph=True, allow_unused=True) if wanted else ()
    by_id = {id(tensor): gradient for tensor, gradient in zip(wanted, given, strict=True)}
    return [by_id.get(id(tensor)) for tensor in at]


def random_like(tensor: Tensor) -> Tensor:
    """The same random numbers each time, with the tensor's shape."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)).to(tensor.dtype)


def _in_a_list(base: nn.Module, path: str) -> bool:
    """Whether a module is an item of a `ModuleList`, or inside one."""
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
    """What comes out is remembered, and a copy of it is handed on: later changes in place do not reach it."""

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
    """Sees every softmax over keys, wherever it is computed."""

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
    """Attention function of Transformers' interface: record what was given, then attend as the model does eagerly."""
    found = _WATCHED.get()
    assert found is not None
    start, before = found.tick(), len(found.attentions)
    output = _eager(module)(module, query, key, value, attention_mask, *args, **kwargs)
    del found.attentions[before:]  # the softmax inside
    found.attentions.append(Softmax(module, None, query, key, value, output[0], True, start, found.tick()))
    return output


def _eager(module: Any) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        for name, function in vars(sys.modules[cls.__module__]).items():
            if name == "eager_attention_forward" and callable(function):
                return function
    return AttentionInterface()["sdpa"]


@contextmanager
def _by_probe(base: nn.Module) -> Iterator[None]:
    """Modules of layers that have a configuration read the name of their attention function from a copy of it."""
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
