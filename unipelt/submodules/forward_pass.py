"""The only module that knows threads and passes: values on their way from one module to another.

Shapes: L prefix length, W = heads * head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


class Slot:
    """One tensor on its way from the module that computes it to the one that uses it, within a pass of a layer.

    Attention is the one place that sees the layer's mask and input on every pass, the recomputation of gradient
    checkpointing included, so what depends on them is put here there and taken where it is used. Each thread has its
    own: a model may serve several at once, and the replicas of `nn.DataParallel` share this object. (A model of which
    a part alone is compiled serves one at a time.)
    """

    def __init__(self) -> None:
        self._values: dict[int, Tensor | None] = {}

    def put(self, value: Tensor | None) -> None:
        """Leave a value for `take` in the same thread."""
        self._values[_thread()] = value

    def take(self) -> Tensor | None:
        """The value that was put, once. Raises `KeyError` outside a pass of the layer."""
        thread = _thread()
        if thread not in self._values and self._values:
            # of attention and what uses its values, one is compiled and the other is not
            thread = next(iter(self._values))
        return self._values.pop(thread)

    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._values

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy is empty


def _thread() -> int:
    # torch.compile traces one thread and cannot ask which
    return 0 if torch.compiler.is_compiling() else get_ident()


def cached_on(tensor: Tensor, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` derives from a tensor (without gradients), made once for all layers that are given that tensor.

    It is kept with the tensor, and made again if the tensor was changed in place.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or tensor.is_inference():
        return make()  # a compiler sees the repetition itself; inference tensors can neither be followed nor train
    made: dict[Hashable, tuple[int, Tensor]] = vars(tensor).setdefault("unipelt", {})
    version = tensor._version
    if name not in made or made[name][0] != version:
        made[name] = (version, make())
    return made[name][1]


class Pass:
    """The prefixes of one pass of a stack, computed once at its entry instead of once in each layer.

    A layer finds them during the pass and, when gradient checkpointing computes it again, in the backward pass. A
    layer that is called without its stack finds none and computes its own; so does one that runs without gradients
    although the stack has them, and every later one of that pass: that is reentrant checkpointing, whose second
    computation needs inside the layer all that trains there. Each thread has its own.
    """

    def __init__(self) -> None:
        self._prefixes: dict[int, tuple[Tensor, ...]] = {}
        self._inside: set[int] = set()
        self._traced: tuple[Tensor, ...] | None = None  # torch.compile's, who should not see the tensors of others

    def enter(self, prefixes: tuple[Tensor, ...]) -> None:
        """Begin a pass with the prefixes of all attentions, each (2, L, W)."""
        if torch.compiler.is_compiling():
            self._traced = prefixes
            return
        self._prefixes[get_ident()] = prefixes
        self._inside.add(get_ident())

    def leave(self) -> None:
        """End it. What the backward pass may want stays until the next one begins."""
        if torch.compiler.is_compiling():
            self._traced = None
            return
        self._inside.discard(get_ident())
        if not torch.is_grad_enabled():
            self._prefixes.pop(get_ident(), None)

    def look(self) -> tuple[Tensor, ...] | None:
        """The prefixes of the pass, or None."""
        if torch.compiler.is_compiling():
            return self._traced
        thread = get_ident()
        if thread not in self._inside:
            if torch._C._current_graph_task_id() < 0:
                return None
            if thread not in self._prefixes and len(self._prefixes) == 1:  # on a GPU the backward pass has a thread
                thread = next(iter(self._prefixes))
        prefixes = self._prefixes.get(thread)
        if prefixes is not None and prefixes[0].requires_grad and not torch.is_grad_enabled():
            self._prefixes.pop(thread)
            return None
        return prefixes

    def __reduce__(self) -> tuple[type[Pass], tuple[()]]:
        return Pass, ()  # a copy is in no pass


class Shared(nn.Module):
    """Parameters that all modules of a submodule in a stack share; the owner of the stack's layers holds them.

    Those who share them refer to this module, and a replica of theirs (`nn.DataParallel`) still does. So the replica of
    the owner says, at each of its passes, whose parameters are to be read in its thread (`enter_shared`).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._replicas: dict[int, Any] = {}

    def here(self) -> Any:
        """Where to read the parameters, as attributes: this module, or its replica in a pass of that."""
        if torch.compiler.is_compiling():
            return self
        return self._replicas.get(get_ident(), self)

    def enter(self) -> None:
        """Begin a pass of this module's owner in this thread."""
        if not torch.compiler.is_compiling():
            self._replicas[get_ident()] = self

    def leave(self) -> None:
        """End it."""
        if not torch.compiler.is_compiling():
            self._replicas.pop(get_ident(), None)

    def has_parameters(self) -> bool:
        """Whether there is anything in it."""
        return bool(self._parameters)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self.name


def enter_shared(owner: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a stack's owner."""
    for module in _shared(owner):
        module.enter()


def leave_shared(owner: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a stack's owner, called after a failure too."""
    for module in _shared(owner):
        module.leave()


def _shared(owner: Any) -> list[Shared]:
    return [module for module in owner._modules.values() if isinstance(module, Shared)]
