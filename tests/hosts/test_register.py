"""Models that are not in the table: describing one, what a wrong description does, and the example in `examples`."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import shake
from inside import added_to
from torch import Tensor, nn

import unipelt
from unipelt.hosts.families import FAMILIES
from unipelt.submodules.prefix import Prefix
from unipelt.submodules.room import own_parameters

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
ATTENTION = unipelt.Attention("attention", "q", "v")
STACK = unipelt.Stack("blocks", ATTENTION, output="down")


@pytest.fixture(scope="module")
def own() -> Iterator[ModuleType]:
    """The example, imported."""
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_model"]


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[set[str]], list[int], dict[str, bool]]:
    """Tensors, attributes and hooks of every module, and what trains."""
    return (
        {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        [set(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    tensors, *rest = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    assert rest == list(before[1:])


def test_the_example_learns_and_loads_what_it_saved(own: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, again = own.main()
    assert before < 0.65
    assert after > 0.75
    assert again == pytest.approx(after, abs=0.005)
    printed = capsys.readouterr().out
    assert printed.startswith("trained")
    assert f"accuracy  {before:.3f} untrained, {after:.3f} after" in printed
    for gate in ("adapter", "prefix", "lora_query", "lora_value"):
        assert f"gate      {gate}" in printed


@pytest.mark.slow
def test_the_example_is_a_program() -> None:
    """A model class in `__main__`, too, is found to go through the attention interface."""
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, check=True)
    assert "accuracy" in done.stdout
    assert not done.stderr


def test_everything_of_a_described_model_is_injected_trained_and_removed(own: ModuleType) -> None:
    family = unipelt.register_family("own", STACK)
    assert FAMILIES["own"] is family
    assert family == unipelt.Family((STACK,))
    model = own.pretrained()
    batch, before = own.texts(4, seed=0), snapshot(model)
    want = model(**batch).logits
    unipelt.inject(model, "unipelt-apl")
    shake(model)
    out = model(**batch)
    assert (out.logits - want).abs().max() > 1e-3
    out.loss.backward()
    for name, parameter in model.named_parameters():
        head = name.startswith("classifier.")
        ours = name in own_parameters(model)
        assert parameter.requires_grad == (head or ours), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (head or ours), name
    assert unipelt.parameter_counts(model).head == sum(p.numel() for p in model.classifier.parameters())
    assert added_to(model.model).prefix_network.layers == 3, "the network is of the list's owner"
    unipelt.remove(model)
    assert_untouched(model, before)
    torch.testing.assert_close(model(**batch).logits, want, atol=0, rtol=0)


def test_padding_of_a_described_model_counts_for_nothing(own: ModuleType) -> None:
    unipelt.register_family("own", STACK)
    model = unipelt.inject(own.pretrained(), "unipelt-apl")
    shake(model)
    batch = own.texts(6, seed=3)
    together = model(**batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items() if name != "labels"}
        logits = model(**alone, labels=batch["labels"][row : row + 1]).logits
        torch.testing.assert_close(logits[0], together[row], atol=1e-5, rtol=1e-5)


def test_causality_is_what_the_description_says(own: ModuleType) -> None:
    """Gates are a number an example, or a number a token."""
    for causal, pooling in ((False, "masked_mean"), (True, "token")):
        FAMILIES.pop("own", None)
        unipelt.register_family("own", unipelt.Stack("blocks", ATTENTION, output="down", causal=causal))
        model: Any = unipelt.inject(own.pretrained(), "unipelt-apl")
        assert {added_to(block).entry.gates.pooling for block in model.model.blocks} == {pooling}


def test_the_same_description_again_is_fine_and_another_is_not() -> None:
    first = unipelt.register_family("own", STACK)
    again = unipelt.register_family("own", unipelt.Stack("blocks", ATTENTION, output="down"), refused={})
    assert again == first
    with pytest.raises(ValueError, match=r"^'own' is described already, and otherwise$"):
        unipelt.register_family("own", unipelt.Stack("layers", ATTENTION, output="down"))
    with pytest.raises(ValueError, match=r"^'own' is described already, and otherwise$"):
        unipelt.register_family("own", STACK, refused={"prefix": "so"})
    unipelt.register_family("bert", STACK)  # the table's is another, and what is registered comes first
    with pytest.raises(ValueError, match=r"^'bert' is described already, and otherwise$"):
        unipelt.register_family("bert", unipelt.Stack("layers", ATTENTION, output="down"))
    assert FAMILIES["own"] == first
    for name, family in list(FAMILIES.items()):
        unipelt.register_family(name, *family.stacks, refused=family.refused)


def test_descriptions_that_cannot_be_meant_are_refused() -> None:
    before = dict(FAMILIES)
    with pytest.raises(ValueError, match="one stack, or an encoder and a decoder; 0 were given"):
        unipelt.register_family("own")
    with pytest.raises(ValueError, match="one stack, or an encoder and a decoder; 3 were given"):
        unipelt.register_family("own", STACK, STACK, STACK)
    with pytest.raises(ValueError, match=r"^refused names submodules \(adapter, prefix, lora\), not 'prefixes'$"):
        unipelt.register_family("own", STACK, refused={"prefix": "so", "prefixes": "so"})
    for norm, output in (("norm2", "down"), ("", "")):
        with pytest.raises(ValueError, match=r"either norm .* or output .*, not both and not neither"):
            unipelt.Stack("blocks", ATTENTION, norm, output)
    assert before == FAMILIES


def test_a_model_without_a_description_is_described_by_inspection(own: ModuleType) -> None:
    model = own.pretrained()
    unipelt.inject(model, "unipelt-apl")
    stack, mine = FAMILIES["own"].stacks[0], STACK
    assert (stack.layers, stack.attention.path, stack.causal) == (mine.layers, mine.attention.path, False)
    assert (stack.attention.query, stack.attention.value) == (mine.attention.query, mine.attention.value)
    assert stack.output == mine.output


def test_what_inspection_does_not_find_is_refused_with_the_way_to_describe_it(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own.pretrained()
    before = snapshot(model)
    monkeypatch.setattr("unipelt.hosts.shrink.MOST_PARAMETERS", 1)
    with pytest.raises(
        unipelt.InjectionError, match="there is no description of 'own' models, and inspection did not find one: "
    ):
        unipelt.inject(model, "adapter")
    with pytest.raises(unipelt.InjectionError, match=r'unipelt\.register_family\("own", unipelt\.Stack\('):
        unipelt.inject(model, "adapter")
    assert_untouched(model, before)


WRONG = {
    "layers": (unipelt.Stack("layers", ATTENTION, output="down"), "it has no layers at 'layers'"),
    "attention": (unipelt.Stack("blocks", unipelt.Attention("attn", "q", "v"), output="down"), "attn"),
    "query": (unipelt.Stack("blocks", unipelt.Attention("attention", "query", "v"), output="down"), "query"),
    "value": (unipelt.Stack("blocks", unipelt.Attention("attention", "q", "w"), output="down"), "w"),
    "output": (unipelt.Stack("blocks", ATTENTION, output="mlp"), "mlp"),
    "norm": (unipelt.Stack("blocks", ATTENTION, norm="norm3"), "norm3"),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_wrong_path_is_named_and_the_model_untouched(own: ModuleType, part: str) -> None:
    stack, said = WRONG[part]
    unipelt.register_family("own", stack)
    model = own.pretrained()
    before = snapshot(model)
    with pytest.raises(
        unipelt.InjectionError, match=f"OwnClassifier is not built as 'own' models are: .*{said}"
    ) as caught:
        unipelt.inject(model, "unipelt-apl")
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


def test_a_place_that_is_no_projection_is_refused(own: ModuleType) -> None:
    unipelt.register_family("own", unipelt.Stack("blocks", unipelt.Attention("", "norm1", "up"), output="down"))
    model = own.pretrained()
    before = snapshot(model)
    with pytest.raises(unipelt.InjectionError, match="norm1 is a LayerNorm; submodules attach to a Linear or Conv1D"):
        unipelt.inject(model, "lora")
    assert_untouched(model, before)


def test_what_a_description_refuses_is_refused_with_its_reason(own: ModuleType) -> None:
    unipelt.register_family("own", STACK, refused={"adapter": "it has no room", "prefix": "nor for this"})
    model = own.pretrained()
    before = snapshot(model)
    with pytest.raises(unipelt.InjectionError, match=r"^'own' models cannot take an adapter: it has no room$"):
        unipelt.inject(model, "unipelt-al")
    with pytest.raises(unipelt.InjectionError, match=r"cannot take a prefix: nor for this; take a method without"):
        unipelt.inject(model, "prefix")
    assert_untouched(model, before)
    unipelt.inject(model, "lora")


def test_lora_may_be_refused_too(own: ModuleType) -> None:
    unipelt.register_family("own", STACK, refused={"lora": "its weights are no matrices"})
    with pytest.raises(unipelt.InjectionError, match=r"cannot take LoRA: its weights are no matrices$"):
        unipelt.inject(own.pretrained(), "unipelt-al")
    unipelt.inject(own.pretrained(), "unipelt-ap")


class SoftmaxAttention(nn.Module):
    """An attention that computes its own softmax."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = like.q, like.k, like.v, like.out

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (4, -1)).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min).softmax(dim=-1)
        return self.out((weights @ value).transpose(1, 2).flatten(-2))


def test_an_attention_of_its_own_softmax_takes_everything_but_a_prefix(own: ModuleType) -> None:
    unipelt.register_family("own", STACK)
    model = own.pretrained()
    batch = own.texts(4, seed=0)
    want = model(**batch).logits
    for block in model.model.blocks:
        block.attention = SoftmaxAttention(block.attention)
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-5, rtol=1e-5)
    before = snapshot(model)
    for method in ("unipelt-apl", "prefix"):
        with pytest.raises(unipelt.InjectionError, match=r"a prefix cannot enter SoftmaxAttention: .* interface"):
            unipelt.inject(model, method)
        assert_untouched(model, before)
    unipelt.inject(model, "unipelt-al")
    shake(model)
    assert not any(isinstance(module, Prefix) for module in model.modules())
    other = unipelt.inject(own.pretrained(), "unipelt-al")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=1e-5, rtol=1e-5)
    assert (model(**batch).logits - want).abs().max() > 1e-3


def test_a_feed_forward_network_in_a_row_of_modules_gets_its_adapter_once(own: ModuleType) -> None:
    """`nn.Sequential` runs whatever is put into it as one more step, so the adapter goes to its last one."""
    model = own.pretrained()
    for block in model.model.blocks:
        block.mlp = nn.Sequential(block.up, nn.GELU(), block.down)
        block.forward = _forward_by_row.__get__(block)
    unipelt.register_family("own", unipelt.Stack("blocks", ATTENTION, output="mlp"))
    before = snapshot(model)
    with pytest.raises(unipelt.InjectionError, match=r"mlp is a Sequential.* 'mlp\.2'"):
        unipelt.inject(model, "adapter")
    assert_untouched(model, before)
    del FAMILIES["own"]
    unipelt.register_family("own", unipelt.Stack("blocks", ATTENTION, output="mlp.2"))
    torch.manual_seed(1)
    unipelt.inject(model, "unipelt-apl")
    shake(model)
    del FAMILIES["own"]
    unipelt.register_family("own", STACK)
    other = own.pretrained()
    torch.manual_seed(1)
    unipelt.inject(other, "unipelt-apl")
    shake(other)
    batch = own.texts(4, seed=0)
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=1e-5, rtol=1e-5)


class Routed(nn.Module):
    """A feed-forward network that gives more than its output, as mixtures of experts do."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.up, self.down = block.up, block.down

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        inner = nn.functional.gelu(self.up(states))
        return self.down(inner), inner


def _forward_routed(self: Any, states: Tensor, attention_mask: Tensor) -> Tensor:
    states = states + self.attention(self.norm1(states), attention_mask)
    update, inner = self.mlp(self.norm2(states))
    assert inner.shape[-1] == self.up.out_features
    return states + update


@pytest.mark.parametrize("causal", [False, True])
def test_a_feed_forward_network_that_gives_more_than_its_output(own: ModuleType, causal: bool) -> None:
    """The adapter, and its gate, belong to the first of what it gives."""
    models = []
    for routed in (True, False):
        model = own.pretrained()
        if routed:
            for block in model.model.blocks:
                block.mlp = Routed(block)
                block.forward = _forward_routed.__get__(block)
        FAMILIES.pop("own", None)
        output = "mlp" if routed else "down"
        unipelt.register_family("own", unipelt.Stack("blocks", ATTENTION, output=output, causal=causal))
        torch.manual_seed(1)
        models.append(unipelt.inject(model, "unipelt-apl"))
        shake(models[-1])
    batch = own.texts(4, seed=0)
    torch.testing.assert_close(models[0](**batch).logits, models[1](**batch).logits, atol=1e-5, rtol=1e-5)
    models[0](**batch).loss.backward()
    for name, parameter in own_parameters(models[0]).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def _forward_by_row(self: Any, states: Tensor, attention_mask: Tensor) -> Tensor:
    states = states + self.attention(self.norm1(states), attention_mask)
    return states + self.mlp(self.norm2(states))


def test_a_model_without_an_eager_attention_is_told_to_use_another(own: ModuleType) -> None:
    unipelt.register_family("own", STACK)
    model = unipelt.inject(own.pretrained(), "prefix")
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r"no eager_attention_forward beside OwnAttention; call model\.set_attn_impl"):
        model(**own.texts(2, seed=0))


def test_cross_attention_that_looks_both_ways_is_refused(own: ModuleType) -> None:
    """Its gates would have to average over queries by a mask that is of keys."""
    place = unipelt.Attention("attention", "q", "v")
    unipelt.register_family("own", unipelt.Stack("blocks", place, output="down", cross=place))
    model = own.pretrained()
    before = snapshot(model)
    with pytest.raises(unipelt.InjectionError, match="cross=False"):
        unipelt.inject(model, "lora")
    assert_untouched(model, before)
    unipelt.inject(model, {"preset": "lora", "cross": False})
