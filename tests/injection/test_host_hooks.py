"""Hooks on host modules: once each, before those of others, and after a failure too where a pass ends."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import tiny_bert
from torch import nn

import unipelt
from unipelt.injection.gradient_checkpointing import wake_input
from unipelt.injection.hooks import HOOKS, put, take_off
from unipelt.injection.state import is_injected


def test_a_hook_is_put_once_before_others_and_ends_a_pass_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def entered(host: Any, args: Any, kwargs: Any) -> None:
        seen.append(f"enter {sorted(kwargs)}")

    def changed(host: Any, args: Any) -> None:
        seen.append("input")

    def given(host: Any, args: Any, output: Any) -> None:
        seen.append("output")

    def left(host: Any, args: Any, output: Any) -> None:
        seen.append("leave")

    ours: dict[Any, str] = {entered: "enter", changed: "input", given: "output", left: "leave"}
    for function, when in ours.items():
        monkeypatch.setitem(HOOKS, function, when)

    class Host(nn.Module):
        def forward(self, x: int, fails: bool = False) -> int:
            if fails:
                raise KeyError(x)
            return x

    host = Host()
    host.register_forward_pre_hook(lambda *_: seen.append("other, before"))
    host.register_forward_hook(lambda *_: seen.append("other, after"))
    for function in (*ours, *ours):
        put(host, function)
    host(1, fails=False)
    assert seen == ["input", "enter ['fails']", "other, before", "leave", "output", "other, after"]
    seen.clear()
    with pytest.raises(KeyError):
        host(1, fails=True)
    assert seen == ["input", "enter ['fails']", "other, before", "leave"]
    seen.clear()
    take_off(host, given, left)
    host(1)
    assert seen == ["input", "enter []", "other, before", "other, after"]
    seen.clear()
    take_off(host)
    host(1)
    assert seen == ["other, before", "other, after"]


def owner_of(layer: nn.Module, function: Any, checkpoints: bool = True) -> Any:
    owner: Any = nn.Module()
    changed: Any = layer
    changed.gradient_checkpointing, changed._gradient_checkpointing_func = checkpoints, function
    owner.unipelt_layer = (layer,)
    return owner


def test_states_need_a_gradient_where_layers_are_checkpointed_reentrantly() -> None:
    def plain(use_reentrant: bool = True) -> None:
        """A function that does not say which way it checkpoints: PyTorch's own default is reentrant."""

    layer = nn.Linear(1, 1)
    states, ids, mask = torch.ones(2), torch.ones(2, dtype=torch.long), torch.zeros(2)
    given = {"hidden_states": states, "inputs_embeds": states, "input_ids": ids, "attention_mask": mask}
    for function in (plain, partial(plain, use_reentrant=True), partial(plain)):
        found = wake_input(owner_of(layer, function), (states, mask), given)
        assert found is not None
        args, kwargs = found
        assert [tensor.requires_grad for tensor in args] == [True, False]
        assert {name: tensor.requires_grad for name, tensor in kwargs.items()} == {
            "hidden_states": True,
            "inputs_embeds": True,
            "input_ids": False,
            "attention_mask": False,
        }
        assert torch.equal(args[0], states)
    assert not states.requires_grad
    assert wake_input(owner_of(layer, partial(plain, use_reentrant=False)), (states,), given) is None
    assert wake_input(owner_of(layer, plain, checkpoints=False), (states,), given) is None
    with torch.no_grad():
        assert wake_input(owner_of(layer, plain), (states,), given) is None
    assert wake_input(owner_of(layer.eval(), plain), (states,), given) is None


def test_a_model_with_submodules_is_known() -> None:
    model = tiny_bert()
    assert not is_injected(model)
    assert is_injected(unipelt.inject(model, "lora"))
    assert not is_injected(unipelt.remove(model))
