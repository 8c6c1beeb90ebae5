"""A layer of PEFT's as a term: the layer's output, less the output of the host.

Shapes: B examples, T tokens, I inputs, O outputs that belong to the place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.submodules.entry import Part
from unipelt.submodules.outputs import OutputSlice, matrix_of, own_outputs, own_rows
from unipelt.submodules.term import Term, add_scaled

_RECOMPUTED = ("boft_P", "rows", "cols")
"""Names of buffers that the configuration alone determines, so that no checkpoint holds them."""


class HostProjection(nn.Module):
    """The base layer of a layer of PEFT's: a projection of the host, without parameters of its own.

    Asked for the input that the host has just computed, it returns the host's output. Asked for another input, it runs
    the host's own forward, without hooks.

    Attributes:
        in_features, out_features: I and O.
        rows: the outputs of the host that belong to the place.
        copies: whether the host's output is copied, because the layer adds to it in place.
    """

    def __init__(self, host: nn.Module, rows: OutputSlice, inputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, rows.count
        self.rows = rows
        self.copies = False
        self._host = (host,)  # a tuple, so that the host does not become a child

    @property
    def weight(self) -> Tensor:
        """The present weight of the projection, (O, I)."""
        host: Any = self._host[0]
        whole = isinstance(host, nn.Linear) and self.rows.count == host.out_features
        return host.weight if whole else matrix_of(host, self.rows)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the projection, (O,), or None."""
        bias: Any = self._host[0].bias
        return None if bias is None else own_rows(bias, self.rows)

    def forward(self, x: Tensor, *, given: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return the projection of x, (B, T, O): `out`, if x is `given`."""
        if out is not None and x is given:
            return out.clone() if self.copies else out
        host: Any = self._host[0]
        return own_outputs(host.forward(x), self.rows)


class PeftTerm(Term):
    """One layer of a tuner of PEFT's at one target: `y + g (layer(x) - y)`.

    The layer is PEFT's own, built around a stand-in for the host (`HostProjection`). Most tuners ask the stand-in for
    the host's output alone, so the host is computed once. A layer that changes the input, or computes with the weight,
    takes one more product. Without a gate the output is exactly that of PEFT's layer.

    If other terms come before this one at the same projection, the layer reads the host's own output, computed once
    more, and its term is added to the others.

    Attributes:
        layer: PEFT's layer.
        tuner: PEFT's name of the tuner.
        follows: whether other terms come before this one.
        is_alone: whether no other term is at the same outputs, so that the term may be merged into the weight.
    """

    def __init__(self, name: str, kind: str, layer: nn.Module, host: HostProjection, tuner: str) -> None:
        super().__init__(name, kind, host.rows)
        trained = {id(parameter) for parameter in layer.parameters() if parameter.requires_grad}
        layer._modules["base_layer"] = host
        self.layer: Any = layer
        self.tuner = tuner
        self.follows = False
        self.is_alone = True
        for hidden, module in list(vars(layer).items()):
            if isinstance(module, nn.Module):  # shared by all layers of the tuner, and no child of this layer
                self.add_module(f"shared_{hidden}", module)
        frozen = {path for path, parameter in self.named_parameters() if id(parameter) not in trained}
        for path in self.saved_buffers:  # a state dict holds what a checkpoint holds
            parent, _, last = path.rpartition(".")
            owner: Any = self.get_submodule(parent)
            owner._non_persistent_buffers_set.discard(last)
            if hasattr(owner, "persistent"):  # PEFT's BufferDict, whose buffers some layers set again in each pass
                owner.persistent = True
        self._parts = tuple(
            Part(f"{name}.{path}", kind, path, frozen=path in frozen) for path, _ in self.named_parameters()
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the layer's parameters. Layers may share a parameter."""
        return self._parts

    @property
    def saved_buffers(self) -> dict[str, Tensor]:
        """The buffers that a checkpoint holds: what PEFT drew at random, or computed from the weight of the host."""
        return {
            path: buffer
            for path, buffer in self.named_buffers()
            if path.rpartition(".")[2] not in _RECOMPUTED and not path.startswith("entry.")
        }

    @property
    def folds_to(self) -> str:  # type: ignore[override]
        """`merged` if PEFT can merge this layer and no other term is at its outputs; else empty."""
        return "merged" if self.is_alone and self.can_merge else ""

    @property
    def can_merge(self) -> bool:
        """Whether PEFT can merge this layer into a weight."""
        if "_can_merge" not in vars(self):
            base: Any = self.layer.base_layer
            shape, bias = base.weight.shape, None if base.bias is None else torch.zeros(base.out_features)
            try:
                self.update(torch.zeros(shape), bias)
                self._can_merge = True
            except MergeRefusal:
                self._can_merge = False
        return self._can_merge

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g (layer(x) - y)`, (B, T, O), for y (B, T, O)."""
        layer: Any = self._modules["layer"]
        own = layer.base_layer(x) if self.follows else y
        changed = layer(x, given=x, out=own).to(y.dtype)
        if gate is None and not self.follows:
            return changed
        return add_scaled(y, gate, changed - own)

    def writes_in_place(self, like: Tensor) -> bool:
        """Return whether the layer changes the host's output in place, found by one call with zeros of a dtype."""
        base, training = self.layer.base_layer, self.layer.training
        x, out = like.new_zeros(1, 1, base.in_features), like.new_zeros(1, 1, base.out_features)
        before = out._version
        with torch.no_grad():
            self.layer.eval()(x, given=x, out=out)
        self.layer.train(training)
        return out._version != before

    def update(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the changes of a weight, (O, I), and of a bias, (O,) or None, when PEFT merges the layer into both.

        Raises:
            MergeRefusal: PEFT cannot merge this layer.
        """
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer = copy.deepcopy(self.layer, {id(self.layer.base_layer): base}).to(weight.device).eval()
        try:
            with torch.no_grad():
                layer.merge()
        except Exception as error:  # PEFT's layers raise errors of every kind
            raise MergeRefusal(f"PEFT cannot merge its {self.tuner}: {error}") from error
        if not layer.merged:
            raise MergeRefusal(f"PEFT cannot merge its {self.tuner}")
        return base.weight.detach() - weight, None if bias is None else base.bias.detach() - bias

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return ", ".join(part for part in (self.tuner, super().extra_repr()) if part)


def stand_together(hosts: Iterable[Sequence[Term]]) -> None:
    """Tell the terms of each host, given in their order, about the terms of PEFT's beside them.

    A low-rank term that shares outputs with a term of PEFT's is not folded, because the layer of PEFT's reads the
    output of the host, which folding changes.
    """
    for terms in hosts:
        for index, term in enumerate(terms):
            beside = [other for other in terms if other is not term and other.outputs.overlaps(term.outputs)]
            if isinstance(term, PeftTerm):
                term.is_alone = not beside
                term.follows = any(other in beside for other in terms[:index])
            elif any(isinstance(other, PeftTerm) for other in beside):
                term.folds_to = ""


class MergeRefusal(ValueError):
    """PEFT cannot merge a layer into a weight."""
