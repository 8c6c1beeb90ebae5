"""Merge the task vectors of several tasks into one: task arithmetic, TIES and DARE.

A task vector is the difference between a trained tensor and its start. Shapes: N tasks, and any shape of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unipelt.files.messages import show, suggest

MergeMethod = Literal["task_arithmetic", "ties", "dare", "dare_ties"]
METHODS: tuple[str, ...] = get_args(MergeMethod)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class VectorMerge:
    """A way to merge N task vectors t_1 … t_N of one tensor.

    - `task_arithmetic` (Ilharco et al., 2023): `sum_i w_i t_i`.
    - `ties` (Yadav et al., 2023, section 3): each vector keeps its `density` largest numbers by size. The sign of each
      element is that of `sum_i t_i`. The result is the mean of `w_i t_i` over the vectors with that sign.
    - `dare` (Yu et al., 2024, section 3): each number of a vector is dropped with the probability `1 - density`, and
      the others are divided by `density`. Then task arithmetic.
    - `dare_ties`: the same drop, then the signs and the mean of `ties`.

    Attributes:
        method: one of the four.
        weights: (N,), the w_i.
        density: the share of numbers that a vector keeps, above 0 and at most 1, of each tensor by itself.
        sign: the election of a sign in the two methods with signs. `total`: by the sum of the values. `frequency`: by
            the number of the values of each sign.
    """

    method: MergeMethod
    weights: tuple[float, ...]
    density: float
    sign: Literal["total", "frequency"]

    @property
    def elects_signs(self) -> bool:
        """Whether the method elects one sign for each element."""
        return self.method in ("ties", "dare_ties")

    def __call__(self, vectors: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Return the merged vector.

        Args:
            vectors: N tensors of one shape, on the CPU.
            generator: the source of the random drops, a generator of the CPU.
        """
        drops = self.method.startswith("dare")
        kept = [self._drop(vector, generator) if drops else self._trim(vector) for vector in vectors]
        stacked = torch.stack(kept)
        weights = torch.tensor(self.weights, dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
        if not self.elects_signs:
            return (weights * stacked).sum(dim=0)
        signs = stacked.sign()
        elected = torch.where((stacked if self.sign == "total" else signs).sum(dim=0) >= 0, 1, -1)
        agrees = signs == elected
        return (weights * stacked * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)

    def _trim(self, vector: Tensor) -> Tensor:
        """Return a vector with zeros in place of all numbers but the `density` largest by size."""
        if self.density == 1:
            return vector
        count = max(1, int(self.density * vector.numel()))
        flat = vector.flatten()
        index = flat.abs().topk(count).indices
        return torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(vector)

    def _drop(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        if self.density == 1:
            return vector
        kept = torch.rand(vector.shape, generator=generator, dtype=torch.float64) < self.density
        return torch.where(kept, vector / self.density, 0.0)


def vector_merge(method: Any, count: int, weights: Sequence[float] | None, density: Any, sign: Any) -> VectorMerge:
    """Return a checked `VectorMerge` for `count` tasks.

    Without weights, every task has the weight 1 in a method with signs, whose result is a mean. Every task has the
    weight `1 / count` in the other methods, whose result is a sum.

    Raises:
        ValueError: an argument is not valid; the message names it and the possible values.
    """
    if method not in METHODS:
        raise ValueError(
            f"there is no method {show(method)} to merge tasks; "
            f"{suggest(method, METHODS, 'the methods are ' + ', '.join(METHODS))}"
        )
    if sign not in SIGNS:
        raise ValueError(f"sign must be {' or '.join(SIGNS)}, not {show(sign)}")
    if sign != "total" and method not in ("ties", "dare_ties"):
        raise ValueError(f"sign: {sign} is of ties and dare_ties; {method} elects no sign")
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, not {show(density)}")
    if density != 1 and method == "task_arithmetic":
        raise ValueError("task_arithmetic keeps every number; leave density out, or take ties, dare or dare_ties")
    if weights is None:
        weights = [1.0 if method in ("ties", "dare_ties") else 1 / count] * count
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != count:
        raise ValueError(f"weights must be a list of {count} numbers, one for each task, not {show(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"a weight must be a finite number, not {show(weight)}")
    if not any(weights):
        raise ValueError("all weights are 0, so nothing would be left; give one of them another value")
    return VectorMerge(method, tuple(map(float, weights)), float(density), sign)
