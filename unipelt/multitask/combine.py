"""Combine the trained sets of several tasks into the set of a new task.

Shapes: O outputs and I inputs of a projection, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.checkpoint.bind import bind
from unipelt.config.methods import UniPELTConfig
from unipelt.config.schema import flatten
from unipelt.files.messages import show
from unipelt.injection.inject import inject_as
from unipelt.injection.parameters import kept_names
from unipelt.injection.state import injection_of
from unipelt.multitask.heads import relabel
from unipelt.multitask.task_vectors import MergeMethod, VectorMerge, vector_merge
from unipelt.multitask.tasks import Tasks
from unipelt.submodules.lora import low_rank_factors
from unipelt.submodules.room import OwnPart, own_parts

logger = logging.get_logger(__name__)

Key = tuple[str, bool, str]
"""A part of a set: path of its room, whether it belongs to the cross-attention, and its name."""
_NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class _Combination:
    """The tensors of the new task, before a model has them.

    Attributes:
        config: the configuration of the new set.
        values: parts of the set.
        head: parameters of the head by name.
        kept: the share of the merged low-rank updates' squared size that the new rank keeps; None without such updates.
    """

    config: UniPELTConfig
    values: Mapping[Key, Tensor]
    head: Mapping[str, Tensor]
    kept: float | None


def combine_tasks(
    tasks: Tasks,
    name: str,
    sources: Sequence[str],
    method: MergeMethod = "task_arithmetic",
    *,
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
    rank: int | None = None,
    start: str | None = None,
    head: str | None = None,
) -> PreTrainedModel:
    """Add a task whose set and head are merged from trained tasks of the same method, without training.

        tasks.load("sst2", "runs/sst2/model")
        tasks.load("imdb", "runs/imdb/model")
        unipelt.combine_tasks(tasks, "both", ["sst2", "imdb"], "ties", density=0.2)
        tasks.save("both", "both")

    The methods are those of `VectorMerge`: task arithmetic (Ilharco et al., 2023), TIES (Yadav et al., 2023) and DARE
    (Yu et al., 2024). They merge task vectors:

    - Of plain LoRA, a task vector is the update `s B A` of a weight, (O, I), as a whole: A and B by themselves depend
      on their random start, so a sum of factors would mix them. The merged update is written as a product of the rank
      `rank` again, by its largest singular values. This is exact if the merged update has no larger rank.
    - Of every other submodule, a task vector is the difference of the parameters from those of `start`, or the
      parameters themselves without it. The latter is right for (IA)3 and RED, which start at zero. Adapters and
      prefixes start at random, and units of two random starts do not correspond: merge only sets that began as one, and
      name that one as `start`, or take weights with a sum of 1.
    - Gates get the mean of the tasks' gates, by the sizes of the weights: a gate is no update of the base.
    - The head is merged too, as a difference from that of `start`, or of the base. `head` takes one task's head.

    Args:
        tasks: the tasks; the new one is added to them. The others do not change.
        name: the name of the new task.
        sources: names of the trained tasks, one or more. With one task and a negative weight, the task is negated.
        method: `task_arithmetic`, `ties`, `dare` or `dare_ties`.
        weights: a number for each source; by default 1 in the methods with signs, and 1 / (number of sources) in the
            others.
        density: the share of numbers that a task vector keeps, of each matrix by itself.
        sign: the election of signs: by the `total` of the values, or by the `frequency` of the signs.
        seed: seed of the random drops.
        rank: the rank of LoRA in the new task; by default that of the sources.
        start: name of a task that holds the parameters from which all sources were trained.
        head: name of the source whose head the new task takes. Sources with different labels need it.

    Returns:
        The model of the new task, `tasks[name]`. It can be evaluated, trained and saved as any other.

    Raises:
        KeyError: there is no such task.
        ValueError: an argument is not valid, the sources differ in their method, their heads or their labels, or a
            submodule cannot be merged. After any error the tasks are unchanged.
    """
    if not isinstance(tasks, Tasks):
        raise ValueError(f"combine_tasks takes unipelt.Tasks, not {type(tasks).__name__}")
    tasks._check_new(name)
    if isinstance(sources, str) or not sources or len(set(sources)) != len(sources):
        raise ValueError(f"sources must be a list of names of tasks, none of them twice, not {show(sources)}")
    merge = vector_merge(method, len(sources), weights, density, sign)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number, 0 or above, not {show(seed)}")
    if head is not None and head not in sources:
        raise ValueError(f"head must be one of the sources, {', '.join(sources)}, not {show(head)}")
    models = {source: tasks[source] for source in sources}
    begun = None if start is None else tasks[start]
    check_same_method(models if begun is None else {**models, str(start): begun})
    _check_mergeable(sources[0], injection_of(models[sources[0]]).config)
    _check_heads(tasks, models, head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = _combine(list(models.values()), begun, _new_config(models, rank), merge, generator)
        found = replace(found, head=_merge_heads(tasks, models, begun, head, merge, generator))
        labelled = models[head or sources[0]]
        model = _build(tasks, labelled, found, seed)
    if found.kept is not None:
        logger.info(f"rank {found.config.lora.rank} keeps {found.kept:.1%} of the merged updates")  # type: ignore[union-attr]
    return tasks._keep(name, model)


def _check_mergeable(name: str, config: UniPELTConfig) -> None:
    """Raise `ValueError` if the task of this name has a submodule that cannot be merged."""
    for part in (config.adapter, config.lora, *config.more):
        if part is not None and part.mixture is not None:
            raise ValueError(
                f"task {name!r} has a mixture of {part.mixture.experts} experts, whose order is its own; tasks with "
                "mixtures cannot be merged"
            )
    if config.lora is not None and config.lora.decomposed:
        raise ValueError(
            f"task {name!r} has decomposed LoRA (DoRA), whose lengths and directions cannot be merged as one update; "
            "train plain LoRA"
        )


def check_same_method(models: Mapping[str, PreTrainedModel]) -> None:
    """Raise `ValueError` if two tasks differ in their method or their head, or hold numbers that are not finite."""
    (first, model), *others = models.items()
    for name, one in models.items():
        if wrong := [path for path in kept_names(one) if not one.get_parameter(path).isfinite().all()]:
            raise ValueError(f"task {name!r} holds numbers that are not finite, in {wrong[0]}: its training diverged")
    known = injection_of(model)
    for other, theirs in others:
        injection = injection_of(theirs)
        ours, its = flatten(known.config.to_dict()), flatten(injection.config.to_dict())
        if key := next((key for key in {**ours, **its} if ours.get(key) != its.get(key)), None):
            raise ValueError(
                f"tasks {first!r} and {other!r} have different methods: {key} is {show(ours.get(key))} in the one and "
                f"{show(its.get(key))} in the other; combine tasks of one method"
            )
        if known.deployed != injection.deployed:
            raise ValueError(
                f"tasks {first!r} and {other!r} hold their prefixes in different forms, one of them deployed; save the "
                "other with deploy=True and load that"
            )
        if known.head != injection.head:
            raise ValueError(f"tasks {first!r} and {other!r} have heads of different parameters; combine tasks of one")


def _check_heads(tasks: Tasks, models: Mapping[str, PreTrainedModel], head: str | None) -> None:
    """Raise `ValueError` if the heads of the sources cannot be merged, and no head was chosen."""
    if head is not None:
        return
    names = injection_of(next(iter(models.values()))).head
    base = dict(tasks.model.named_parameters())
    (first, model), *others = models.items()
    for other, theirs in others:
        for what in ("num_labels", "problem_type"):
            one, two = (getattr(found.config, what, None) for found in (model, theirs))
            if one != two:
                raise ValueError(
                    f"{what} is {show(one)} in task {first!r} and {show(two)} in {other!r}, so their heads cannot be "
                    "merged; choose one, head=..."
                )
    parameters = dict(model.named_parameters())
    if wrong := [name for name in sorted(names) if parameters[name].shape != base[name].shape]:
        raise ValueError(
            f"{wrong[0]} of task {first!r} has another shape than in the base, so the heads have no common start; "
            "choose one, head=..."
        )


def _new_config(models: Mapping[str, PreTrainedModel], rank: int | None) -> UniPELTConfig:
    """Return the configuration of the new task. Raises `ValueError` for a rank that is not valid."""
    config = injection_of(next(iter(models.values()))).config
    if config.lora is None:
        if rank is not None:
            raise ValueError("rank is of LoRA, and these tasks have none; leave it out")
        return config
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= 65536):
        raise ValueError(f"rank must be a whole number above 0, not {show(rank)}")
    changed = replace(config.lora, rank=config.lora.rank if rank is None else rank, start="zero")
    return replace(config, lora=changed)


def _parts(model: PreTrainedModel) -> dict[Key, OwnPart]:
    return {(own.room, own.cross, own.part.name): own for own in own_parts(model)}


def _combine(
    models: Sequence[PreTrainedModel],
    begun: PreTrainedModel | None,
    config: UniPELTConfig,
    merge: VectorMerge,
    generator: torch.Generator,
) -> _Combination:
    """Return the parts of the new set, without a head."""
    found = [_parts(model) for model in models]
    first = None if begun is None else _parts(begun)
    values: dict[Key, Tensor] = {}
    total = lost = 0.0
    sizes = torch.tensor([abs(weight) for weight in merge.weights], dtype=torch.float64)
    for key, own in found[0].items():
        room, cross, name = key
        tensors = [_plain(parts[key].tensor) for parts in found]
        if own.part.kind == "lora":
            term, _, factor = name.rpartition(".")
            if factor != "A":
                continue
            updates = [_update(parts, room, cross, term, model) for parts, model in zip(found, models, strict=True)]
            down, up, size, left = _factors(merge(updates, generator), config)
            values[room, cross, f"{term}.A"], values[room, cross, f"{term}.B"] = down, up
            total, lost = total + size, lost + left
        elif own.part.kind == "gate":
            shares = (sizes / sizes.sum()).tolist()
            values[key] = torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(0)
        elif first is None:
            values[key] = merge(tensors, generator)
        else:
            origin = _plain(first[key].tensor)
            values[key] = origin + merge([tensor - origin for tensor in tensors], generator)
    kept = None if config.lora is None else 1 - lost / total if total else 1.0
    return _Combination(config, values, {}, kept)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor's values on the CPU, in at least float32."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def _scale(config: UniPELTConfig) -> float:
    assert config.lora is not None
    return config.lora.gated_scale if config.lora.gate else config.lora.scale


def _update(parts: Mapping[Key, OwnPart], room: str, cross: bool, term: str, model: PreTrainedModel) -> Tensor:
    """Return the update of a low-rank term, `s B A` or `s (B A - B0 A0)`, (O, I)."""
    names = ("A", "B", "A0", "B0")
    factors = {name: _plain(parts[key].tensor) for name in names if (key := (room, cross, f"{term}.{name}")) in parts}
    low, high = low_rank_factors(factors)
    return _scale(injection_of(model).config) * high @ low


def _factors(update: Tensor, config: UniPELTConfig) -> tuple[Tensor, Tensor, float, float]:
    """Write an update as a product `s B A`, by its largest singular values.

    Args:
        update: (O, I).
        config: the configuration with the rank r and the scale s.

    Returns:
        A (k, I), with k the number of directions of the update, at most r; B (O, r), with zeros behind them; the
        squared size of the update, and the squared size of the part that the rank leaves out.
    """
    assert config.lora is not None
    rank = config.lora.rank
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    count = min(rank, int((values > _NEGLIGIBLE * values[0]).sum()))
    root = (values[:count] / _scale(config)).sqrt()
    up = update.new_zeros(update.shape[0], rank)
    up[:, :count] = left[:, :count] * root
    squares = values.double().square()
    return root[:, None] * right[:count], up, squares.sum().item(), squares[rank:].sum().item()


def _merge_heads(
    tasks: Tasks,
    models: Mapping[str, PreTrainedModel],
    begun: PreTrainedModel | None,
    head: str | None,
    merge: VectorMerge,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the parameters of the new head by name."""
    names = injection_of(next(iter(models.values()))).head
    if head is not None:
        return {name: models[head].get_parameter(name) for name in sorted(names)}
    merged = {}
    for name in sorted(names):
        origin = _plain((tasks.model if begun is None else begun).get_parameter(name))
        trained = [_plain(model.get_parameter(name)) for model in models.values()]
        merged[name] = origin + merge([tensor - origin for tensor in trained], generator)
    return merged


def _build(tasks: Tasks, labelled: PreTrainedModel, found: _Combination, seed: int) -> PreTrainedModel:
    """Return a model of the base with the new set and head, and the labels of another model."""
    injection = injection_of(labelled)
    model = tasks._share(injection.head)
    theirs: Any = labelled.config
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not change
        torch.manual_seed(seed)
        relabel(model, getattr(theirs, "num_labels", None), theirs.problem_type, theirs.id2label)
        inject_as(model, found.config, deployed=injection.deployed, head=injection.head)
    bind(model)
    for key, own in _parts(model).items():
        value = found.values[key]
        own.tensor[: len(value)].copy_(value)  # A may have fewer rows; the others keep their random start
    for name, value in found.head.items():
        model.get_parameter(name).copy_(value)
    return model
