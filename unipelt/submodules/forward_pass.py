"""The values that modules exchange in one forward pass. All code for threads is in this file.

Several threads may call one stack of layers at the same time. Each thread has its own `ForwardPass`, which exists as
long as the call of the stack (or of a layer that is called alone). Hooks write its values and read them by name.

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
"""The mask of an attention that has not been called yet."""


@dataclass(frozen=True)
class SetRows:
    """The named sets of a batch's rows: `counts[i]` rows of set `names[i]`, one set after the other.

    The name None stands for the base model without a set.
    """

    names: tuple[str | None, ...]
    counts: tuple[int, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split a tensor by set.

        Args:
            tensor: (B, ...), or (B T, ...) if a layer has put the tokens of all texts in one dimension.

        Raises:
            RuntimeError: the number of rows is not a positive multiple of B.
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
        rows: the sets of the rows; None if the whole batch belongs to the active set.
        cached: the number of tokens in the cache at the start of the pass; None for a static cache, whose number would
            have to be read from the device. Only counted for terms that edit chosen tokens.
        paged: whether the cache is that of continuous batching.
        prefixes: keys and values of the prefixes of all N attentions of a prefix network, (N, 2, L, W), by the key of
            the network. They are computed once per pass.
        hooks: the hooks for saved tensors at the start of the pass.
        losses: the losses of routers, if the model's call collects them; else None.
    """

    __slots__ = ("_by_head", "_derived", "cached", "hooks", "losses", "paged", "prefixes", "rows")

    def __init__(self, rows: SetRows | None = None, losses: list[Tensor] | None = None) -> None:
        self.rows = rows
        self.losses = losses
        self.cached: int | None = 0
        self.paged = False
        self.prefixes: dict[int, Tensor] = {}
        self.hooks = saved_tensor_hooks()
        self._derived: dict[Hashable, tuple[Any, Any]] = {}
        self._by_head: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def once(self, source: Any, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return `make()`, computed once in this pass for each pair of a source object (a mask) and a name."""
        if torch.compiler.is_compiling() or getattr(source, "requires_grad", False):
            return make()  # a compiler removes repetitions itself; a checkpointed layer needs its own part of the graph
        key = (id(source), name)
        if key not in self._derived:
            self._derived[key] = (source, make())  # the reference to the source prevents reuse of its id
        return self._derived[key][1]

    def prefix(self, key: int, index: int, heads: int) -> Tensor | None:
        """Return keys and values of one attention's prefix, or None if the attention must compute them itself.

        Gradient checkpointing computes a layer a second time, outside of this pass, with the same operations. So the
        attention computes its own prefix under gradient checkpointing. The signs of gradient checkpointing are hooks
        for saved tensors, or a first computation without gradients.

        Args:
            key: the key of the prefix network.
            index: the attention's index among the attentions of that network.
            heads: H.

        Returns:
            (2, H, L, d), the keys and then the values; or None.
        """
        found = self.prefixes.get(key)
        if found is None or (found.requires_grad and not torch.is_grad_enabled()):
            return None
        if saved_tensor_hooks() is not self.hooks:
            return None
        if (key, heads) not in self._by_head:
            by_head = split_heads(found, heads, rows_first=True)
            if found.requires_grad:
                # each prefix lies in one block of memory, so `Prefix.scaled` needs no copy of its own
                by_head = by_head.contiguous()
            self._by_head[key, heads] = by_head.unbind()
        return self._by_head[key, heads][index]


def split_heads(both: Tensor, heads: int, rows_first: bool = False) -> Tensor:
    """Split keys and values (..., L, W) into heads: (..., H, L, d).

    Args:
        both: keys and values.
        heads: H.
        rows_first: whether the L rows come first in memory, as a prefix network computes them. Then the backward pass
            copies the gradient once instead of twice.
    """
    if rows_first:
        return both.movedim(-2, 0).unflatten(-1, (heads, -1)).movedim(0, -2)
    return both.unflatten(-1, (heads, -1)).transpose(-3, -2)


def saved_tensor_hooks() -> Any:
    """Return the first of the current hooks for saved tensors, which identifies them; None without hooks."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


@dataclass
class AttentionPass:
    """One pass of one attention and of the rest of its layer.

    Attributes:
        mask: the attention's mask; `UNSEEN` before the attention's call.
        weights: (B, T) token weights of the masked mean; None if every token has the same weight.
        cached: the number of tokens in the cache before the pass; None for a static cache.
        gates: values of the gates that read the attention's input, each (B, 1, 1) or (B, T, 1), by name.
        low: `g A x` of the low-rank terms that read the attention's input, (B, T, r), by name.
        inputs: inputs of other projections, by the name of the term that reads them.
        served: names of the gated terms that have already been added to the text's projection in this pass.
        opened: whether the attention's entry has been computed.
        begun_by: path of the projection at which the entry was computed.
        lengthened: the number of prefix rows at the start of the attention's text (MPNet).
        inserted: keys and values (B, L, W) for the prefix rows, by the path of their projection.
        batch: B, for a set that needs the number of examples; else 0.
        kept: 1 for a submodule that is kept and 0 for one that dropout leaves out, (B or 1, 1, 1), by its name.
        losses: the losses of routers in the whole pass, if the model's call collects them; else None.
    """

    mask: Any = UNSEEN
    weights: Tensor | None = None
    cached: int | None = 0
    gates: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    opened: bool = False
    begun_by: str = ""
    lengthened: int = 0
    inserted: dict[str, Tensor] = field(default_factory=dict)
    batch: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] | None = None

    def weights_for(self, in_attention: bool, x: Tensor) -> Tensor | None:
        """Return the token weights of x, (B, T), or None if every token has the same weight.

        Args:
            in_attention: whether x is inside the attention, where the text may begin with prefix rows. These rows have
                the weight 0.
            x: (B, T, I).

        Raises:
            RuntimeError: the attention was not called before.
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
        """Store the values of gates, (B, 1 or T, G), by name."""
        self.gates.update(zip(names, (values,) if len(names) == 1 else values.split(1, dim=-1), strict=False))

    def gate_for(self, name: str, in_attention: bool) -> Tensor:
        """Return the value of a gate, (B, 1 or T, 1).

        Args:
            name: the gate's name.
            in_attention: whether the value is for the attention's text, which may begin with prefix rows.

        Raises:
            RuntimeError: the gate was not computed, because its layer was not called.
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
        facts: the facts that hold in every layer.
        attentions: the passes of the attentions in the present layer, by the key of their set.
        by_layer: whether a layer began this pass.
        tokens: the number of tokens of a text with its prompt; 0 without a prompt.
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
            found = self.attentions[key] = AttentionPass(losses=self.facts.losses)
        return found


class _HeldArguments(tuple[Any, ...]):
    """Positional arguments of a call that keep a pass alive.

    PyTorch keeps the arguments of a module's call until the call ends, also if it ends with an exception. A hook does
    not notice a `KeyboardInterrupt`. But an object that only the arguments refer to is deleted with the arguments.
    """

    held: tuple[ForwardPass, tuple[Any, ...]]  # the pass and the earlier arguments, which may hold a pass too


def replace_arguments(args: tuple[Any, ...], changed: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `changed` as the positional arguments of a call, with the pass that `args` keeps alive."""
    if not isinstance(args, _HeldArguments):
        return changed
    held = _HeldArguments(changed)
    held.held = args.held
    return held


class Passes:
    """The passes of one stack, at most one present pass for each thread.

    A copy of a model has no present pass. If only a part of a model is compiled, the model serves one thread at a time.
    """

    def __init__(self) -> None:
        self._by_thread: weakref.WeakValueDictionary[int, ForwardPass] = weakref.WeakValueDictionary()
        self._recomputed: weakref.WeakValueDictionary[tuple[int, int], ForwardPass] = weakref.WeakValueDictionary()
        self._rows: dict[int, SetRows] = {}
        self._losses: dict[int, list[Tensor]] = {}
        self._traced_rows: SetRows | None = None
        self._traced: ForwardPass | None = None  # torch.compile traces one thread, and cannot read its id
        self._latest: weakref.ref[ForwardPass] | None = None

    def current(self) -> ForwardPass | None:
        """Return the present pass of this thread, or None."""
        if torch.compiler.is_compiling():
            if self._traced is not None or self._latest is None:
                return self._traced
            return self._latest()  # only a part of the layer is compiled: the pass began outside it
        found = self._by_thread.get(get_ident())
        if found is None and self._recomputed:
            return self._recomputed.get((get_ident(), torch._C._current_graph_task_id()))
        return found

    def current_or_recomputed(self) -> ForwardPass | None:
        """Return the present pass of this thread. In a backward pass without a present pass, begin a pass.

        In a backward pass, gradient checkpointing computes a layer again and calls no hook of the layer. The new pass
        serves the layers one after the other, until the backward pass ends.
        """
        found = self.current()
        task = -1 if found is not None or torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        if task < 0:
            return found
        again = ForwardPass(PassFacts())
        place = (get_ident(), task)
        self._recomputed[place] = again

        def end(held: ForwardPass = again) -> None:  # the default keeps the pass; a failed backward pass drops it
            self._recomputed.pop(place, None)

        torch.autograd.Variable._execution_engine.queue_callback(end)
        return again

    def enter(self, facts: PassFacts, args: tuple[Any, ...], by_layer: bool = False) -> tuple[Any, ...]:
        """Begin a pass. Return the positional arguments with which the call must continue."""
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

    def collect_losses(self) -> None:
        """Begin to collect the losses of routers in this thread's next passes."""
        self._losses[get_ident()] = []

    def losses(self) -> list[Tensor] | None:
        """Return the list that collects the losses of routers in this thread; None if they are not collected."""
        return self._losses.get(get_ident()) if self._losses else None

    def take_losses(self) -> list[Tensor]:
        """End the collection of losses in this thread, and return them."""
        return self._losses.pop(get_ident(), [])

    def given_rows(self) -> SetRows | None:
        """Return the sets of this thread's rows inside a block of `rows`; else None."""
        return self._traced_rows if torch.compiler.is_compiling() else self._rows.get(get_ident())

    @contextmanager
    def rows(self, rows: SetRows) -> Iterator[None]:
        """Give this thread's passes these rows inside the block."""
        traced, self._traced_rows = self._traced_rows, rows
        compiling = torch.compiler.is_compiling()
        before = None if compiling else self._rows.get(get_ident())
        if not compiling:
            self._rows[get_ident()] = rows
        try:
            yield
        finally:
            self._traced_rows = traced
            if not compiling:
                del self._rows[get_ident()]
            if before is not None:
                self._rows[get_ident()] = before

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


_keys = itertools.count()


def new_key() -> int:
    """Return a number that identifies a module within a pass. Only copies of the module have the same number."""
    return next(_keys)
