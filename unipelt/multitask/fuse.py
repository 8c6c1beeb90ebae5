"""Compose the trained submodules of several tasks by learned attention (AdapterFusion)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from unipelt.checkpoint.bind import bind
from unipelt.config.methods import UniPELTConfig
from unipelt.config.mixture import MOST_EXPERTS, MixtureConfig
from unipelt.files.messages import show
from unipelt.hosts.locate import InjectionError
from unipelt.injection.inject import inject_as
from unipelt.injection.state import injection_of
from unipelt.multitask.combine import check_same_method
from unipelt.multitask.heads import relabel
from unipelt.multitask.tasks import Tasks
from unipelt.submodules.mixture import EXPERTS
from unipelt.submodules.room import own_parts


def fuse_tasks(
    tasks: Tasks,
    name: str,
    sources: Sequence[str],
    *,
    gate: bool = False,
    num_labels: int | None = None,
    problem_type: str | None = None,
) -> PreTrainedModel:
    """Add a task that attends to the trained submodules of other tasks (AdapterFusion; Pfeiffer et al., 2021).

        tasks.load("sst2", "runs/sst2/model")
        tasks.load("mnli", "runs/mnli/model")
        model = unipelt.fuse_tasks(tasks, "rte", ["sst2", "mnli"])

    At each place, the new task has copies of the sources' submodules f_1 … f_E, which are frozen, and three matrices
    Q, K and V, which train with the head (section 3.2 of that paper). For a token with the input x_t of the submodules

        y_t + V sum_e p_e f_e(x, y)_t,  p = softmax_e((Q x_t) . (K f_e(x, y)_t))

    These are O I + 2 O² parameters for each place, for I inputs and O outputs: 3 D² for each adapter. V starts as the
    identity. The paper's values are the outputs of adapters with their residual; here they are the terms alone.

    Args:
        tasks: the tasks; the new one is added to them. The others do not change, and may be deleted.
        name: the name of the new task.
        sources: names of two or more trained tasks of one method, which adds one kind of submodule without gates (an
            adapter, LoRA, Houlsby, …) and no prefix or prompt. Their heads are not used.
        gate: whether a gate scales each composition.
        num_labels: as in `Tasks.add`.
        problem_type: as in `Tasks.add`.

    Returns:
        The model of the new task, `tasks[name]`, to be trained. It can be saved and loaded as any other.

    Raises:
        KeyError: there is no such task.
        ValueError: an argument is not valid, or the sources differ in their method.
        InjectionError: the sources' method cannot be fused. After any error the tasks are unchanged.
    """
    if not isinstance(tasks, Tasks):
        raise ValueError(f"fuse_tasks takes unipelt.Tasks, not {type(tasks).__name__}")
    tasks._check_new(name)
    if isinstance(sources, str) or not 2 <= len(sources) <= MOST_EXPERTS or len(set(sources)) != len(sources):
        raise ValueError(
            f"sources must be a list of 2 to {MOST_EXPERTS} names of tasks, none of them twice, not {show(sources)}"
        )
    models = {source: tasks[source] for source in sources}
    check_same_method(models)
    if any(own.part.name.startswith("shared.") for own in own_parts(models[sources[0]])):
        raise InjectionError(f"task {sources[0]!r} cannot be fused: its layers share parameters, one set for each task")
    config = _fused(injection_of(models[sources[0]]).config, sources[0], len(sources), gate)
    model = tasks._share()
    if num_labels is not None or problem_type is not None:
        relabel(model, num_labels, problem_type)
    inject_as(model, config, deployed=False, head=None)
    bind(model)
    trained = [{_key(own): own for own in own_parts(models[source])} for source in sources]
    with torch.no_grad():
        for own in own_parts(model):
            start, found, rest = own.part.name.partition(f".{EXPERTS}.")
            if found:
                index, _, parameter = rest.partition(".")
                names = (f"{start}.{parameter}", f"{start}.function.{parameter}")
                keys = [(own.room, own.cross, plain) for plain in names]
                own.tensor.copy_(next(trained[int(index)][key].tensor for key in keys if key in trained[int(index)]))
    return tasks._keep(name, model)


def _key(own: Any) -> tuple[str, bool, str]:
    return own.room, own.cross, own.part.name


def _fused(config: UniPELTConfig, source: str, count: int, gate: bool) -> UniPELTConfig:
    """Return the configuration of the new task. Raises `InjectionError` if the method cannot be fused."""
    parts = {"adapter": config.adapter, "lora": config.lora, **{part.name: part for part in config.more}}
    kinds = [name for name, part in parts.items() if part is not None]
    problem = ""
    if config.prefix is not None or config.prompt is not None:
        problem = "a prefix or a prompt, which is no function of a token"
    elif len(kinds) != 1:
        problem = f"several kinds of submodules, {', '.join(kinds)}"
    elif getattr(parts[kinds[0]], "gate", False):
        problem = "gates, which attention would have to repeat for each task; train it with gate: false"
    elif getattr(parts[kinds[0]], "mixture", None) is not None:
        problem = "a mixture; only a mixture with the router random becomes one submodule (unipelt.merge_experts)"
    elif getattr(parts[kinds[0]], "start", "zero") == "pissa":
        problem = "LoRA that starts at a part of the weight"
    if problem:
        raise InjectionError(
            f"task {source!r} cannot be fused: attention is over submodules of one kind without gates, and it has "
            f"{problem}"
        )
    mixture = MixtureConfig(experts=count, router="attention")
    changed: Any = replace(parts[kinds[0]], gate=gate, mixture=mixture)  # type: ignore[type-var]
    if kinds[0] in ("adapter", "lora"):
        return replace(config, **{kinds[0]: changed})
    return replace(config, more=(changed,))
