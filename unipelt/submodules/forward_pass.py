"""Values of one forward pass on their way from one module to another; the only file that knows threads.

A stack of layers is passed through by one thread at a time or by several. Each thread has a `ForwardPass` of its own,
which lives as long as the call of the stack (or of a layer that is called alone). Hooks fill it and read it by name.

Shapes: B examples, T tokens, G gates, r rank, L prefix length, W = heads * head size.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

UNSEEN: Any = object()
"""The mask of an attention whose call was not seen."""


@dataclass(frozen=True)
class SetRows:
    """Which rows of a batch belong to which named set: `counts[i]` rows of set `names[i]`, one set after the other.

    The name None stands for the base without a set.
    """

    names: tuple[str | None, ...]
    counts: tuple[int, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split by set a tensor (B, ...) or, where a layer has put the tokens of all texts in one row, (B T, ...).

        Raises `RuntimeError` for a number of rows that cannot be assigned.
        """
        times, rest = divmod(len(tensor), sum(self.counts))
        if rest or not times:
            raise RuntimeError(
                f"a layer of the base was given {len(tensor)} rows in a batch of {sum(self.counts)}, so they cannot be "
                "told apart by task; run one task at a time"
            )
        return tensor.split([count * times for count in self.counts])


class PassFacts:
    """Facts that hold in every layer of a pass.

    Attributes:
        rows: the sets of the rows; None where the whole batch belongs to the active set.
        prefixes: by the key of a prefix network, keys and values of all its attentions' prefixes, (N, 2, L, W),
            computed once a pass.
        hooks: the hooks for saved tensors that the pass began with.
    """

    __slots__ = ("_by_head", "_derived", "hooks", "prefixes", "rows")

    def __init__(self, rows: SetRows | None = None) -> None:
        self.rows = rows
        self.prefixes: dict[int, Tensor] = {}
        self.hooks = saved_tensor_hooks()
        self._derived: dict[Hashable, tuple[Any, Any]] = {}
        self._by_head: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def once(self, source: Any, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return `make()`, computed once in this pass for a source object (a mask) and a name."""
        if torch.compiler.is_compiling() or getattr(source, "requires_grad", False):
            return make()  # a compiler finds repetitions itself; a checkpointed layer needs its own part of a graph
        key = (id(source), name)
        if key not in self._derived:
            self._derived[key] = (source, make())  # holding the source keeps its identity from being reused
        return self._derived[key][1]

    def prefix(self, key: int, index: int, heads: int) -> Tensor | None:
        """Return keys and values of one attention's prefix, (2, H, L, d), or None where it must compute them itself.

        Gradient checkpointing computes a layer a second time, outside of this pass, and wants the same operations in
        both. It shows by hooks for saved tensors, or by a first computation without gradients.
        """
        found = self.prefixes.get(key)
        if found is None or (found.requires_grad and not torch.is_grad_enabled()):
            return None
        if saved_tensor_hooks() is not self.hooks:
            return None
        if (key, heads) not in self._by_head:
            self._by_head[key, heads] = split_heads(found, heads).unbind()
        return self._by_head[key, heads][index]


def split_heads(both: Tensor, heads: int) -> Tensor:
    """Return keys and values (..., L, W) by heads: (..., H, L, d)."""
    return both.unflatten(-1, (heads, -1)).transpose(-3, -2)


def saved_tensor_hooks() -> Any:
    """Return what stands for the present hooks for saved tensors; None without such hooks."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


@dataclass
class AttentionPass:
    """One pass of one attention and what follows it in its layer.

    Attributes:
        mask: the mask that the attention was given; `UNSEEN` before.
        weights: (B, T) token weights of the masked mean; None where every token counts alike.
        gates: values of the gates that read the attention's input, each (B, 1, 1) or (B, T, 1), by name.
        low: `g A x` of the low-rank terms that read the attention's input, (B, T, r), by name.
        inputs: inputs of other projections, by the name of the term that reads them.
        served: names of gated terms whose projection has been called for the text in this pass.
        begun_by: path of the projection that opened the entry.
        lengthened: how many rows of a prefix the attention's text begins with (MPNet).
        inserted: keys and values (B, L, W) for those rows, by name.
    """

    mask: Any = UNSEEN
    weights: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    opened: bool = False
    begun_by: str = ""
    lengthened: int = 0
    inserted: dict[str, Tensor] = field(default_factory=dict)

    def weights_for(self, in_attention: bool, x: Tensor) -> Tensor | None:
        """Return the token weights of x, (B, T), where x may be the lengthened text of the attention.

        Raises `RuntimeError` if the attention's mask was not seen.
        """
        if self.mask is UNSEEN:
            raise RuntimeError("a gate averages over real tokens, and the layer's attention was not called before it")
        if not (in_attention and self.lengthened):
            return self.weights
        weights = self.weights
        if weights is None:
            tokens = x.shape[1] - self.lengthened
            weights = torch.full((len(x), tokens), 1 / tokens, device=x.device)
        return torch.nn.functional.pad(weights, (self.lengthened, 0))

    def note_gates(self, names: tuple[str, ...], values: Tensor) -> None:
        """Keep the values of gates, (B, 1 or T, G), by name."""
        self.gates.update(zip(names, (values,) if len(names) == 1 else values.split(1, dim=-1), strict=False))

    def gate_for(self, name: str, in_attention: bool) -> Tensor:
        """Return the value of a gate, for the lengthened text inside the attention if asked.

        Raises `RuntimeError` outside a pass of its layer.
        """
        gate = self.gates.get(name)
        if gate is None:
            raise RuntimeError(f"the gate {name!r} was not computed; a gated submodule was called outside its layer")
        if in_attention and self.lengthened and gate.shape[1] > 1:
            return torch.nn.functional.pad(gate, (0, 0, self.lengthened, 0))
        return gate


class ForwardPass:
    """One pass of a stack, or of a layer that is called alone, in one thread.

    Attributes:
        facts: what holds in every layer.
        attentions: the passes of attentions in the layer that is computed now, by the key of their set.
        by_layer: whether a layer began this pass.
        tokens: how many tokens a text has together with the prompt before it; 0 without a prompt.
    """

    __slots__ = ("__weakref__", "attentions", "by_layer", "facts", "tokens")

    def __init__(self, facts: PassFacts, by_layer: bool = False) -> None:
        self.facts = facts
        self.by_layer = by_layer
        self.tokens = 0
        self.attentions: dict[int, AttentionPass] = {}

    def attention(self, key: int) -> AttentionPass:
        """Return the pass of an attention in the present layer."""
        found = self.attentions.get(key)
        if found is None:
            found = self.attentions[key] = AttentionPass()
        return found


class _HeldArguments(tuple[Any, ...]):
    """Positional arguments of a call that keep a pass alive.

    PyTorch holds the arguments of a module's call until the call ends, by whichever exception. A hook cannot see
    a `KeyboardInterrupt`, but what only the arguments hold is gone with them.
    """

    held: tuple[ForwardPass, tuple[Any, ...]]  # the pass, and the arguments before: they may hold one more


def replace_arguments(args: tuple[Any, ...], changed: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return other positional arguments for a call, which keep the same pass alive."""
    if not isinstance(args, _HeldArguments):
        return changed
    held = _HeldArguments(changed)
    held.held = args.held
    return held


class Passes:
    """The passes of one stack: the present one of each thread.

    A copy of a model is in no pass. A model of which a part alone is compiled serves one thread at a time.
    """

    def __init__(self) -> None:
        self._by_thread: weakref.WeakValueDictionary[int, ForwardPass] = weakref.WeakValueDictionary()
        self._recomputed: weakref.WeakValueDictionary[tuple[int, int], ForwardPass] = weakref.WeakValueDictionary()
        self._rows: dict[int, SetRows] = {}
        self._traced: ForwardPass | None = None  # torch.compile traces one thread, and cannot ask which
        self._latest: weakref.ref[ForwardPass] | None = None

    def current(self) -> ForwardPass | None:
        """Return the pass that this thread is in, or None."""
        if torch.compiler.is_compiling():
            if self._traced is not None or self._latest is None:
                return self._traced
            return self._latest()  # a part of a layer is compiled by itself, in a pass that is not
        found = self._by_thread.get(get_ident())
        if found is None and self._recomputed:
            return self._recomputed.get((get_ident(), torch._C._current_graph_task_id()))
        return found

    def current_or_recomputed(self) -> ForwardPass | None:
        """Return the pass that this thread is in; in a backward pass outside of any, begin one.

        There gradient checkpointing computes a layer again, and calls no hook of the layer. The pass serves the layers
        one after the other, until the backward pass ends.
        """
        found = self.current()
        task = -1 if found is not None or torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        if task < 0:
            return found
        again = ForwardPass(PassFacts())
        place = (get_ident(), task)
        self._recomputed[place] = again

        def end(held: ForwardPass = again) -> None:  # holds the pass; a backward pass that fails drops its callbacks
            self._recomputed.pop(place, None)

        torch.autograd.Variable._execution_engine.queue_callback(end)
        return again

    def enter(self, facts: PassFacts, args: tuple[Any, ...], by_layer: bool = False) -> tuple[Any, ...]:
        """Begin a pass; returns the arguments with which the call goes on."""
        begun = ForwardPass(facts, by_layer)
        if torch.compiler.is_compiling():
            self._traced = begun
            return args
        held = _HeldArguments(args)
        held.held = (begun, args)
        self._by_thread[get_ident()] = begun
        self._latest = weakref.ref(begun)
        return held

    def leave(self) -> None:
        """End the pass."""
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self._by_thread.pop(get_ident(), None)
            self._latest = None

    def given_rows(self) -> SetRows | None:
        """Return the sets that this thread's rows belong to, where `rows` said so."""
        return None if torch.compiler.is_compiling() else self._rows.get(get_ident())

    @contextmanager
    def rows(self, rows: SetRows) -> Iterator[None]:
        """Inside the block, this thread's passes have these rows."""
        before = self._rows.get(get_ident())
        self._rows[get_ident()] = rows
        try:
            yield
        finally:
            del self._rows[get_ident()]
            if before is not None:
                self._rows[get_ident()] = before

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


_keys = itertools.count()


def new_key() -> int:
    """Return a number that names a module within a pass; no other module has it, copies apart."""
    return next(_keys)
