"""The heads of tasks on one base: set their number of labels, and run them after a shared pass.

A model's own `forward` runs without changes, with an `Answer` in place of its base. In a first call, the `Answer`
captures the inputs of the base; in a later call, it returns the base's output.
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
    """Carry the inputs of a base out of a `forward`; this is not an error."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


class Answer(nn.Module):
    """A module in place of a model's base that computes nothing: it captures inputs, or returns a given output."""

    def __init__(self, base: nn.Module, output: Any = None) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple, so that the base is not registered as a submodule
        self.output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the given output; without one, raise `_Asked` with the inputs."""
        if self.output is None:
            raise _Asked(args, kwargs)
        return self.output

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Mapping[str, Any], output: Any) -> Any:
        """Return a model's output for a batch, with `output` as the output of its base."""
        return output if model.base_model is model else _call(model, cls(model.base_model, output), batch)


def _call(model: PreTrainedModel, answer: Answer, batch: Mapping[str, Any]) -> Any:
    stand_in: Any = copy.copy(model)  # a shallow copy, so that threads do not change the model for each other
    stand_in.__dict__["_modules"] = {**model._modules, model.base_model_prefix: answer}
    forward: Any = type(model).forward
    return forward(stand_in, **batch)


def capture_base_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a model's class passes to its base for a batch, by keyword.

    Raises:
        InjectionError: the class does not call its base as one module.
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
        question["use_cache"] = False  # rows of several tasks cannot share a cache
    return question


def fit_labels(model: PreTrainedModel, labels: Any) -> Any:
    """Return the labels of one task's rows with the type that its loss needs.

    A batch of several tasks holds classes and scores in one tensor of one type.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1:
        return labels
    count, problem = getattr(model.config, "num_labels", None), getattr(model.config, "problem_type", None)
    if problem == "regression" or (problem is None and count == 1):
        return labels.to(torch.float32 if model.dtype in (torch.bfloat16, torch.float16) else model.dtype)
    return labels.long() if labels.is_floating_point() and problem != PROBLEMS[2] else labels


@dataclass(frozen=True)
class Labels:
    """The labels of a checkpoint: their number, their names (or None), and the problem type."""

    count: int
    names: Mapping[int, str] | None
    problem_type: str | None


def saved_labels(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Labels:
    """Return the labels from a checkpoint's description of its base. Raises `ValueError` for an invalid description."""
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
    """Change the number of labels of a model's head, in place; modules that change their size are initialised again.

    Raises:
        InjectionError: the class has no head that depends on the number of labels.
        ValueError: the number or the problem type is not valid.
    """
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_LABELS):
        raise ValueError(f"num_labels must be a whole number above 0, not {show(count)}")
    if problem_type is not None and problem_type not in PROBLEMS:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEMS)}, or None, not {show(problem_type)}")
    config: Any = model.config
    config.problem_type = problem_type  # the default loss depends on the number of labels
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
            # the whole module starts again, also parameters that keep their size
            model._init_weights(own)
    if not resized:
        raise InjectionError(f"{type(model).__name__} has no head whose size is a number of labels")
