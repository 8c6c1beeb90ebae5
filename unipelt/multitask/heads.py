"""Heads of tasks on one base: how many labels they have, and how they run behind a pass that others shared.

The class of a model is never taken apart: its own `forward` runs, with another module where its base would be. Asked
first, that module tells what the base would be given; answered later, it gives what the base gave.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.files.messages import show
from unipelt.hosts.locate import InjectionError
from unipelt.injection.parameters import head_names

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
MOST_LABELS = 100_000


class _Asked(Exception):
    """No error: it carries a question out of a forward."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


class Answer(nn.Module):
    """Stands where a model's base is and computes nothing: it carries the question out, or gives the answer."""

    def __init__(self, base: nn.Module, output: Any = None) -> None:
        super().__init__()
        self.base = (base,)  # a reference, not a part
        self.output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was given at the start."""
        if self.output is None:
            raise _Asked(args, kwargs)
        return self.output

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Mapping[str, Any], output: Any) -> Any:
        """What a model gives for a batch, if its base gives `output`."""
        return output if model.base_model is model else _call(model, cls(model.base_model, output), batch)


def _call(model: PreTrainedModel, answer: Answer, batch: Mapping[str, Any]) -> Any:
    stand_in: Any = copy.copy(model)  # shares all that the model has; threads do not see each other's
    stand_in.__dict__["_modules"] = {**model._modules, model.base_model_prefix: answer}
    forward: Any = type(model).forward
    return forward(stand_in, **batch)


def capture_base_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's class would give its base for a batch, by keyword.

    Raises:
        InjectionError: it does not call its base as one module.
    """
    base: Any = model.base_model
    parameters = inspect.signature(base.forward).parameters
    question: dict[str, Any]
    if base is model:
        if "labels" in batch:
            raise InjectionError(
                f"{type(model).__name__} holds the parts of its base itself, so its loss would be over all rows of a "
                "mixed batch; compute it from the logits, or run one task at a time"
            )
        question = dict(batch)
    else:
        try:
            _call(model, Answer(base), batch)
        except _Asked as asked:
            question = {**dict(zip(parameters, asked.args, strict=False)), **asked.kwargs}
        else:
            raise InjectionError(
                f"{type(model).__name__} calls a part of its base and not the base, so that several tasks cannot share "
                "a pass; run one task at a time"
            )
    if "use_cache" in parameters or "use_cache" in question:
        question["use_cache"] = False  # of rows that generate by themselves there is none to share
    return question


def fit_labels(model: PreTrainedModel, labels: Any) -> Any:
    """Labels of one task's rows, as its loss needs them: one column of a batch holds classes and scores as one type."""
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        return labels
    count, problem = getattr(model.config, "num_labels", None), getattr(model.config, "problem_type", None)
    if problem == "regression" or (problem is None and count == 1):
        return labels.to(torch.float32 if model.dtype in (torch.bfloat16, torch.float16) else model.dtype)
    return labels.long() if labels.is_floating_point() and problem != PROBLEMS[2] else labels


@dataclass(frozen=True)
class Labels:
    """What a checkpoint says of its labels: how many, their names, if it has some, and the kind of problem."""

    count: int
    names: Mapping[int, str] | None
    problem_type: str | None


def saved_labels(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Labels:
    """The labels in a checkpoint's description of its base. Raises `ValueError` where it cannot be meant."""
    names = config.get("id2label")
    if names is not None:
        try:
            names = {int(key): str(value) for key, value in names.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"id2label must lead from numbers to names, not {show(names)}") from error
    count = config.get("num_labels", 2) if names is None else len(names)
    if count not in {size for tensor in tensors.values() for size in tensor.shape}:
        raise ValueError(f"num_labels is {show(count)}, and no tensor has that size")
    return Labels(count, names, config.get("problem_type"))


def relabel(
    model: PreTrainedModel, count: int | None, problem_type: str | None, names: Mapping[int, str] | None = None
) -> None:
    """Give a model's head another number of labels, in place; what has another size then starts at random.

    Raises:
        InjectionError: the class has no such number.
        ValueError: the number or the problem type cannot be meant.
    """
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_LABELS):
        raise ValueError(f"num_labels must be a whole number above 0, not {show(count)}")
    if problem_type is not None and problem_type not in PROBLEMS:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEMS)}, or None, not {show(problem_type)}")
    config: Any = model.config
    config.problem_type = problem_type  # with another number of labels, another loss
    if count is not None and count != config.num_labels:
        _resize(model, count)
    if names is not None:
        config.id2label, config.label2id = dict(names), {label: number for number, label in names.items()}


def _resize(model: PreTrainedModel, count: int | None) -> None:
    config: Any = model.config
    config.num_labels = count
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(config))
    head, resized = head_names(model), False
    for path, theirs in other.named_modules():
        own: Any = model.get_submodule(path)
        shapes = {name: parameter.shape for name, parameter in theirs._parameters.items() if parameter is not None}
        changed = [name for name, shape in shapes.items() if own._parameters[name].shape != shape]
        for name in changed:
            if f"{path}.{name}".removeprefix(".") not in head:
                raise InjectionError(
                    f"another number of labels would change {path}.{name}, which is no part of the head"
                )
            own._parameters[name] = nn.Parameter(own._parameters[name].new_empty(shapes[name]), requires_grad=False)
        for name in ("out_features", "num_labels"):
            if name in vars(theirs):
                setattr(own, name, vars(theirs)[name])
        if changed:
            resized = True
            # a part that keeps its size, a bias of a list of one say, starts again with the rest of its module
            model._init_weights(own)
    if not resized:
        raise InjectionError(f"{type(model).__name__} has no head whose size is a number of labels")
