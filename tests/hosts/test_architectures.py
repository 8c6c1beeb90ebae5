"""Architectures of every kind, each by one small model: all that the page of architectures says is checked here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from architecture_checks import batch_of, check, output
from helpers import assert_near
from hosts.test_families import small
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, BertConfig, BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

import unipelt
from unipelt.hosts.describe import describe_small
from unipelt.hosts.description import WITHOUT_ATTENTION
from unipelt.hosts.families import FAMILIES, family_of
from unipelt.hosts.generate import small_of
from unipelt.injection.parameters import head_names
from unipelt.submodules.room import placed_terms
from unipelt.submodules.tokens import token_weights

CLASSIFIER, MASKED, CAUSAL, IMAGES = "SequenceClassification", "MaskedLM", "CausalLM", "ImageTextToText"
QUICK = [
    # type, head, method, what the bare model keeps and the method must keep
    ("mobilebert", CLASSIFIER, "unipelt-apl", ["padding"]),  # values of another tensor, an adapter of another width
    ("longformer", MASKED, "unipelt-al", ["padding"]),  # projections with the tokens in front, an added mask (B, T)
    ("xlm", MASKED, "unipelt-al", ["padding"]),  # an attention that is the layer
    ("xmod", CLASSIFIER, "unipelt-apl", ["padding"]),  # modules of which a pass runs some
    ("llava", IMAGES, "unipelt-apl", ["padding", "causal", "cache"]),
    ("blip", IMAGES, "unipelt-al", []),  # needs an image
    ("mixtral", CAUSAL, "unipelt-apl", ["padding", "causal", "cache"]),
    ("deepseek_v3", CAUSAL, "unipelt-al", ["padding", "causal", "cache"]),
    ("mamba", CAUSAL, "adapter", ["causal"]),  # no attention: an adapter behind the state-space layer
    ("falcon", CAUSAL, "unipelt-al", ["padding", "causal", "cache"]),
]
SLOW = [
    ("flaubert", CLASSIFIER, "unipelt-al", ["padding"]),
    ("perceiver", MASKED, "unipelt-al", []),  # projections of a norm of the input; no embedding module
    ("yoso", MASKED, "unipelt-al", []),  # described by hand
    ("lilt", CLASSIFIER, "unipelt-al", ["padding"]),  # two attentions beside each other
    ("mamba2", CAUSAL, "adapter", ["causal"]),
    ("gpt_bigcode", CAUSAL, "unipelt-apl", ["padding", "causal", "cache"]),
    ("jamba", CAUSAL, "unipelt-apl", ["causal"]),
    ("zamba", CAUSAL, "unipelt-apl", ["causal"]),  # an adapter behind the state-space layer
    ("nemotron_h", CAUSAL, "unipelt-apl", ["causal"]),  # an adapter behind the attention
    ("qwen2_vl", IMAGES, "unipelt-apl", ["causal"]),
    ("gemma3", IMAGES, "unipelt-apl", ["causal"]),
    ("mllama", IMAGES, "unipelt-apl", ["causal"]),
    ("idefics3", IMAGES, "unipelt-apl", ["causal"]),
    ("kimi_k25", IMAGES, "unipelt-al", ["causal"]),
]


def small_or_skip(kind: str, head: str) -> PreTrainedModel:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind} models")
    return small_of(kind, head)


def check_type(kind: str, head: str, method: str, kept: list[str]) -> None:
    model, other = small_or_skip(kind, head), small_or_skip(kind, head)
    properties = check(model, other, method, head, batch_of(model, head, family_of(model)))
    assert set(kept) <= set(properties)


@pytest.mark.parametrize(("kind", "head", "method", "kept"), QUICK, ids=[row[0] for row in QUICK])
def test_a_type_of_each_kind_takes_what_the_page_says(kind: str, head: str, method: str, kept: list[str]) -> None:
    check_type(kind, head, method, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "method", "kept"), SLOW, ids=[row[0] for row in SLOW])
def test_further_types_take_what_the_page_says(kind: str, head: str, method: str, kept: list[str]) -> None:
    check_type(kind, head, method, kept)


# The parts of a layer that are built in another way


def test_values_of_another_tensor_get_a_first_projection_of_their_own() -> None:
    model: Any = small_of("mobilebert", MASKED)
    merged: Any = small_of("mobilebert", MASKED)
    attention = model.mobilebert.encoder.layer[0].attention.self
    assert attention.value.in_features != attention.query.in_features
    batch = batch_of(model, MASKED, family_of(model))
    unipelt.inject(model, {"preset": "lora", "lora": {"rank": 3, "alpha": 6.0}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for placed in placed_terms(model):
            own = placed.factors()
            own["B"].copy_(0.1 * torch.randn(own["B"].shape, generator=generator))
            merged.get_submodule(placed.path).weight += 2.0 * own["B"] @ own["A"]  # alpha / rank
    torch.testing.assert_close(output(model, batch), output(merged, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(model, batch), output(small_of("mobilebert", MASKED), batch))


def test_a_gate_averages_over_the_tokens_of_projections_with_the_tokens_in_front() -> None:
    model: Any = small_of("longformer", MASKED)
    batch = batch_of(model, MASKED, family_of(model))
    seen: list[Tensor] = []
    layer = model.longformer.encoder.layer[0]
    layer.attention.self.query.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    unipelt.inject(model, small("unipelt-al"))
    gates: list[Tensor] = []
    entry: Any = layer.unipelt["default"].entry
    entry.gates.register_forward_hook(lambda module, args, out: gates.append(out))
    output(model, batch)
    logits = nn.functional.linear(seen[0].transpose(0, 1), entry.weight[:2], entry.bias[:2]).sigmoid()
    real = nn.functional.pad(batch["attention_mask"], (0, logits.shape[1] - batch["attention_mask"].shape[1]))
    want = (logits * real[..., None]).sum(dim=1) / real.sum(dim=1)[:, None]
    torch.testing.assert_close(gates[0].flatten(1), want)


def test_a_mask_of_two_dimensions_that_is_added_is_read_as_logits() -> None:
    mask = torch.tensor([[0.0, 0.0, torch.finfo(torch.float32).min], [3e38, 0.0, 0.0]])  # the 3e38 is a global token
    want = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    read, unread = token_weights(mask, 2, added=True), token_weights(mask, 2)
    assert read is not None
    assert unread is not None
    assert_near(read, want)
    assert not torch.allclose(unread, want)


@pytest.mark.parametrize(
    ("kind", "head", "adapted", "output_path"),
    [
        ("xlm", MASKED, "attention", "out_lin"),
        ("nemotron_h", CAUSAL, "attention", "mixer.o_proj"),
        ("zamba", CAUSAL, "mixer", "mamba_decoder.mamba"),
        ("llama", CAUSAL, "feed_forward", "mlp"),
        ("xmod", MASKED, "feed_forward", "output.dense"),
    ],
)
def test_the_adapter_is_behind_what_a_layer_has(kind: str, head: str, adapted: str, output_path: str) -> None:
    stack = describe_small(small_or_skip(kind, head)).stacks[0]
    assert (stack.adapted, stack.output) == (adapted, output_path)
    assert bool(stack.up) == (adapted == "feed_forward")


# Models that read images


def test_only_the_text_part_of_a_model_for_images_gets_submodules() -> None:
    model = small_of("llava", IMAGES)
    bare = sum(parameter.numel() for parameter in model.parameters())
    unipelt.inject(model, small("unipelt-apl"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("model.language_model.") and ".unipelt." in name for name in trained)
    counts = unipelt.parameter_counts(model)
    assert (counts.base, counts.head) == (bare, 0)
    assert set(counts.submodules) == {"adapter", "prefix", "lora"}


def test_a_model_for_images_without_a_separate_base_has_no_head_to_train() -> None:
    model = small_of("blip", IMAGES)
    assert model.base_model is model
    assert head_names(model) == frozenset()


def test_the_layers_that_read_images_are_no_stack_of_the_text() -> None:
    stacks = describe_small(small_of("blip", IMAGES)).stacks
    assert [stack.layers for stack in stacks] == ["text_decoder.bert.encoder.layer"]


# What does not go there, by name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mixtral", "has no projection of the feed-forward network at 'up': the experts of a layer keep their weights"),
        ("nemotron_h", "at 'up': its layers with attention have no feed-forward network"),
    ],
)
def test_lora_is_refused_where_a_layer_has_no_projections(kind: str, message: str) -> None:
    model = small_or_skip(kind, CAUSAL)
    before = list(model.state_dict())
    with pytest.raises(unipelt.InjectionError, match=message):
        unipelt.inject(model, {"preset": "lora", "lora": {"places": ["query", "up"]}})
    assert list(model.state_dict()) == before
    assert unipelt.inject(model, "lora") is model


def test_lora_goes_into_shared_experts_and_dense_layers() -> None:
    model = small_of("deepseek_v3", CAUSAL)
    unipelt.inject(model, {"preset": "lora", "lora": {"places": ["up", "gate", "down"]}})
    hosts = [placed.path.partition("layers.")[2] for placed in placed_terms(model)]
    assert hosts == [
        *("0.mlp.up_proj", "0.mlp.down_proj", "0.mlp.gate_proj"),
        *("1.mlp.shared_experts.up_proj", "1.mlp.shared_experts.down_proj", "1.mlp.shared_experts.gate_proj"),
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("unipelt-al", "'mamba' models cannot take LoRA: its layers have no attention"),
        ("prefix", "'mamba' models cannot take a prefix: its layers have no attention"),
        ({"preset": "adapter", "adapter": {"gate": True}, "gate": {"shared": True}}, "gate.shared lets the adapter's"),
        ("ia3", "has no attention, and so no place '"),
    ],
)
def test_a_state_space_model_takes_nothing_but_an_adapter(method: Any, message: str) -> None:
    model = small_of("mamba", CAUSAL)
    before = list(model.state_dict())
    with pytest.raises(unipelt.InjectionError, match=message):
        unipelt.inject(model, method)
    assert list(model.state_dict()) == before


def test_a_stack_without_attention_says_where_its_adapter_goes_and_how_wide_it_is() -> None:
    with pytest.raises(ValueError, match="a Stack without attention has an output, and a width"):
        unipelt.Stack("layers", WITHOUT_ATTENTION, output="mixer")


@pytest.mark.usefixtures("apart")
def test_a_gate_that_averages_is_refused_where_there_is_no_attention() -> None:
    model = small_of("mamba", CAUSAL)
    unipelt.register_family("mamba", replace(family_of(model).stacks[0], causal=False))
    method = {"preset": "adapter", "adapter": {"gate": True}}
    with pytest.raises(unipelt.InjectionError, match=r"gate averages over real tokens, .*take gate.pooling: token"):
        unipelt.inject(model, method)
    assert unipelt.inject(model, {**method, "gate": {"pooling": "token"}}) is model


def test_a_model_without_attention_in_which_nothing_goes_is_refused() -> None:
    model = small_of("rwkv", CAUSAL)
    with pytest.raises(unipelt.InjectionError, match="has no attention: no softmax over tokens was found"):
        unipelt.inject(model, "adapter")


# A registered description that says something else than the model does


class Apart(BertSelfAttention):
    """Values are computed from other states than queries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        projection: Any = self.value
        self.value: Any = nn.Sequential(nn.Tanh(), projection)


@pytest.fixture
def apart() -> Iterator[type[BertModel]]:
    """A model whose values are computed from other states; the table ends as it began."""
    before = dict(FAMILIES)
    yield _WithApart
    FAMILIES.clear()
    FAMILIES.update(before)


class _WithApart(BertModel):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        layers: Any = self.encoder.layer
        for layer in layers:
            layer.attention.self = Apart(config)


def test_a_description_with_values_of_another_tensor_is_refused_at_injection(apart: type[BertModel]) -> None:
    config: Any = small_of("bert", MASKED).config
    known = FAMILIES["bert"].stacks[0]
    attention = replace(known.attention, value="value.1")
    unipelt.register_family("bert", replace(known, attention=attention, cross=None))
    with pytest.raises(unipelt.InjectionError, match=r"query and .*value\.1 read different tensors.*value_apart=True"):
        unipelt.inject(apart(config), "lora")


@pytest.mark.usefixtures("apart")
def test_a_description_with_an_adapter_of_another_width_is_refused_at_injection() -> None:
    known = FAMILIES["bert"].stacks[0]
    unipelt.register_family("bert", replace(known, norm="", output="intermediate.dense"))
    model = small_of("bert", MASKED)
    with pytest.raises(unipelt.InjectionError, match=r"outputs are 40 wide .* the adapter would be 32 wide"):
        unipelt.inject(model, "adapter")
    assert unipelt.inject(model, "lora") is model
