"""Terms: submodules that add `g f(x, y)` to the output of a part of a layer.

Shapes: B examples, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from unipelt.submodules.chosen_tokens import ChosenTokens
from unipelt.submodules.drop import SubmoduleDropout
from unipelt.submodules.entry import Entry, Part
from unipelt.submodules.forward_pass import AttentionPass
from unipelt.submodules.outputs import OutputSlice


class Term(nn.Module):
    """A submodule at one target: `y + g f(x, y)`, with g = 1 for a submodule without a gate.

    The gate comes from the term's own entry, which reads x, or from the entry of the layer's attention, which computes
    the gates of several terms. A term can also have no gate.

    Attributes:
        name: the key of the term in its set, such as `lora_query`.
        kind: the submodule's name in a configuration, such as `lora`.
        outputs: the outputs of the host that are y, for a host that computes several projections.
        entry: the term's own entry, which computes the gate and, if the two share one matrix product, the first
            projection of the term; else None.
        gate_name: the gate's name; empty for a term without a gate.
        in_attention: whether the term is inside the attention, so that a prefix may lengthen the term's text.
        crosses: whether x comes from another text than the layer's text.
        reads_output: whether x is the host's output instead of the host's input.
        once: whether the host is also called for relative positions. A term that depends on the text does not change
            that call.
        drop: the dropout of whole submodules, or None.
        tokens: the tokens of a text to which the term is added; None for all tokens.
    """

    folds_to: Literal["", "merged", "constant"] = ""
    """How `unipelt.fold` treats a gate that becomes a constant.

    `merged`: the term is merged into the weight of its host. `constant`: the constant is merged into the term's own
    parameters. Empty: the term is not folded.
    """
    takes_attention = False
    """Whether the submodule takes attention even if its gate is 0."""

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
        self.drop: SubmoduleDropout | None = None
        self.tokens: ChosenTokens | None = None

    def forward(self, x: Tensor, out: Tensor, now: AttentionPass | None) -> Tensor:
        """Add the term to the host's output.

        Args:
            x: (B, T, I), the term's input.
            out: (B, T, all outputs of the host).
            now: the pass of the layer's attention; None outside of a pass.

        Returns:
            (B, T, all outputs of the host).
        """
        if self.once and self.depends_on_text:
            if self.name in require(now, self.name).served:
                return out
            require(now, self.name).served.add(self.name)
        gate, low = self.open_gate(x, now)
        gate = self.drop_from(gate, x, now)
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
        """Return the gate and the term's first projection of x.

        The gate is (B, 1 or T, 1), or None for a term without a gate. It is 0 at the tokens that are not chosen. The
        first projection is None unless the entry computes it together with the gate.
        """
        gate, low = self._own_gate(x, now)
        if self.tokens is None:
            return gate, low
        chosen = self.tokens.mask(require(now, self.name), x)
        return chosen if gate is None else gate * chosen.to(gate.dtype), low

    def _own_gate(self, x: Tensor, now: AttentionPass | None) -> tuple[Tensor | None, Tensor | None]:
        if not self.gate_name:
            return None, None
        entry: Any = self._modules.get("entry")
        if entry is None:
            return flat_like(require(now, self.name).gate_for(self.gate_name, self.in_attention), x), None
        return entry(x, require(now, self.name).weights_for(self.in_attention, x) if entry.averages else None)

    def drop_from(self, gate: Tensor | None, x: Tensor, now: AttentionPass | None) -> Tensor | None:
        """Return the gate with 0 where dropout leaves the term out. Out of training the gate does not change."""
        if self.drop is None or not self.training:
            return gate
        keep = self.drop.keep_for(require(now, self.name), self.kind, x)
        if gate is None:
            return keep.to(x.dtype)
        return flat_like(gate, x) * keep.to(gate.dtype)

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g f(x, y)`, (B, T, O), for y (B, T, O)."""
        raise NotImplementedError

    @property
    def depends_on_text(self) -> bool:
        """Whether the term depends on the text, and not on x alone; a term with a gate does."""
        return bool(self.gate_name)

    @property
    def averages(self) -> bool:
        """Whether the term averages over the real tokens of a text, without its gate."""
        return False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the term's own parameters, without those of the entry."""
        return tuple(
            Part(f"{self.name}.{path}", self.kind, path)
            for path, _ in self.named_parameters()
            if not path.startswith("entry.")
        )

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return self.gate_name and f"gate={self.gate_name}"


class FunctionTerm(Term):
    """A term with a separate module for f, as in `register_submodule`.

    Attributes:
        function: the module that computes f(x, y), (B, T, O), from x (B, T, I) and y (B, T, O). It may have the
            attributes `reads_output` and `chosen_tokens`, which the term takes over.
    """

    def __init__(self, name: str, kind: str, outputs: OutputSlice, function: nn.Module) -> None:
        super().__init__(name, kind, outputs)
        self.function = function
        self.reads_output = getattr(function, "reads_output", False)
        self.tokens = getattr(function, "chosen_tokens", None)

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None, low: Tensor | None) -> Tensor:
        """Return `y + g f(x, y)`, (B, T, O), for y (B, T, O)."""
        own = next(self.function.parameters(), y).dtype
        update = self.function(x.to(own), y.to(own)).to(y.dtype)
        return add_scaled(y, gate, update)


def add_scaled(y: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    """Return `y + g update`, (B, T, O). The gate is (B, 1 or T, 1), or None for g = 1."""
    if gate is None:
        return y + update
    gate = flat_like(gate, y).to(y.dtype)
    if torch.is_grad_enabled() and update.requires_grad:
        return y + gate * update  # the backward pass has two operations fewer than with addcmul
    return torch.addcmul(y, gate, update)


def require(now: AttentionPass | None, name: str) -> AttentionPass:
    """Return the pass of the layer's attention. Raise `RuntimeError` if there is no pass."""
    if now is None:
        raise RuntimeError(f"{name!r} needs the pass of its layer, and was called outside of one; call the layer")
    return now


def flat_like(gate: Tensor, x: Tensor) -> Tensor:
    """Return a gate (B, 1 or T, 1) unchanged, or flat, (B T, 1), if x has the tokens of all texts in one dimension."""
    return gate.flatten(0, -2) if gate.dim() > x.dim() else gate


class SharedParameters(nn.Module):
    """The parameters that all terms of one submodule in a stack share. The stack's set holds this module.

    The first term that is built creates the parameters, as attributes of this module. Each term keeps this module in a
    tuple, so that PyTorch does not register it as a child of the term.

    Attributes:
        name: the submodule's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self) -> dict[str, Any]:
        """Return the shared parameters by name."""
        return dict(self._parameters)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The named parts of the shared parameters."""
        return tuple(Part(f"shared.{name}", self.name, name) for name in self._parameters)

    def here(self) -> Any:
        """Return this module. This method is an older way to read the parameters as attributes."""
        return self

    def has_parameters(self) -> bool:
        """Return whether a term has created parameters."""
        return bool(self._parameters)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return self.name
