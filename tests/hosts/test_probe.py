"""Recorded passes of toy models: what is added to a residual, what is causal, what is recorded, and widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipelt.hosts.describe import _layers
from unipelt.hosts.description import NO_ATTENTION, WITHOUT_ATTENTION
from unipelt.hosts.feed_forward import find_added
from unipelt.hosts.generate import small_of
from unipelt.hosts.inputs import text_batch
from unipelt.hosts.probe import Call, is_causal, watch
from unipelt.hosts.projections import _as_given
from unipelt.hosts.roles import KEY, QUERY, VALUE, find_roles
from unipelt.hosts.rows import width_of
from unipelt.hosts.state_space import describe_state_space
from unipelt.hosts.unrecorded import attentions_without_softmax


class Toy(nn.Module):
    """A list of layers, with the parts of a `PreTrainedModel` that `watch` reads."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


class Layer(nn.Module):
    """A layer `way(self, x)` with two projections."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way, self.inner, self.outer = way, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, states: Tensor) -> Any:
        return self.way(self, states)


def calls_of(way: Any) -> list[Call]:
    """Return the calls of a toy model with one layer: of the layer, and of its projections."""
    torch.manual_seed(0)
    return watch(Toy(Layer(way)), {"states": torch.randn(2, 9, 6, requires_grad=True)}).calls  # type: ignore[arg-type]


def added_in(way: Any) -> str | None:
    """Return the path of the module that a layer adds to its residual."""
    layer, *inside = calls_of(way)
    assert layer.output is not None
    found = find_added(layer.output, inside)
    return None if found is None else found.path


def centred(states: Tensor) -> Tensor:
    return states - states.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("way", "path"),
    [
        (lambda layer, x: x + layer.outer(layer.inner(x).relu()), "layers.0.outer"),
        (lambda layer, x: x + 0.3 * layer.inner(x), "layers.0.inner"),
        (lambda layer, x: layer.inner(x).detach() + x, None),
        (lambda layer, x: x + layer.inner(x).relu(), None),
        (lambda layer, x: layer.inner(x), None),  # all of the sum is no summand
        # taken along the sum itself, the gradient would be the sum
        (lambda layer, x: centred(x + layer.inner(x)), None),
    ],
)
def test_the_module_that_is_added_to_a_residual(way: Any, path: str | None) -> None:
    assert added_in(way) == path


@pytest.mark.parametrize(
    ("way", "causal"),
    [
        (lambda layer, x: layer.inner(x), True),
        (lambda layer, x: layer.inner(x).cumsum(1), True),
        (lambda layer, x: layer.inner(x).flip(1).cumsum(1).flip(1), False),
        (lambda layer, x: layer.inner(x) + x.mean(1, keepdim=True), False),
        (lambda layer, x: layer.inner(x.detach()), False),  # nothing is known of it
        (lambda layer, x: {"states": x}["states"].detach(), False),
    ],
)
def test_a_layer_is_causal_if_no_output_depends_on_a_later_input(way: Any, causal: bool) -> None:
    assert is_causal(calls_of(way)[0]) is causal


def test_a_layer_that_is_given_no_states_or_gives_none_is_not_causal() -> None:
    layer = nn.Identity()
    states = torch.randn(1, 4, 3, requires_grad=True)
    assert is_causal(Call(layer, "", {"ids": torch.ones(1, 4)}, 0, states)) is False
    assert is_causal(Call(layer, "", {"states": states}, 0)) is False


def test_a_change_in_place_does_not_reach_the_record() -> None:
    def way(layer: Any, x: Tensor) -> tuple[Tensor, str]:
        return layer.inner(x).mul_(2), "more"

    class First(Toy):
        def forward(self, states: Tensor) -> Tensor:
            first, more = self.layers[0](states)
            assert more == "more"
            return first.add_(1)

    torch.manual_seed(0)
    model, given = First(Layer(way)), torch.randn(2, 9, 6, requires_grad=True)
    layer, inner = watch(model, {"states": given}).calls  # type: ignore[arg-type]
    want = model.layers[0].inner(given)  # type: ignore[operator]
    assert inner.output is not None
    assert layer.output is not None
    assert torch.equal(inner.output, want)
    assert torch.equal(layer.output, 2 * want)
    assert (inner.alone, layer.alone) == (True, False)
    assert (layer.start, inner.start, inner.end, layer.end) == (2, 4, 6, 8)
    assert layer.contains(inner)
    assert not inner.contains(layer)
    assert layer.inputs.keys() == {"states"}
    assert inner.inputs.keys() == {"input"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_attention_that_is_computed_in_parts_is_found_once() -> None:
    model = small_of("diffllama", "CausalLM")
    found = watch(model, text_batch(model))
    layers = _layers(model, found)
    assert len(found.attentions) >= len(layers)
    assert [len(layer.attentions) for layer in layers] == [1] * len(layers)


def test_a_projection_reads_an_argument_as_it_is_or_with_the_tokens_in_front() -> None:
    states = torch.randn(2, 9, 6)
    attention = Call(nn.Identity(), "attention", {"mask": torch.ones(2, 9), "states": states}, 0)
    given = (states, states.transpose(0, 1), centred(states), centred(states).transpose(0, 1))
    calls = [Call(nn.Linear(6, 6), "", {"input": tensor}, 2) for tensor in given]
    found = [(read.argument, read.call, read.tokens_first) for read in _as_given(attention, calls)]
    assert found == [("states", calls[0], False), ("states", calls[1], True)]


class Mixer(nn.Module):
    """A module with projections that mixes tokens, as a state-space layer does."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.inner, self.outer = causal, nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, states: Tensor) -> Tensor:
        inner = self.inner(states)
        mixed = inner.cumsum(1) if self.causal else inner + inner.mean(1, keepdim=True)
        return self.outer(mixed.tanh())


class WithMixer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.mixer = Mixer(causal)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.mixer(states)


def test_causal_layers_that_mix_tokens_without_attention_take_an_adapter_alone() -> None:
    torch.manual_seed(0)
    given = {"states": torch.randn(2, 9, 6, requires_grad=True)}
    model = Toy(WithMixer(True), WithMixer(True))
    family = describe_state_space(model, watch(model, given))  # type: ignore[arg-type]
    assert family is not None
    assert family.refused == {"prefix": NO_ATTENTION, "lora": NO_ATTENTION}
    (stack,) = family.stacks
    assert (stack.layers, stack.output, stack.width) == ("layers", "mixer", "mixer.outer")
    assert (stack.attention, stack.causal, stack.adapted) == (WITHOUT_ATTENTION, True, "mixer")
    both_ways = Toy(WithMixer(True), WithMixer(False))
    assert describe_state_space(both_ways, watch(both_ways, given)) is None  # type: ignore[arg-type]


class Linearised(nn.Module):
    """An attention without a softmax, whose values come from `value`."""

    def __init__(self, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), value

    def forward(self, states: Tensor) -> Tensor:
        summed = (self.key(states).tanh() * self.value(states)).mean(1, keepdim=True)
        return self.query(states).tanh() * summed


def test_attention_without_a_softmax_has_three_projections() -> None:
    torch.manual_seed(0)
    given = {"states": torch.randn(2, 9, 6, requires_grad=True)}
    for value, count in ((nn.Linear(6, 6), 1), (nn.LayerNorm(6), 0)):
        model = Toy(Linearised(value))
        found = watch(model, given)  # type: ignore[arg-type]
        records = attentions_without_softmax(found)
        assert [record.owner for record in records] == [model.layers[0]] * count
        if records:
            inside = found.calls[1:]
            assert all(call.end < records[0].start for call in inside)
            roles = find_roles(inside, records, found.calls[0])
            kinds = [[kind for kind, flags in roles[id(call)].items() if flags.all()] for call in inside]
            assert [inside[index].path for index in range(3)] == [f"layers.0.{n}" for n in ("key", "value", "query")]
            assert kinds == [[KEY], [VALUE], [QUERY]]


def test_widths_are_those_of_projections_and_norms_alone() -> None:
    found = [width_of(one) for one in (nn.Linear(2, 3), nn.LayerNorm(4), nn.Embedding(5, 6), nn.Identity())]
    assert found == [3, 4, None, None]
