"""PEFT's tuner of type `UNIPELT`: add sets, switch between sets, and remove them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unipelt.bridges.peft_socket.heads import (
    copies,
    module_paths,
    names_to_save,
    plain_name,
    present_names,
    replace_module,
    wrappers,
)
from unipelt.bridges.peft_socket.register import PREFIX, require_peft
from unipelt.bridges.peft_socket.room import PeftRoom, check_single, furnish
from unipelt.bridges.peft_socket.rows import put_back, row_by_row, sort_given
from unipelt.checkpoint.peft_form import find_uncarried
from unipelt.config.methods import UniPELTConfig
from unipelt.gates.merge import fold_constants
from unipelt.hosts.locate import InjectionError, find_stacks
from unipelt.hosts.quantised import find_obstacle
from unipelt.injection.attach import build, build_prompt, install, install_prompt
from unipelt.injection.hooks import take_off
from unipelt.injection.inject import REPLACED, model_inside
from unipelt.injection.parameters import head_names
from unipelt.injection.precision import widen, widen_input
from unipelt.injection.state import Injection, injection_inside, is_injected
from unipelt.injection.wire import detach, rewire_layer
from unipelt.submodules.lora import LoRA
from unipelt.submodules.outputs import matrix_of
from unipelt.submodules.room import DEFAULT, ROOM, SubmoduleSet, placed_terms, rooms

require_peft()
from peft.functional import delete_adapter  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402
from peft.utils.other import set_additional_trainable_modules  # noqa: E402

RESERVED = {PREFIX, "original_module", "modules_to_save", "token_adapter", "base_layer", "base_model"}


class UniPELTModel(BaseTuner):
    """PEFT's tuner of type `UNIPELT`: it holds the named sets of a model's layers."""

    prefix = PREFIX
    tuner_layer_cls = PeftRoom
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own form

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
        **further: Any,
    ) -> None:
        """Add a set under a name, or take over the set of an injected model.

        Raises:
            InjectionError: the model is not a model of Transformers, or cannot carry the method.
            ValueError: PEFT cannot hold the method, or the name is not valid for a set.
        """
        chosen: Any = self.peft_config[adapter_name]
        config: UniPELTConfig = chosen.unipelt
        if not isinstance(model, PreTrainedModel):
            raise InjectionError(
                f"unipelt takes a PreTrainedModel of transformers, not {type(model).__name__}{model_inside(model)}"
            )
        if problem := find_uncarried(config):
            raise ValueError(problem)
        first = not any(isinstance(room, PeftRoom) for _, room in rooms(model))
        if not first:
            _check_unfolded(model, "add_adapter")
        flags = [] if first else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        adopted = first and is_injected(model)
        if adopted:
            flags = _adopt(model, chosen, adapter_name)  # `requires_grad` is kept
        else:
            _add(model, chosen, adapter_name, first=first, device="meta" if low_cpu_mem_usage else None)
        for _, room in rooms(model):
            furnish(room, model.device)
        self.set_adapter(self.active_adapters, inference_mode=chosen.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=chosen,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        injection = injection_inside(model)
        if adopted:
            _swap_heads(model, injection, adapter_name)
            injection.originals = {}
        elif config.dtype == "float32" and chosen.head:
            _widen_heads(model, adapter_name, chosen.head)
        injection.head = present_names(model, {plain_name(name) for name in injection.head})
        # a new active set trains, and the other sets do not: only other parameters keep their flags
        switched = set() if adopted or adapter_name not in self.active_adapters else _ids_in_sets(model)
        for parameter, flag in flags:
            if id(parameter) not in switched:
                parameter.requires_grad_(flag)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("unipelt replaces no module of its host")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: trained parameters already have the type that the method sets (float32, or `dtype: base`)."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make a set the active one, which computes and trains. Raises `ValueError` for several sets."""
        names = check_single(adapter_name)
        super().set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = adapter_name
        if names and names[0] in self.peft_config:
            chosen: Any = self.peft_config[names[0]]
            injection = injection_inside(self.model)
            injection.config, injection.deployed = chosen.unipelt, chosen.deployed

    def disable_adapter_layers(self) -> None:
        """Switch off all sets, so that the base computes alone.

        Raises `ValueError` for a set that was folded into the base's weights.
        """
        _check_unfolded(self.model, "disable_adapter")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a set and its copies of modules. Raises `ValueError` for an unknown name or a folded set."""
        _check_unfolded(self.model, "delete_adapter")
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        # PEFT skips modules with the prefix in their path: with the dot, it skips modules inside rooms, not the rooms
        self.active_adapter = delete_adapter(self.model, adapter_name, prefix=f"{PREFIX}.", layer_cls=PeftRoom) or []
        for path, room in list(rooms(self.model)):
            if all(isinstance(room[name], SubmoduleSet) for name in room):
                rewire_layer(self.model.get_submodule(path.rpartition(".")[0]))

    # Several sets in one batch

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        _check_unfolded(self.model, "adapter_names=")
        if self.training:
            raise ValueError("adapter_names= is for a model in evaluation mode; call eval()")
        size = len(names)
        with row_by_row(self.model, list(names), kwargs) as order:
            if order is None:
                yield
                return
            self._order: Any = (size, order)
            handles = [
                self.model.register_forward_pre_hook(self._sort, with_kwargs=True, prepend=True),
                self.model.register_forward_hook(self._put_back),
            ]
            try:
                yield
            finally:
                self._order = None
                for handle in handles:
                    handle.remove()

    def _sort(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._order is None:
            return None
        return sort_given(args, *self._order), {name: sort_given(one, *self._order) for name, one in kwargs.items()}

    def _put_back(self, model: nn.Module, args: Any, output: Any) -> Any:
        return output if self._order is None else put_back(output, *self._order)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text. With `adapter_names=`, rows are sorted by set before, and put back in order afterwards."""
        order = getattr(self, "_order", None)
        if order is None:
            return self.model.generate(*args, **kwargs)
        self._order = None
        try:
            given = {name: sort_given(value, *order) for name, value in kwargs.items()}
            return put_back(self.model.generate(*sort_given(args, *order), **given), *order)
        finally:
            self._order = order

    # Removal

    def _unload_and_optionally_merge(  # type: ignore[override] # PEFT's own returns the model, too
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # as in PEFT's methods, the model keeps the active set's copy of a head
        model = self.model
        names = check_single(adapter_names or self.active_adapters)
        if not merge:
            _check_unfolded(model, "unload")
        if merge and names:
            _merge(model, names[0], safe_merge=safe_merge)
        for path, wrapper in wrappers(model):
            there = wrapper.original_module
            kept = wrapper.unload_and_optionally_merge_module(merge, safe_merge, names)
            if (like := next(there.parameters(), None)) is not None:
                kept.to(like.dtype)
            replace_module(model, path, kept)
        detach(model)
        for record in ("unipelt_injection", "peft_config"):
            vars(model).pop(record, None)
        return model

    # Names in files

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        _check_unfolded(model, "save_pretrained")
        found: dict[str, Any] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a parameter's name in a file, without the name of the set.

        `…layer.3.unipelt.default.up.weight` becomes `…layer.3.unipelt.up.weight`. PEFT and Transformers both insert the
        name of a set after the prefix when they load.
        """
        inside = re.sub(rf"(^|\.){ROOM}\.{re.escape(adapter_name)}\.", rf"\1{ROOM}.", key, count=1)
        if inside != key or key.startswith(f"{ROOM}.") or f".{ROOM}." in key:
            return inside
        outside: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return outside


def _ids_in_sets(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of all sets, and of their copies of modules."""
    holders = [room for _, room in rooms(model)] + [wrapper for _, wrapper in wrappers(model)]
    return {id(parameter) for holder in holders for parameter in holder.parameters()}


def _check_unfolded(model: nn.Module, verb: str) -> None:
    """Raise `ValueError` for a model with a set that was folded into the weights of its base."""
    injection: Injection | None = getattr(model, "unipelt_injection", None)
    if injection is not None and injection.folded is not None:
        raise ValueError(
            f"this set was folded, and {verb} needs the base's own weights; call merge_and_unload, or "
            "unipelt.from_peft, whose model unipelt.save and unipelt.remove take"
        )


def _check_name(model: nn.Module, added: Sequence[nn.Module], name: str) -> None:
    """Raise `ValueError` for a set's name that is not unique as a part of parameter names."""
    taken = set(RESERVED)
    for path, _ in model.named_parameters():
        plain = plain_name(path).split(".")
        taken.update(plain[: plain.index(ROOM)] + plain[plain.index(ROOM) + 2 :] if ROOM in plain else plain)
    for one in added:
        taken.update(step for path, _ in one.named_parameters() for step in path.split("."))
    if not name or "." in name or name in taken:
        why = "is a part of other names" if name in taken else "is empty or has a dot"
        raise ValueError(f"a set cannot be called {name!r}: PEFT tells sets by it in parameters' names, where it {why}")


def _add(model: PreTrainedModel, chosen: Any, name: str, *, first: bool, device: str | None) -> None:
    """Build a set and install it in a model's layers. After any error the model is unchanged."""
    config: UniPELTConfig = chosen.unipelt
    plain = {plain_name(one) for one in (head_names(model) if first else injection_inside(model).head)}
    if chosen.head is None:
        chosen.head = module_paths(plain) if config.train_head else []
    if config.tokens is not None:
        raise InjectionError("PEFT trains tokens itself: leave tokens out, and set trainable_token_indices beside it")
    if obstacle := find_obstacle(model, config, plain):
        raise InjectionError(obstacle)
    stacks = find_stacks(model, config)
    built = [build(model, found, config, chosen.deployed, device) for found in stacks]
    prompt = None if config.prompt is None else build_prompt(model, stacks[0], config, device)
    _check_name(
        model,
        [one for stack in built for one in (stack.stack, *stack.layers.values())] + ([prompt[1]] if prompt else []),
        name,
    )
    chosen.modules_to_save = names_to_save(chosen.modules_to_save, chosen.head)
    if first:
        record: Any = model
        record.unipelt_injection = Injection(
            config=config,
            deployed=chosen.deployed,
            head=frozenset(plain),
            required_grad={path: parameter.requires_grad for path, parameter in model.named_parameters()},
        )
    for one in built:
        install(model, one, config, name)
    if prompt is not None:
        install_prompt(model, stacks[0], *prompt, name)
    if config.lora is not None and config.lora.start == "pissa" and not chosen.inference_mode:
        for placed in placed_terms(model, name):
            if isinstance(placed.term, LoRA) and not placed.term.B.is_meta:
                placed.term.start(matrix_of(placed.host, placed.term.outputs), gated=config.lora.gate)


def _adopt(model: PreTrainedModel, chosen: Any, name: str) -> list[tuple[nn.Parameter, bool]]:
    """Take over the set of an injected model; return every parameter with its `requires_grad`."""
    injection = injection_inside(model)
    config: UniPELTConfig = chosen.unipelt
    if injection.config != config or injection.deployed != chosen.deployed:
        raise ValueError(
            "this model carries another method already; unipelt.to_peft takes it over as it is, "
            "and unipelt.remove takes it out"
        )
    if injection.folded is not None or injection.shares:
        what = "is folded" if injection.folded is not None else "shares its base with other tasks"
        raise ValueError(f"this model {what}, which PEFT cannot carry")
    if also := sorted(injection.originals.keys() - injection.head):
        raise ValueError(f"{also[0]} trains beside the head, and PEFT cannot carry it; freeze it first")
    _check_name(model, [], name)
    if chosen.head is None:
        chosen.head = module_paths(injection.head) if config.train_head else []
    chosen.modules_to_save = names_to_save(chosen.modules_to_save, chosen.head)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for attribute in REPLACED:
        vars(model).pop(attribute, None)
    vars(model).update(injection.replaced)
    injection.replaced = {}
    for _, room in rooms(model):
        room._modules = {name if there == DEFAULT else there: added for there, added in room._modules.items()}
    return flags


def _swap_heads(model: PreTrainedModel, injection: Injection, name: str) -> None:
    """Make the trained head the set's copy, and a copy with the former values the base's module."""
    for path, wrapper in copies(model, name):
        trained, former = wrapper.original_module, wrapper.modules_to_save[name]
        take_off(former, widen_input)
        for inner, parameter in former.named_parameters():
            value = injection.originals.get(f"{path}.{inner}")
            if value is not None:
                parameter.data = value.to(parameter.device, copy=True)
            parameter.requires_grad_(False)
        wrapper._modules["original_module"] = former
        wrapper.modules_to_save._modules[name] = trained


def _widen_heads(model: nn.Module, name: str, heads: Sequence[str]) -> None:
    """Keep a set's copies of the head in float32 over a base in half precision."""
    for path, wrapper in copies(model, name):
        if any(head == path or head.startswith(f"{path}.") for head in heads):
            copy = wrapper.modules_to_save[name]
            widen(copy, {inner for inner, _ in copy.named_parameters()})


def _merge(model: PreTrainedModel, name: str, *, safe_merge: bool) -> None:
    """Merge a set's low-rank terms into the weights. Raises `ValueError` if the set has other parts."""
    left = dict.fromkeys(_unmergeable(model, name))
    if left:
        raise ValueError(
            f"these cannot be merged into weights: {', '.join(left)}; unipelt.fold makes constants of gates that "
            "hardly vary, and a set computes without being merged"
        )
    injection = injection_inside(model)
    if injection.folded is None:
        for _, room in rooms(model):
            kept = room.present(name)
            room._modules = {} if kept is None else {DEFAULT: kept}
        training = model.training
        fold_constants(model, {})
        model.train(training)
    if safe_merge:
        for path in injection.folded.weights if injection.folded else ():
            if not model.get_parameter(path).isfinite().all():
                raise ValueError(f"{path} is not finite after merging")


def _unmergeable(model: nn.Module, name: str) -> Iterator[str]:
    """Yield the parts of a set that are not low-rank terms without a gate."""
    for _, room in rooms(model):
        added = room.present(name)
        if added is None:
            continue
        if not isinstance(added, SubmoduleSet):
            if "prompt" in added._modules:
                yield "the prompt"
            continue
        for part in added.attentions():
            if part.prefix is not None:
                yield "the prefix"
            for term in part.terms.values():
                if term.gate_name:
                    yield f"{term.name}, whose gate depends on the text"
                elif not isinstance(term, LoRA):
                    yield term.name
