"""Descriptions by inspection: what is found, what is refused, and that the table is what is found."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hosts.test_families import logits, small
from inside import added_to
from tiny import WITHOUT_INTERFACE, tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import unipelt
from unipelt.hosts.describe import DescribeError, describe
from unipelt.hosts.description import Attention, Stack
from unipelt.hosts.families import EXCEPTIONS, FAMILIES
from unipelt.hosts.generate import describe_type, small_of, text_types
from unipelt.hosts.table import TABLE, from_data, read_table, to_data

INSPECTED = (
    *("bert", "distilbert", "albert", "roberta-prelayernorm", "modernbert", "bart", "mbart", "gpt2", "gpt_neox"),
    *("bloom", "opt", "llama", "phi3", "gemma2", "olmo2", "cohere", "stablelm"),
)
"""A family of each way in which a layer is built."""
REGENERATED = (
    *(
        "bert",
        "bart",
        "gpt2",
        "llama",
        "deepseek_v3",
        "qwen3_moe",
        "falcon",
        "jamba",
        "rwkv",
        "longformer",
        "mobilebert",
    ),
    *("xlm", "zamba", "mamba", "llava"),
)


@pytest.mark.parametrize("family", [name for name in INSPECTED if name not in WITHOUT_INTERFACE])
def test_a_model_of_any_size_is_described_as_the_table_says(family: str) -> None:
    found, want = describe(tiny_model(family, "Model")), FAMILIES[family]
    for stack, wanted in zip(found.stacks, want.stacks, strict=True):
        if len(want.stacks) == 1:  # attention to an encoder is there only where a configuration asks for it
            wanted = replace(wanted, cross=None)
        assert stack == wanted
    assert found.refused == want.refused


def test_attention_to_an_encoder_is_found_where_there_is_one() -> None:
    model = tiny_model("bert", "CausalLM", is_decoder=True, add_cross_attention=True)
    stack = describe(model).stacks[0]
    assert stack.causal
    assert stack.cross == FAMILIES["bert"].stacks[0].cross


def test_nothing_is_disturbed() -> None:
    model = tiny_model("llama")
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert describe(model) == describe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# What a name says counts for nothing


class Swapped(LlamaAttention):
    """Queries and values have each other's names."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_proj, self.v_proj = self.v_proj, self.q_proj

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.q_proj, self.v_proj = self.v_proj, self.q_proj
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.q_proj, self.v_proj = self.v_proj, self.q_proj


class Tuple(LlamaMLP):
    """A feed-forward network that gives a tuple; its layer takes the first of it."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class First(nn.Module):
    """Passes the first of a tuple on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.network(x)[0]
        return first


class WithSwapped(transformers.LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = Swapped(config, index)


class WithTuple(transformers.LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = First(Tuple(config))


def test_projections_are_known_by_what_they_do_and_not_by_their_names() -> None:
    attention = describe(WithSwapped(tiny_config("llama"))).stacks[0].attention
    assert (attention.query, attention.key, attention.value) == ("v_proj", "k_proj", "q_proj")


def test_a_block_that_gives_a_tuple_is_not_what_is_added() -> None:
    stack = describe(WithTuple(tiny_config("llama"))).stacks[0]
    assert (stack.output, stack.up, stack.down) == ("mlp", "mlp.network.up_proj", "mlp.network.down_proj")


def test_a_registered_block_that_gives_a_tuple_gets_an_adapter_on_its_first_part() -> None:
    model, other = WithTuple(tiny_config("llama")).eval(), WithTuple(tiny_config("llama")).eval()
    other.load_state_dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unipelt.inject(other, small("adapter"))  # described by inspection: the adapter is behind the whole block
    unipelt.register_family("llama", replace(FAMILIES["llama"].stacks[0], output="mlp.network"))
    unipelt.inject(model, small("adapter"))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            own[name].copy_(parameter)
    ids = torch.arange(5, 12)[None]
    assert torch.equal(model(ids)[0], other(ids)[0])
    unipelt.remove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_causality_is_what_the_model_does() -> None:
    assert describe(tiny_model("gemma3_text")).stacks[0].causal
    both = tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert not describe(both).stacks[0].causal
    unipelt.inject(both, small("unipelt-al"))
    assert {gates.pooling for gates in both.modules() if hasattr(gates, "pooling")} == {"masked_mean"}


def test_a_gate_is_known_from_what_it_scales() -> None:
    stack = describe(tiny_model("llama")).stacks[0]
    assert (stack.gate, stack.up) == ("mlp.gate_proj", "mlp.up_proj")


# What has no description


def test_a_type_that_is_not_in_the_table_is_described_on_the_spot(caplog: pytest.LogCaptureFixture) -> None:
    want = FAMILIES.pop("llama")
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            model = unipelt.inject(tiny_model("llama"), small("unipelt-apl"))
            unipelt.inject(tiny_model("llama"), small("unipelt-apl"))
    finally:
        transformers.logging.disable_propagation()
    lines = [record.getMessage() for record in caplog.records if "description" in record.getMessage()]
    assert lines == [
        "there is no description of 'llama' models in the table; LlamaForCausalLM was described by inspection (layers "
        "at layers)"
    ]
    assert FAMILIES["llama"] == want
    assert logits(model, tiny_batch("llama")).isfinite().all()


def test_what_is_registered_comes_first() -> None:
    mine = unipelt.register_family("llama", replace(FAMILIES["llama"].stacks[0], output="mlp.down_proj"))
    model = unipelt.inject(tiny_model("llama"), small("adapter"))
    assert FAMILIES["llama"] is mine
    assert added_to(model.model.layers[0]).wiring.outputs == {"mlp.down_proj": ("adapter",)}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rwkv", "has no attention: no softmax over tokens was found in its layers"),
        ("codegen", "qkv_proj of CodeGenAttention computes its key in an order that a description cannot say"),
        ("hrm_text", "passes several lists of layers: L_module.layers, H_module.layers"),
    ],
)
def test_what_is_not_found_is_said(kind: str, reason: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind} models")
    model = small_of(kind, "CausalLM")
    with pytest.raises(DescribeError, match=reason):
        describe(model)
    with pytest.raises(unipelt.InjectionError, match=f"there is no description of '{kind}' models.*: .*{reason}"):
        unipelt.inject(model, "lora")


def test_layers_without_attention_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = small_of("qwen3_next", "CausalLM")
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            unipelt.inject(model, small("unipelt-apl"))
    finally:
        transformers.logging.disable_propagation()
    assert "layers 0 of this Qwen3NextForCausalLM have no attention as its others have" in caplog.text
    carrying = [any("adapter" in name for name, _ in layer.named_modules()) for layer in model.model.layers]
    assert carrying == [False, True]
    unipelt.remove(model)
    with pytest.raises(unipelt.InjectionError, match="layers names 0, and layer 0 has no attention as others have"):
        unipelt.inject(model, small("unipelt-apl", layers=[0, 1]))


def test_experts_without_projections_are_refused_by_name() -> None:
    model = small_of("qwen3_moe", "CausalLM")
    unipelt.inject(model, small("unipelt-apl"))
    unipelt.remove(model)
    with pytest.raises(unipelt.InjectionError, match="'up': the experts of a layer keep their weights in one tensor"):
        unipelt.inject(model, small("unipelt-al", parallel={"bottleneck": 6}))


# The table


WRITTEN = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.skipif(
    WRITTEN["transformers"] != transformers.__version__, reason="the table was generated with another Transformers"
)
@pytest.mark.parametrize(
    "kind",
    [*REGENERATED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in text_types() if kind not in REGENERATED)],
)
def test_the_table_is_what_is_generated(kind: str) -> None:
    if kind in WRITTEN["without"]:
        with pytest.raises(DescribeError) as caught:
            describe_type(kind)
        assert str(caught.value) == WRITTEN["without"][kind]
        return
    for own, family in describe_type(kind).items():
        assert own in WRITTEN["families"]
        if own == kind or own not in text_types():
            assert to_data(family) == WRITTEN["families"][own]


@pytest.mark.skipif(
    WRITTEN["transformers"] != transformers.__version__, reason="the table was generated with another Transformers"
)
def test_the_table_has_no_type_that_is_not_there() -> None:
    assert WRITTEN["families"].keys() <= set(CONFIG_MAPPING)
    assert WRITTEN["without"].keys() <= set(text_types()) - WRITTEN["families"].keys()


def test_a_family_survives_the_table() -> None:
    for kind, family in read_table().items():
        assert from_data(json.loads(json.dumps(to_data(family)))) == family, kind
        assert kind in EXCEPTIONS or FAMILIES[kind] == family


def test_a_stack_without_a_place_for_an_adapter_says_why() -> None:
    stack = Stack("layers", Attention("attn", "q", "v"), unjoined="because")
    assert not stack.norm
    with pytest.raises(ValueError, match="either norm"):
        Stack("layers", Attention("attn", "q", "v"), norm="norm", unjoined="because")
