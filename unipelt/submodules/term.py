"""Terms: submodules that add `g f(x, y)` to what a part of a layer gives.

Shapes: B examples, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from unipelt.submodules.entry import Entry, Part
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.outputs import OutputSlice


class Term(nn.Module):
    """A submodule at one target: `y + g f(x, y)`, with g = 1 for a submodule without a gate.

    A gate has one of three sources: an entry of the term's own, which reads x; the entry of the layer's attention,
    which computes it for all (`gate_name`); or none.

    Attributes:
        name: the key of the term in its set, such as `lora_query`.
        kind: the submodule's name in a configuration, such as `lora`.
        outputs: which outputs of the host are y, where it computes several.
        entry: computes the gate, and the first projection of the term where it has one; None for another source.
        gate_name: the gate's name; empty for a term without a gate.
        in_attention: whether the term stands inside the attention, whose text a prefix may lengthen.
        crosses: whether x is of another text than the layer's own.
        reads_output: whether x is what the host gives, and not what it is given.
        once: whether the projection is also called for relative positions, which a gated term leaves alone.
    """

    folds_to: Literal["", "merged", "constant"] = ""
    """What becomes of the term where its gate becomes a constant (`unipelt.fold`); empty where it cannot."""
    takes_attention = False
    """Whether the submodule takes attention even when its gate is closed."""

    def __init__(self, name: str, kind: str, outputs: OutputSlice) -> None:
        super().__init__()
        self.name = name
        self.kind = kind
        self.outputs = outputs
        self.count = outputs.count
        self.entry: Entry | None = None
        self.gate_name = ""
        self.in_attention = False
        self.crosses = False
        self.reads_output = False
        self.once = False

    def forward(self, x: Tensor, out: Tensor, now: AttentionPass | None) -> Tensor:
        """Add the term.

        Args:
            x: (B, T, I), what the term reads.
            out: (B, T, all outputs of the host).
            now: the pass of the layer's attention; None outside of one.

        Returns:
            (B, T, all outputs of the host).
        """
        if self.once and self.gate_name:
            if self.name in require(now, self.name).served:
                return out
            require(now, self.name).served.add(self.name)
        gate, low = self.open_gate(x, now)
        if self.count == out.shape[-1]:
            return self.add(x, out, gate, low)
        groups = out.unflatten(-1, (self.outputs.groups, -1))
        size = groups.shape[-1]
        before, own, after = groups.split(
            (self.outputs.start, self.outputs.size, size - self.outputs.start - self.outputs.size), dim=-1
        )
        own = self.add(x, own.flatten(-2), gate, low).unflatten(-1, (self.outputs.groups, self.outputs.size))
        return torch.cat([before, own, after], dim=-1).flatten(-2)

    def open_gate(self, x: Tensor, now: AttentionPass | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gate, or None without one; and the first projection of x, where it comes with the gate."""
        if not self.gate_name:
            return None, None
        entry: Any = self._modules.get("entry")
        if entry is None:
            return flat_like(require(now, self.name).gate_for(self.gate_name, self.in_attention), x), None
        return entry(x, require(now, self.name).weights_for(self.in_attention, x) if entry.averages else None)

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g f(x, y)`, (B, T, O), for y (B, T, O)."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the term's own parameters, those of its entry apart."""
        return tuple(
            Part(f"{self.name}.{path}", self.kind, path)
            for path, _ in self.named_parameters()
            if not path.startswith("entry.")
        )

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return self.gate_name and f"gate={self.gate_name}"


class FunctionTerm(Term):
    """A term whose f is a module of its own, as `register_submodule` describes it.

    Attributes:
        function: computes f(x, y), (B, T, O), from x (B, T, I) and y (B, T, O).
    """

    def __init__(self, name: str, kind: str, outputs: OutputSlice, function: nn.Module) -> None:
        super().__init__(name, kind, outputs)
        self.function = function

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g f(x, y)`, (B, T, O), for y (B, T, O)."""
        own = next(self.function.parameters(), y).dtype
        update = self.function(x.to(own), y.to(own)).to(y.dtype)
        return add_scaled(y, gate, update)


def add_scaled(y: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    """Return `y + g update`, (B, T, O); the gate is (B, 1 or T, 1), or None for g = 1."""
    if gate is None:
        return y + update
    gate = flat_like(gate, y).to(y.dtype)
    if torch.is_grad_enabled() and update.requires_grad:
        return y + gate * update  # two operations fewer in the backward pass than addcmul
    return torch.addcmul(y, gate, update)


def require(now: AttentionPass | None, name: str) -> AttentionPass:
    """Return the pass. Raises `RuntimeError` if there is none."""
    if now is None:
        raise RuntimeError(f"{name!r} needs the pass of its layer, and was called outside of one; call the layer")
    return now


def flat_like(gate: Tensor, x: Tensor) -> Tensor:
    """Return a gate (B, T, 1) as it is, or (B T, 1) for an x that has the tokens of all texts in one row."""
    return gate.flatten(0, -2) if gate.dim() > x.dim() else gate


class SharedParameters(nn.Module):
    """Parameters that all terms of one submodule in a stack share; the stack's own set holds them.

    The term that is built first makes them, as attributes. A module refers to them in a tuple, which makes no part.

    Attributes:
        name: the submodule's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return dict(self._parameters)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the parameters."""
        return tuple(Part(f"shared.{name}", self.name, name) for name in self._parameters)

    def here(self) -> Any:
        """Return this module: an older way to read the parameters, as its attributes."""
        return self

    def has_parameters(self) -> bool:
        """Return whether any term made some."""
        return bool(self._parameters)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return self.name
