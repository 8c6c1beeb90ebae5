"""One pass of a frozen base over rows of several tasks: what they share is computed once, what is their own by rows.

Each task has a model of its own over the same base (`unipelt.multitask.tasks`), whose modules carry its submodules. The
shared base is one model more: at each place where a task has submodules it hands the task's rows, which stand together,
to the hook of that task's own module, and puts the results together again. So the equations are written once.

Shapes: B rows of all tasks, H heads, T queries, S keys, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from unipelt.hosts.attention_interface import ATTENTION, attention_function, redirect
from unipelt.injection.attention_hooks import attend, enter_attention
from unipelt.submodules.adapter import adapt_norm, adapt_output
from unipelt.submodules.forward_pass import enter_shared, leave_shared
from unipelt.submodules.lora import LoRA, add_low_rank
from unipelt.submodules.prefix import enter_stack, leave_stack
from unipelt.submodules.prompt import Prompt
from unipelt.submodules.term import Term, add_terms, add_to_input, hand_on

BY_ROWS = "unipelt_by_rows"
INPUTS = (add_to_input, hand_on)
OUTPUTS = (add_low_rank, add_terms, adapt_norm, adapt_output)
PASSES = (enter_stack, enter_shared)
ENDS = (leave_stack, leave_shared)


@dataclass
class Layout:
    """Which rows of a pass are whose: `counts[i]` rows of the task `names[i]`, one task after the other."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    _masks: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of each task, of (B, ...) or, where a layer has put the tokens of all texts in one row, (B T, ...).

        Raises `RuntimeError` for rows that belong to nobody.
        """
        times, rest = divmod(len(tensor), sum(self.counts))
        if rest or not times:
            raise RuntimeError(
                f"a layer of the base was given {len(tensor)} rows in a batch of {sum(self.counts)}, so they cannot be "
                "told apart by task; run one task at a time"
            )
        return tensor.split([count * times for count in self.counts])

    def split_mask(self, mask: Tensor | None) -> Sequence[Tensor | None]:
        """The same of a mask (B or 1, ...), once a pass: what layers derive from a mask is kept with it."""
        if mask is None or not isinstance(mask, Tensor) or len(mask) == 1:
            return [mask] * len(self.names)
        if id(mask) not in self._masks:
            self._masks[id(mask)] = mask, self.split(mask)
        return self._masks[id(mask)][1]


class Layouts:
    """The layout of the pass that is under way; each thread has its own."""

    def __init__(self) -> None:
        self._layouts: dict[int, Layout] = {}

    @contextmanager
    def hold(self, layout: Layout) -> Iterator[None]:
        """Inside, this thread's passes of the base are of these rows."""
        self._layouts[get_ident()] = layout
        try:
            yield
        finally:
            del self._layouts[get_ident()]

    def here(self) -> Layout:
        """This thread's."""
        return self._layouts[get_ident()]

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        return Layouts, ()  # a copy is in no pass


@dataclass
class Place:
    """What a module of the shared base remembers.

    Attributes:
        modules: the one in its place in each task's model, by task.
        layouts: tell whose rows a pass has.
        inputs, outputs: hooks of those modules, by task.
        own: tasks whose module has parameters of its own, and so is called instead.
        config: its own configuration, where a prefix had to put another in its place.
    """

    modules: Mapping[str, Any]
    layouts: Layouts
    inputs: Mapping[str, Sequence[Callable[..., Any]]]
    outputs: Mapping[str, Sequence[Callable[..., Any]]]
    own: frozenset[str]
    config: PreTrainedConfig | None = None


def find_unmixable(base: nn.Module, model: nn.Module) -> str | None:
    """Why rows of this task's model cannot stand in one batch with another task's, or None.

    Args:
        base: without submodules.
        model: the same of the task.
    """
    for module in model.modules():
        if isinstance(module, Prompt):
            return "its prompt makes its texts longer, and a batch has texts of one length"
        if isinstance(module, (LoRA, Term)) and module.skips_ungated_calls:
            return (
                "its attention also projects relative positions, one table for all rows of a batch, and what is added "
                "to that projection is the task's own"
            )
        site = getattr(module, "unipelt_site", None)
        if site is not None and site.inserts:
            return f"{type(module).__name__} takes a prefix as a longer text, and a batch has texts of one length"
    for path, module in base.named_modules():
        if any(module.children()) and _differs(module, model.get_submodule(path)):
            return f"{path} has parameters of the task's own beside its parts"
    return None


def seat(base: nn.Module, models: Mapping[str, nn.Module], layouts: Layouts) -> None:
    """Put hooks into a shared base, so that it leads every row through the submodules of its task.

    Args:
        base: without submodules.
        models: the same base of each task, with its submodules; none of them unmixable.
        layouts: tell whose rows a pass has.
    """
    host: Any
    for path, host in list(base.named_modules()):
        modules: dict[str, Any] = {task: model.get_submodule(path) for task, model in models.items()}
        before = {task: list(own._forward_pre_hooks.values()) for task, own in modules.items()}
        after = {task: list(own._forward_hooks.values()) for task, own in modules.items()}
        place = Place(
            modules,
            layouts,
            {task: [hook for hook in hooks if hook in INPUTS] for task, hooks in before.items()},
            {task: [hook for hook in hooks if hook in OUTPUTS] for task, hooks in after.items()},
            frozenset(task for task, own in modules.items() if _differs(host, own)),
        )
        sites = [own.unipelt_site for own in modules.values() if hasattr(own, "unipelt_site")]
        owns = any(hook in PASSES for hooks in before.values() for hook in hooks)
        if not (any(place.inputs.values()) or any(place.outputs.values()) or place.own or sites or owns):
            continue
        host.unipelt_place = place
        if owns:
            host.register_forward_pre_hook(_enter_owners)
            host.register_forward_hook(_leave_owners, always_call=True)
        if sites:
            host.register_forward_pre_hook(_enter_attentions, with_kwargs=True)
        if any(site.config is not None for site in sites):
            place.config = redirect(host, BY_ROWS)
        if any(place.inputs.values()):
            host.register_forward_pre_hook(_split_input)
        if any(place.outputs.values()) or place.own:
            host.register_forward_hook(_split_output)
    for module in base.modules():
        if getattr(module, "chunk_size_feed_forward", None):
            module.chunk_size_feed_forward = 0  # type: ignore[assignment] # a gate averages over all of a text


def _differs(host: nn.Module, own: nn.Module) -> bool:
    return any(own._parameters.get(name) is not parameter for name, parameter in host._parameters.items())


def _enter_owners(owner: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of what owns a stack's layers."""
    _call_owners(owner, PASSES, "_forward_pre_hooks", args)


def _leave_owners(owner: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of it, called after a failure too."""
    _call_owners(owner, ENDS, "_forward_hooks", args, output)


def _call_owners(owner: Any, hooks: Sequence[Callable[..., Any]], where: str, *given: Any) -> None:
    place: Place = owner.unipelt_place
    for task in place.layouts.here().names:
        own = place.modules[task]
        for hook in getattr(own, where).values():
            if hook in hooks:
                hook(own, *given)


def _enter_attentions(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention: every task's gates, from its own rows."""
    place: Place = attention.unipelt_place
    layout = place.layouts.here()
    for index, task in enumerate(layout.names):
        own = place.modules[task]
        site = getattr(own, "unipelt_site", None)
        if site is None:
            continue
        given = {
            site.hidden.name: layout.split(site.hidden.read(args, kwargs))[index],
            site.mask.name: layout.split_mask(site.mask.read(args, kwargs))[index],
        }
        enter_attention(own, (), given)


def _split_input(host: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of a projection: what tasks do with what it is given."""
    place: Place = host.unipelt_place
    layout = place.layouts.here()
    rows, changed = list(layout.split(args[0])), False
    for index, task in enumerate(layout.names):
        for hook in place.inputs[task] if task not in place.own else ():
            result = hook(place.modules[task], (rows[index],))
            if result is not None:
                rows[index], changed = result[0], True
    return (torch.cat(rows), *args[1:]) if changed else None


def _split_output(host: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook of a projection, norm or feed-forward network: what tasks do with what it gives."""
    place: Place = host.unipelt_place
    layout = place.layouts.here()
    if not any(place.outputs[task] or task in place.own for task in layout.names):
        return None
    given = layout.split(args[0]) if len(args) == 1 else (None,) * len(layout.names)
    rows = list(layout.split(output))
    for index, task in enumerate(layout.names):
        own = place.modules[task]
        if task in place.own:
            rows[index] = own(given[index])  # with its own hooks
            continue
        for hook in place.outputs[task]:
            rows[index] = hook(own, (given[index],), rows[index])
    return torch.cat(rows)


def attend_by_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of each task's rows over its own prefix, or none: prefixes of different lengths need no padding.

    Arguments as `unipelt.injection.attention_hooks.attend` takes them; gives the output (B, T, H, d), and no weights.
    """
    place: Place = module.unipelt_place
    layout = place.layouts.here()
    bias = layout.split_mask(kwargs.get("position_bias"))
    parts = zip(*(layout.split(tensor) for tensor in (query, key, value)), strict=True)
    outputs = []
    for index, (task, part) in enumerate(zip(layout.names, parts, strict=True)):
        own = place.modules[task]
        given = kwargs if bias[index] is None else {**kwargs, "position_bias": bias[index]}
        mask = layout.split_mask(attention_mask)[index]
        if own.config._attn_implementation == ATTENTION:
            outputs.append(attend(own, part[0], part[1], part[2], mask, **given)[0])
        else:
            outputs.append(attention_function(own, own.config)[1](own, *part, mask, **given)[0])
    return torch.cat(outputs), None


AttentionInterface.register(BY_ROWS, attend_by_rows)
