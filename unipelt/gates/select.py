"""Choose the best subset of the submodules of a trained model, and remove the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from transformers import PreTrainedModel

from unipelt.config.subsets import narrowed, refusal_of_select
from unipelt.files.messages import show
from unipelt.injection.parameters import ParameterCounts, parameter_counts
from unipelt.injection.reinject import own_values, reinject
from unipelt.injection.state import injection_of

MOST_EXHAUSTIVE = 3
"""The largest number of submodules of which all subsets are scored. With more, submodules leave one by one."""


class SelectError(ValueError):
    """There is nothing to choose in a model, or a score is not a number. The model has its submodules and values."""


@dataclass(frozen=True)
class ScoredSubset:
    """A subset of a model's submodules, and the score of the model with these submodules alone.

    Attributes:
        submodules: the names of the submodules, such as `("adapter", "lora")`.
        score: the score. Larger is better.
    """

    submodules: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class SelectReport:
    """The result of `unipelt.select`; `str` of the report is a table.

    Attributes:
        subsets: every subset that was scored, in the order of the passes. The first one has all submodules.
        chosen: the submodules that are left in the model.
        removed: the submodules that were removed.
        before, after: parameter counts.
    """

    subsets: tuple[ScoredSubset, ...]
    chosen: tuple[str, ...]
    removed: tuple[str, ...]
    before: ParameterCounts
    after: ParameterCounts

    @property
    def score(self) -> float:
        """The score of the chosen subset."""
        return next(subset.score for subset in self.subsets if subset.submodules == self.chosen)

    def __str__(self) -> str:
        width = max(len(", ".join(subset.submodules)) for subset in self.subsets)
        rows = [
            f"{', '.join(subset.submodules):<{width}}  {subset.score:.4f}"
            f"{'  chosen' if subset.submodules == self.chosen else ''}"
            for subset in self.subsets
        ]
        return "\n".join(
            [
                *rows,
                f"{len(self.subsets)} passes; removed {', '.join(self.removed) or 'nothing'}; beside the base "
                f"{self.before.deployed:,} parameters before (deployed), {self.after.deployed:,} after",
            ]
        )


def select(model: PreTrainedModel, evaluate: Callable[[PreTrainedModel], float]) -> SelectReport:
    """Choose the best subset of the submodules of a trained model by a score, and remove the others, in place.

    The score of a subset is that of the trained model without the other submodules, in all layers. Nothing is trained
    again. With up to three submodules every subset except the empty one is scored: 3 passes for two submodules, 7 for
    three. With n > 3 submodules the search is greedy: all submodules are scored together, then the model without each
    one. The submodule that is missed least leaves if the score does not fall, and so on with the others. That takes n +
    1 passes at least, and at most n (n + 1) / 2. Of equal scores, the one with fewer submodules wins, and then the
    first one.

    The model then is a model of the smaller method: the configuration in a checkpoint, counts and the model card name
    only the submodules that are left. All other values stay, bit for bit, also those of the head. `unipelt.remove`
    still restores the base. The parameters of submodules are new objects, so an optimizer must be made again.

    Args:
        model: a trained model with `unipelt.inject`'s submodules, two or more.
        evaluate: function of the model that returns its score, a finite number. Larger is better. The model is in
            evaluation mode, and computes without gradients.

    Returns:
        The score of every subset, and the choice.

    Raises:
        SelectError: there is nothing to choose, the model is folded or shares its base with other tasks, or a score is
            not a finite number. The model has all its submodules and values.
        ValueError: the model carries no submodules, or PEFT holds them.
    """
    injection = injection_of(model)
    if problem := refusal_of_select(injection.config):
        raise SelectError(problem)
    _check_model(model)
    config = injection.config
    names = tuple(config.submodule_names)
    values, before, training = own_values(model), parameter_counts(model), model.training
    scored: dict[tuple[str, ...], float] = {}

    def score(subset: tuple[str, ...]) -> float:
        if subset not in scored:
            reinject(model, narrowed(config, subset), values)
            model.eval()
            with torch.no_grad():
                found = evaluate(model)
            if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
                raise SelectError(f"evaluate must return a finite number, not {show(found)}")
            scored[subset] = float(found)
        return scored[subset]

    chosen = names
    try:
        chosen = best_subset(names, score)
    finally:
        reinject(model, narrowed(config, chosen), values)
        model.train(training)
    return SelectReport(
        tuple(ScoredSubset(subset, value) for subset, value in scored.items()),
        chosen,
        tuple(name for name in names if name not in chosen),
        before,
        parameter_counts(model),
    )


def best_subset(names: tuple[str, ...], score: Callable[[tuple[str, ...]], float]) -> tuple[str, ...]:
    """Return the subset with the best score. Of equal scores the smaller subset wins."""
    if len(names) <= MOST_EXHAUSTIVE:
        return _first_best([*_subsets(names)], score)
    best = names
    score(best)
    while len(best) > 1:
        smaller = _first_best([*combinations(best, len(best) - 1)], score)
        if score(smaller) < score(best):
            break
        best = smaller
    return best


def _subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every subset except the empty one, the largest first."""
    for size in range(len(names), 0, -1):
        yield from combinations(names, size)


def _first_best(subsets: Sequence[tuple[str, ...]], score: Callable[[tuple[str, ...]], float]) -> tuple[str, ...]:
    scores = [score(subset) for subset in subsets]
    return max(zip(subsets, scores, strict=True), key=lambda pair: (pair[1], -len(pair[0])))[0]


def _check_model(model: PreTrainedModel) -> None:
    injection = injection_of(model)
    if injection.folded is not None:
        raise SelectError("this model is folded; choose submodules first, and fold the model then")
    if injection.shares:
        raise SelectError(
            "this model shares its base with other tasks; save it, and choose the submodules of what "
            "unipelt.from_pretrained gives"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SelectError("some parameters are not in memory (offloaded); load the model without offloading")
