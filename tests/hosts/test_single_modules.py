"""Single modules and weights: norms of a layer's states, quantised weights, attention that uses the interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor, nn
from transformers import AttentionInterface

from unipelt.hosts.attention_interface import attention_function, is_causal, uses_interface
from unipelt.hosts.norms import find_norms, is_norm
from unipelt.hosts.quantised import describe_numbers, is_quantised, template_for


class RMS(nn.Module):
    """A norm by its weight, and not by the name of its class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class OwnNorm(RMS):
    """A norm by both."""


def test_norms_are_known_by_their_class_and_by_a_weight_of_one_dimension() -> None:
    plain = nn.LayerNorm(4, elementwise_affine=False)
    modules = (OwnNorm(4), nn.LayerNorm(4), nn.LayerNorm((2, 4)), plain, RMS(4), nn.Linear(4, 4))
    assert [is_norm(module) for module in modules] == [True, True, False, False, False, False]


def test_norms_of_states_are_as_wide_as_these_and_not_of_queries_or_keys() -> None:
    layer = nn.Module()
    names = ("norm1", "q_norm", "k_layernorm", "query_ln", "q_a_layernorm", "sink", "post.key_norm", "post.norm")
    for name in names:
        owner = layer
        for parent in name.split(".")[:-1]:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner._modules[parent]  # type: ignore[assignment]
        owner.add_module(name.rpartition(".")[2], OwnNorm(8))
    layer.add_module("head_norm", OwnNorm(2))
    assert list(find_norms(layer, 8)) == ["norm1", "sink", "post.norm"]
    assert list(find_norms(layer, 2)) == ["head_norm"]


class Packed(Tensor):
    """A quantiser's tensor class."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)

    def __init__(self, values: Tensor) -> None:
        self.packed = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Packed:
        return cls(inner["packed"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return NotImplemented


def test_a_quantised_weight_is_known_by_its_dtype_or_its_class() -> None:
    bytes_ = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    half, packed = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16)), Packed(torch.zeros(2, 2))
    assert [is_quantised(weight) for weight in (bytes_, half, packed)] == [True, False, True]
    assert [describe_numbers(weight) for weight in (bytes_, half, packed)] == ["int8", "bfloat16", "Packed"]


@pytest.mark.parametrize(
    ("weight", "dtype", "wanted", "want"),
    [
        (torch.float32, torch.float32, "float32", torch.float32),
        (torch.float64, torch.float64, "float32", torch.float64),
        (torch.bfloat16, torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, torch.float32, "base", torch.bfloat16),
        (torch.int8, torch.float16, "base", torch.float16),
        (torch.int8, torch.float16, "float32", torch.float32),
        (torch.int8, torch.float64, "float32", torch.float64),
    ],
)
def test_submodules_take_the_dtype_of_the_weight_or_of_the_model(
    weight: torch.dtype, dtype: torch.dtype, wanted: Any, want: torch.dtype
) -> None:
    given = torch.zeros(3, 2, dtype=weight)
    found = template_for(given, dtype, wanted)
    assert found.dtype == want
    assert (found is given) == (want == weight)
    assert found is given or found.shape == (0,)


class OwnAttention(nn.Module):
    """An attention in a file that imports the interface's class alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config is not None:
            self.config = config


def test_the_interface_is_used_by_a_module_whose_file_imports_it_and_that_has_a_configuration() -> None:
    assert AttentionInterface.__module__ != __name__
    assert uses_interface(OwnAttention(tiny_config("bert")))
    assert not uses_interface(OwnAttention(None))
    assert not uses_interface(OwnAttention({"_attn_implementation": "sdpa"}))
    assert not uses_interface(nn.Linear(1, 1))


def test_the_attention_function_is_the_one_that_the_configuration_names() -> None:
    config = tiny_config("bert")
    config._attn_implementation_internal = "sdpa"
    assert attention_function(OwnAttention(config), config) == ("sdpa", AttentionInterface()["sdpa"])
    config._attn_implementation_internal = "nothing"
    with pytest.raises(ValueError, match="has no attention back-end 'nothing'; register it, or take 'sdpa'"):
        attention_function(OwnAttention(config), config)
    config._attn_implementation_internal = None
    with pytest.raises(ValueError, match="no eager_attention_forward beside OwnAttention"):
        attention_function(OwnAttention(config), config)


def test_attention_is_causal_by_its_argument_then_by_its_module() -> None:
    module = nn.Module()
    assert is_causal(module, {})
    assert is_causal(module, {"is_causal": None})
    module.is_causal = False  # type: ignore[assignment]
    assert not is_causal(module, {})
    assert is_causal(module, {"is_causal": True})
