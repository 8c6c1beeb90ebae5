"""The entry: one module with one matrix product for all weight rows that read the same input.

Shapes: B examples, T tokens, I width of the input, G gates, h width of a gate's network, R further rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipelt.config.gate import GateConfig
from unipelt.submodules.gate import INITIAL_STD, Gates, start_logit
from unipelt.submodules.gate_networks import NETWORKS


@dataclass(frozen=True)
class Part:
    """One named part of a parameter: the whole parameter, or some of its rows.

    Attributes:
        name: the part's name in its set, such as `lora_query.A` or `gate.adapter.weight`.
        kind: the submodule that the part belongs to, or `gate`.
        parameter: the parameter's name in its module.
        start, count: index of the first row and number of rows; if `count` is None, all rows.
        gate: the name of the gate that the part belongs to; empty for other parts.
        row: the name of the further rows that the part belongs to; empty for other parts.
        frozen: whether the part is never trained.
    """

    name: str
    kind: str
    parameter: str
    start: int = 0
    count: int | None = None
    gate: str = ""
    row: str = ""
    frozen: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part's rows of a tensor that has the parameter's shape, as a view."""
        return tensor if self.count is None else tensor[self.start : self.start + self.count]


@dataclass(frozen=True)
class Rows:
    """The first projection of a submodule, as further rows of an entry.

    Attributes:
        name: the name of the rows in the entry, which is also the name of the submodule's gate.
        part: the part's name, such as `lora_query.A`.
        kind: the submodule that the rows belong to.
        weight: (R, I), the initial weight.
        bias: (R,), the initial bias; None without bias.
    """

    name: str
    part: str
    kind: str
    weight: Tensor
    bias: Tensor | None = None


class Entry(nn.Module):
    """The product `W x + b` for the gates and the projections that read x: first the gates' rows, then further rows.

    Each gate or projection has few rows, so one product for all rows reads x only once. An entry has no further rows if
    its gates have a network or no input (`static`), because such gates do not share a product.

    Attributes:
        gates: activation and pooling of the gates.
        weight: (G + R, I), or (G, h) after a network; absent if the gates have no input.
        bias: (G,), or (G + R,) if the further rows have a bias.
        network: the network that transforms x first, or None.
        has_input: whether the gates read x.
        parts: the named parts of the parameters.
        is_separate: whether the gates and the further rows are separate parameters, `gate_weight` and `row_weight`
            (also `gate_bias` and `row_bias` if the further rows have a bias). Then an optimizer can give them
            different learning rates. A state dict always has one `weight` and one `bias`.
    """

    weight: nn.Parameter
    gate_weight: nn.Parameter
    row_weight: nn.Parameter
    gate_bias: nn.Parameter
    row_bias: nn.Parameter

    def __init__(
        self,
        inputs: int,
        names: tuple[str, ...],
        config: GateConfig,
        like: Tensor,
        *,
        causal: bool,
        starts: Mapping[str, float | None] | None = None,
        rows: tuple[Rows, ...] = (),
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.gates = Gates(names, config, causal=causal)
        self.network = NETWORKS[config.network](inputs, config.hidden, kind) if config.network in NETWORKS else None
        self.has_input = config.pooling != "static"
        if rows and not shares_product(config):
            raise ValueError("gates behind a network, and static ones, share no product")
        self._rows = tuple((row.name, row.part, row.kind, len(row.weight)) for row in rows)
        self._row_bias = any(row.bias is not None for row in rows)
        bias = torch.tensor([start_logit(config, (starts or {}).get(name)) for name in names], **kind)
        if self.has_input:
            width = inputs if self.network is None else config.hidden
            weight = torch.empty(len(names), width, **kind)
            nn.init.normal_(weight, std=0.0 if config.activation == "tanh" else INITIAL_STD)
            self.weight = nn.Parameter(torch.cat([weight, *(row.weight.detach() for row in rows)]) if rows else weight)
        if self._row_bias:
            bias = torch.cat([bias, *(row.bias.detach() for row in rows if row.bias is not None)])
        self.bias = nn.Parameter(bias)
        self.is_separate = False
        self._note()

    def _note(self) -> None:
        """Store the values that every pass needs, so that no pass computes them again."""
        self.parts = self._name_parts()
        self.gate_names = self.gates.names
        self.row_names = tuple(row[0] for row in self._rows)
        self.averages = self.gates.averages
        self.sizes = [len(self.gate_names), sum(row[3] for row in self._rows)]
        self.first_row = self.gate_names.index(self.row_names[0]) if self.row_names else 0
        after = len(self.gate_names) - self.first_row - len(self.row_names)
        self.gate_split = [self.first_row, len(self.row_names), *([after] if after else [])]

    def forward(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the gates and the products of the further rows.

        Args:
            x: (..., I).
            weights: (B, T) token weights, or None, as in `Gates.forward`.

        Returns:
            The gates, (B, 1, G) or (..., G); and `W x + b` of the further rows, (..., R), or None without such rows.
        """
        gates: Any = self._modules["gates"]
        held = self._parameters  # faster than attributes, for which PyTorch calls __getattr__
        bias: Any = held.get("bias")
        if not self.has_input:
            lead = x.shape[:-1] if gates.pooling == "token" else (len(x), 1)
            return gates(bias.expand(*lead, -1), weights), None
        weight: Any = held.get("weight")
        if self.is_separate:
            weight, bias = self._whole()
        x = x.to(weight.dtype)
        if self.network is not None:
            return gates(nn.functional.linear(self.network(x, weights), weight, bias), weights), None
        if not self.row_names:
            return gates(nn.functional.linear(x, weight, bias), weights), None
        if self._row_bias:
            logits, further = nn.functional.linear(x, weight, bias).split(self.sizes, dim=-1)
        else:
            logits, further = nn.functional.linear(x, weight).split(self.sizes, dim=-1)
            logits = logits + bias
        return gates(logits, weights), further

    def _whole(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.gate_weight, self.row_weight])
        return weight, torch.cat([self.gate_bias, self.row_bias]) if self._row_bias else self.bias

    def separate(self) -> None:
        """Split the parameters into separate ones for the gates and for the further rows, in place."""
        if self.is_separate or not self._rows:
            return
        count = len(self.gates.names)
        for name in ("weight", "bias") if self._row_bias else ("weight",):
            whole: nn.Parameter = self._parameters.pop(name)  # type: ignore[assignment]
            for part, rows in (("gate", whole[:count]), ("row", whole[count:])):
                self.register_parameter(f"{part}_{name}", nn.Parameter(rows.detach().clone(), whole.requires_grad))
        self.is_separate = True
        self._note()
        self.register_state_dict_post_hook(join_rows)
        self.register_load_state_dict_pre_hook(_part_rows)

    def _join(self) -> None:
        """Join the separate parameters of gates and further rows again, in place."""
        if self.is_separate:
            weight, bias = self._whole()
            for name in [name for name in self._parameters if name.startswith(("gate_", "row_"))]:
                del self._parameters[name]
            self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            self.is_separate = False
            self._note()

    def keep(self, names: Collection[str]) -> None:
        """Keep only the gates and the further rows of these names, in place."""
        self._join()
        kept: dict[str, list[int]] = {"weight": [], "bias": []}
        for part in self.parts:
            if (part.gate or part.row) in names:
                kept[part.parameter] += range(part.start, part.start + (part.count or 0))
        self.bias = nn.Parameter(self.bias.detach()[kept["bias"]])
        if self.has_input:
            self.weight = nn.Parameter(self.weight.detach()[kept["weight"]])
        self._rows = tuple(row for row in self._rows if row[0] in names)
        self.gates.names = tuple(name for name in self.gates.names if name in names)
        self._note()

    def start_rows(self, row: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the initial values of the further rows of this name: weight (R, I), bias (R,) or None."""
        with torch.no_grad():
            for part in self.parts:
                if part.row == row:
                    value = weight if part.parameter == "weight" else bias
                    assert value is not None
                    part.of(getattr(self, part.parameter)).copy_(value)

    def extract(self, row: str) -> nn.Linear:
        """Return a new projection, I -> R, with copies of the further rows of this name."""
        found = {
            part.parameter: part.of(getattr(self, part.parameter)).detach() for part in self.parts if part.row == row
        }
        weight = found["weight"]
        made = nn.Linear(weight.shape[1], len(weight), bias="bias" in found, device="meta")
        for name, tensor in found.items():
            setattr(made, name, nn.Parameter(tensor.clone()))
        return made

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        parts = [*self.gate_names, *(part.name for part in self.parts if part.row and not part.name.endswith(".bias"))]
        return f"rows: {', '.join(parts)}"

    def _name_parts(self) -> tuple[Part, ...]:
        parts = []
        gates, rows = ("gate_weight", "row_weight") if self.is_separate else ("weight", "weight")
        gate_bias, row_bias = ("gate_bias", "row_bias") if self.is_separate and self._row_bias else ("bias", "bias")
        for index, name in enumerate(self.gates.names):
            if self.has_input:
                parts.append(Part(f"gate.{name}.weight", "gate", gates, index, 1, gate=name))
            parts.append(Part(f"gate.{name}.bias", "gate", gate_bias, index, 1, gate=name))
        start = 0 if self.is_separate else len(self.gates.names)
        for name, part, kind, count in self._rows:
            parts.append(Part(f"{part}.weight" if self._row_bias else part, kind, rows, start, count, row=name))
            if self._row_bias:
                parts.append(Part(f"{part}.bias", kind, row_bias, start, count, row=name))
            start += count
        if self.network is not None:
            names = [f"network.{name}" for name, _ in self.network.named_parameters()]
            parts += [Part(f"gate.{name}", "gate", name, gate="network") for name in names]
        return tuple(parts)


def join_rows(entry: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Join gates and further rows in a state dict to one `weight` and one `bias` (hook of a separate entry)."""
    for name in ("weight", "bias"):
        pieces = [state.pop(key) for key in (f"{prefix}gate_{name}", f"{prefix}row_{name}") if key in state]
        if pieces:
            state[f"{prefix}{name}"] = torch.cat(pieces)


def _part_rows(entry: Entry, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Split `weight` and `bias` of a state dict into gates and further rows (hook before a separate entry loads)."""
    count = len(entry.gates.names)
    for name in ("weight", "bias"):
        whole = state.get(f"{prefix}{name}")
        if whole is not None and f"gate_{name}" in entry._parameters:
            del state[f"{prefix}{name}"]
            state[f"{prefix}gate_{name}"], state[f"{prefix}row_{name}"] = whole[:count], whole[count:]


def shares_product(config: GateConfig) -> bool:
    """Return whether these gates share one matrix product with other projections of the same input."""
    return config.network not in NETWORKS and config.pooling != "static"
