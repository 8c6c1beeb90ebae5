"""Several tasks on one frozen base: named sets of submodules, each with its own method, gates and head.

Every task has its own model: an ordinary injected model that shares the pretrained parameters of the base (the same
objects). A pass of one task is a pass of that model. A batch of several tasks goes through the base once
(`unipelt.multitask.mixed_batch`); then each task's head computes the task's rows.

Shapes: B rows of a batch, C labels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt.api import inject
from unipelt.checkpoint.load import load
from unipelt.checkpoint.manifest import CheckpointError, read_checkpoint
from unipelt.checkpoint.save import save
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import resolve
from unipelt.files.messages import show
from unipelt.hosts.locate import InjectionError
from unipelt.injection.parameters import head_names, kept_names
from unipelt.injection.state import injection_of
from unipelt.multitask.batch_rows import count_rows, gather, merge, sort_rows, split_batch, split_output
from unipelt.multitask.checks import changes_base, check_bare, check_mixed
from unipelt.multitask.generate import check_generation, generate, generate_rows
from unipelt.multitask.heads import Answer, capture_base_inputs, fit_labels, relabel, saved_labels
from unipelt.multitask.mixed_batch import find_unmixable, furnish, route_own
from unipelt.submodules.forward_pass import Passes, SetRows
from unipelt.submodules.room import own_buffers


class Tasks(nn.Module):
    """Named sets of submodules on one base model in memory; each task has its own gates and head.

        tasks = unipelt.Tasks(model)
        tasks.add("sst2", "unipelt-apl")
        tasks.add("mnli", "lora", num_labels=3)
        tasks.load("rte", "runs/rte/model")
        tasks["mnli"](**batch)  # one task: an ordinary injected model
        tasks(**batch, tasks=["sst2", "rte", "sst2"])  # row by row, in one pass of the base

    The base is frozen and its numbers never change; `model` itself is not injected and can be called at any time. A
    task needs memory for its own parameters and head, without a copy of the base. The parameters in
    `tasks.parameters()` that require gradients are those of all tasks. `list(tasks)` gives the names, in the order in
    which they were added.

    Attributes:
        model: the base.
        current: the task of a call without `tasks`; None at first (`use`).
    """

    accepts_loss_kwargs = False  # or Trainer divides the loss by the number of tokens, but labels belong to texts

    def __init__(self, model: PreTrainedModel) -> None:
        """Freeze a model without submodules. Raises `InjectionError` for another model."""
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            remedy = (
                "; save (unipelt.save) what unipelt.from_peft(model) gives, and load it as a task"
                if hasattr(model, "get_base_model")
                else ""
            )
            raise InjectionError(f"Tasks takes a PreTrainedModel of transformers, not {type(model).__name__}{remedy}")
        check_bare(model)
        self.model = model
        self.current: str | None = None
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._passes: Passes | None = None
        self._unmixable: dict[str, str | None] = {}
        self.shared: Any = None  # the base with the sets of all tasks; built for the first batch of several tasks
        self.register_state_dict_post_hook(_drop_base)
        self.register_load_state_dict_post_hook(_miss_no_base)
        model.requires_grad_(False)
        self.train(model.training)

    def add(
        self,
        name: str,
        config: str | Path | Mapping[str, Any] | UniPELTConfig = "unipelt-apl",
        *,
        num_labels: int | None = None,
        problem_type: str | None = None,
    ) -> PreTrainedModel:
        """Add a new task for training: submodules, and a head that starts as a copy of the base model's head.

        Args:
            name: a name of letters, digits, `_` and `-`.
            config: a method, as for `unipelt.inject`; it must add submodules and must not change the base.
            num_labels: the number of labels of the head, if it differs from the base model's; such a head starts with
                the random initial values of its class.
            problem_type: the problem type, as in a configuration of Transformers; it sets the loss of the head.

        Returns:
            The task's model, `tasks[name]`.

        Raises:
            ValueError: the name is taken or not valid, or the problem type is not valid.
            ConfigError: the configuration is not valid.
            InjectionError: the method changes the base, or the model cannot take the method or the number of labels.
                After any error the tasks are unchanged.
        """
        self._check_new(name)
        config = resolve(config)
        if reason := changes_base(config):
            raise InjectionError(f"task {name!r} cannot share its base with others: {reason}")
        model = self._share()
        if num_labels is not None or problem_type is not None:
            relabel(model, num_labels, problem_type)
        return self._keep(name, inject(model, config))

    def load(self, name: str, folder: str | Path) -> PreTrainedModel:
        """Add a task from an ordinary checkpoint, which `save`, `unipelt.save` or a Trainer wrote.

        Returns:
            The task's model, `tasks[name]`.

        Raises:
            ValueError: the name is taken or not valid.
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: the checkpoint is damaged, belongs to another base, is folded, or holds a changed base.
                After any error the tasks are unchanged.
        """
        self._check_new(name)
        manifest, tensors = read_checkpoint(Path(folder))
        reason = changes_base(manifest["unipelt"])
        if manifest["unfrozen"]:
            reason = (
                f"it holds {show(manifest['unfrozen'][0])} of the base, which trained; load it as a model of its own"
            )
        if manifest["folded"] is not None:
            reason = "it is folded: its terms are in the base's weights; load what it was folded from"
        if reason:
            raise CheckpointError(f"the checkpoint in {folder} cannot share its base with others: {reason}")
        model = self._share(manifest["head"])
        if manifest["head"]:
            try:
                labels = saved_labels(manifest["base"]["config"], tensors)
                relabel(model, labels.count, labels.problem_type, labels.names)
            except ValueError as error:
                raise CheckpointError(f"the checkpoint in {folder} does not fit this model: {error}") from error
        return self._keep(name, load(model, folder))

    def save(self, name: str, folder: str | Path, *, deploy: bool = False) -> Path:
        """Write one task as an ordinary checkpoint, which `unipelt.from_pretrained` reads; see `unipelt.save`."""
        return save(self[name], folder, deploy=deploy)

    def delete(self, name: str) -> None:
        """Delete a task and free its parameters. Raises `KeyError` for an unknown name."""
        self._find(name)
        del self._modules[_PREFIX + name]
        self._forget_shared()
        if self.current == name:
            self.current = None

    def remove(self) -> PreTrainedModel:
        """Delete all tasks, and return the base model with its original values (bit for bit) and training flags."""
        for name in list(self):
            self.delete(name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return self.model

    def use(self, name: str) -> ExitStack:
        """Make a task the current one, for calls without `tasks`: permanently, or for a `with` block.

        No parameter is copied or changed. Threads that serve different tasks call `tasks[name]` instead. Raises
        `KeyError` for an unknown name.
        """
        before = self.current
        self._find(name)
        self.current = name
        leaving = ExitStack()
        leaving.callback(self._return_to, before)
        return leaving

    def __getitem__(self, name: str) -> PreTrainedModel:
        """Return a task's model. Raises `KeyError` for an unknown name."""
        return self._find(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _PREFIX + name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter([key.removeprefix(_PREFIX) for key in self._modules if key.startswith(_PREFIX)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def forward(self, tasks: str | Sequence[str | int] | Tensor | None = None, **batch: Any) -> Any:
        """Compute a batch of one task or, row by row, of several tasks.

        Args:
            tasks: the task of every row, by name or by index in `list(tasks)`, as a list of B or a tensor (B,) (a
                tensor on a GPU is copied to the CPU, once in a pass); or one name for all rows. By default all rows
                belong to the current task, and the output is that of its model.
            batch: the model's arguments by keyword; a tensor of length B has one row for each text. Class labels may be
                floating-point numbers, and regression labels may be integers, so that both fit into one tensor.

        Returns:
            A `MixedOutput`.

        Raises:
            ValueError: `tasks` does not fit the batch or is not valid, or the batch needs a feature that a batch of
                several tasks does not have (a cache, attention weights, gradient checkpointing).
            KeyError: there is no such task.
            InjectionError: a task's rows cannot be in one batch with other tasks' rows.
        """
        if tasks is None:
            return self._current()(**batch)
        rows, batch, back = self._sort(tasks, batch)
        parts = split_batch(batch, count_rows(batch), {name: len(own) for name, own in rows.items()})
        for name, part in parts.items():
            if "labels" in part:
                part["labels"] = fit_labels(self[name], part["labels"])
        outputs = {name: self[name](**part) for name, part in parts.items()} if len(parts) == 1 else self._mix(parts)
        return gather(outputs, rows, back)

    def generate(self, tasks: str | Sequence[str | int] | Tensor | None = None, **batch: Any) -> Tensor:
        """Generate tokens for a batch of one task or, row by row, of several tasks, in one generation with one cache.

            tasks.generate(tasks=["formal", "short"], **tokenizer(texts, return_tensors="pt", padding=True))

        Each row gets the tokens that `tasks[name].generate` gives it in the same batch, with greedy search and with
        beams. Sampling draws other random numbers.

        Args:
            tasks: the task of every row, as for a call.
            batch: the arguments of `generate` of Transformers by keyword; a tensor of length B has one row for each
                text.

        Returns:
            Token ids, (B or B * num_return_sequences, T), in the order of the batch.

        Raises:
            ValueError, KeyError, InjectionError: as for a call; or an argument is not possible for several tasks.
        """
        if tasks is None:
            return generate(self._current(), **batch)
        rows, batch, back = self._sort(tasks, batch)
        if len(rows) == 1:
            return generate(self[next(iter(rows))], **batch)
        check_generation(self.model, batch)
        shared, passes = self._shared_for(rows)
        shared.generation_config = self.model.generation_config
        return generate_rows(shared, passes, {name: len(own) for name, own in rows.items()}, batch, back)

    def extra_repr(self) -> str:
        """Return the names of the tasks, for `print(tasks)`."""
        return self._told()

    def _current(self) -> PreTrainedModel:
        if self.current is None:
            raise ValueError(
                f"say which tasks the rows are of, tasks=[...], or call use(name); there are {self._told()}"
            )
        return self[self.current]

    def _sort(self, tasks: Any, batch: Mapping[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any], Tensor | None]:
        """Return `sort_rows` for tasks in any form; raise as `forward`."""
        size = count_rows(batch)
        given = self._resolve(tasks, size)
        if len(given) != size:
            raise ValueError(f"tasks names {len(given)} rows, and the batch has {size}")
        return sort_rows(given, list(self), batch)

    def _mix(self, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return each task's output for its rows, with one pass of the base for all rows."""
        models = {name: self[name] for name in parts}
        check_mixed(next(iter(models.values())), next(iter(parts.values())))
        shared, passes = self._shared_for(parts)
        asked = {name: capture_base_inputs(models[name], part) for name, part in parts.items()}
        counts = [count_rows(question) for question in asked.values()]
        question = merge(list(asked.values()), counts)
        with passes.rows(SetRows(tuple(parts), tuple(counts))):
            whole = shared.base_model(**question)
        pieces = dict(zip(parts, split_output(whole, counts), strict=True))
        return {name: Answer.of(models[name], part, pieces[name]) for name, part in parts.items()}

    def _shared_for(self, names: Iterable[str]) -> tuple[Any, Passes]:
        """Return the base with the sets of all tasks, and its passes; raise `InjectionError` if a task cannot mix."""
        if self.shared is None:
            shared, base = self._share(), self.model.base_model
            self._unmixable = {name: find_unmixable(base, self[name].base_model) for name in self}
            mixable = {name: self[name].base_model for name in self if self._unmixable[name] is None}
            self._passes = furnish(shared.base_model, mixable)
            route_own(shared, {name: self[name] for name in mixable}, self._passes)
            self.shared = shared.train(self.training)
        for name in names:
            if reason := self._unmixable[name]:
                raise InjectionError(f"task {name!r} cannot share a batch with others: {reason}; run it by itself")
        assert self._passes is not None
        return self.shared, self._passes

    def _share(self, head: Iterable[str] = ()) -> PreTrainedModel:
        """Return a model with its own modules and head, and with the other parameters of the base.

        Parameters that a checkpoint names as its head also belong to the head, even if they belong to the base in this
        model (for example a pooler that the base's checkpoint holds now).
        """
        check_bare(self.model)
        self.model.requires_grad_(False)
        memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
        model = copy.deepcopy(self.model, memo)
        head = head_names(model) | set(head)
        own = {
            id(parameter): nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in model.named_parameters()
            if name in head and parameter.is_floating_point()
        }
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = own.get(id(parameter), parameter)
        return model

    def _keep(self, name: str, model: PreTrainedModel) -> PreTrainedModel:
        base = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in base for parameter in model.parameters() if parameter.requires_grad):
            raise InjectionError(f"task {name!r} would train parameters of the base")
        injection_of(model).shares = True
        self._forget_shared()
        self._modules[_PREFIX + name] = model.train(self.training)
        return model

    def _forget_shared(self) -> None:
        self._modules.pop("shared", None)  # so that a later task is registered before `shared`
        self.shared = None

    def _find(self, name: str) -> PreTrainedModel:
        if name not in self:
            raise KeyError(f"there is no task {show(name)}; there are {self._told()}")
        model: Any = self._modules[_PREFIX + name]
        return model

    def _told(self) -> str:
        return ", ".join(self) or "none yet"

    def _return_to(self, name: str | None) -> None:
        self.current = name if name is None or name in self else None

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"a task's name has letters, digits, _ and -, not {show(name)}")
        if name in self:
            raise ValueError(f"there is a task {name!r} already; delete it first, or take another name")

    def _resolve(self, tasks: Any, size: int) -> list[str]:
        """Return the task's name of each row."""
        if isinstance(tasks, str):
            tasks = [tasks] * size
        if isinstance(tasks, Tensor):
            if tasks.dim() != 1 or tasks.is_floating_point() or tasks.dtype == torch.bool:
                raise ValueError(
                    f"tasks as a tensor are whole numbers, one a row, not {tasks.dtype} of shape {tuple(tasks.shape)}"
                )
            tasks = tasks.tolist()
        names, given = list(self), []
        for task in tasks:
            if isinstance(task, int) and not isinstance(task, bool):
                if not 0 <= task < len(names):
                    raise KeyError(f"there is no task number {task}; there are {len(names)}: {self._told()}")
                task = names[task]
            self._find(task)
            given.append(task)
        return given


_PREFIX = "task_"  # keeps tasks' names apart from the children `model` and `shared`


def _own_names(tasks: nn.Module) -> set[str]:
    """Return the names of a state dict's entries: the tasks' own parameters and buffers, without the base."""
    assert isinstance(tasks, Tasks)
    return {f"{_PREFIX}{name}.{own}" for name in tasks for own in (*kept_names(tasks[name]), *own_buffers(tasks[name]))}


def _drop_base(tasks: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove the base from a state dict, so that a Trainer's checkpoints do not hold the base (a state-dict hook)."""
    kept = {prefix + name for name in _own_names(tasks)}
    for key in [key for key in state if key.startswith(prefix) and key not in kept]:
        del state[key]


def _miss_no_base(tasks: nn.Module, incompatible: Any) -> None:
    """Remove the base from the missing keys after a state dict was loaded (a load hook)."""
    own = _own_names(tasks)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key in own]
