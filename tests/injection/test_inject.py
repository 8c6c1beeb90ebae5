"""Injection and removal, and what must hold of an injected model whatever its weights."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, shake, tiny_batch, tiny_bert
from inside import added_to, fill, is_idle, parts
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    ViTConfig,
    ViTModel,
)

import unipelt
import unipelt.api
from unipelt.config.presets import resolve
from unipelt.injection.draft import draft, shapes
from unipelt.injection.inject import inject_as
from unipelt.injection.state import injection_of
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.forward_pass import AttentionPass, ForwardPass, PassFacts
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import Prefix, PrefixNetwork
from unipelt.submodules.room import own_parameters, own_parts, rooms
from unipelt.submodules.tokens import token_weights

MASS = {"preset": "unipelt-apl", "prefix": {"gating": "mass"}}


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [False, True])
def test_new_modules_are_in_the_mode_of_the_model(training: bool, tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert().train(training), "unipelt-apl")
    unipelt.save(model, tmp_path)
    for changed in (model, unipelt.load(tiny_bert().train(training), tmp_path)):
        assert {module.training for module in changed.modules()} == {training}


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_remove_is_bitwise_even_after_training(preset: str) -> None:
    model: Any = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    model.config.problem_type = "single_label_classification"  # or the first loss would write it
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    out = logits(model, tiny_batch())
    config, kinds = model.config.to_dict(), [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    assert unipelt.inject(model, preset) is model
    shake(model)
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert unipelt.remove(model) is model
    assert_same(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, tiny_batch()), out)
    unipelt.inject(model, preset)


@pytest.mark.parametrize("preset", unipelt.PRESETS)
def test_the_original_checkpoint_still_loads(preset: str) -> None:
    model, other = unipelt.inject(tiny_bert(), preset), tiny_bert(seed=5)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_every_layer_carries_what_the_config_says() -> None:
    base: Any = tiny_bert()
    names = {name for name, _ in base.named_modules()}
    model: Any = unipelt.inject(base, "unipelt-apl")
    for layer in model.bert.encoder.layer:
        added = added_to(layer)
        assert type(added.lora_query) is type(added.lora_value) is LoRA
        assert set(added.terms) == {"lora_query", "lora_value", "adapter"}
        assert type(added.prefix) is Prefix
        assert added.entry is not None
        assert added.entry.gates.names == ("prefix", "lora_query", "lora_value")
        assert added.entry.row_names == ("lora_query", "lora_value")
        assert type(added.adapter) is Adapter
        assert added.adapter.entry is not None
        assert added.adapter.entry.gates.names == added.adapter.entry.row_names == ("adapter",)
        assert added.cross is None
        wiring = added.wiring
        assert wiring.outputs == {"attention.self.query": ("lora_query",), "attention.self.value": ("lora_value",)}
        assert (wiring.attention, wiring.norm) == ("attention.self", "output.LayerNorm")
        assert not wiring.inputs
        assert not wiring.handed
        assert not wiring.lengthens
        hooked = {name for name, part in layer.named_modules() if part._forward_hooks or part._forward_pre_hooks}
        assert hooked == {"", wiring.attention, *wiring.outputs, wiring.norm}
    assert type(added_to(model.bert.encoder).prefix_network) is PrefixNetwork
    assert [path for path, _ in rooms(model)] == [
        *(f"bert.encoder.layer.{index}.unipelt" for index in range(3)),
        "bert.encoder.unipelt",
    ]
    inside = {name for path, room in rooms(model) for name in (path, *(f"{path}.{n}" for n, _ in room.named_modules()))}
    assert {name for name, _ in model.named_modules()} - names == {name.rstrip(".") for name in inside}


def test_layers_without_submodules_are_untouched() -> None:
    model: Any = unipelt.inject(tiny_bert(), {"preset": "unipelt-apl", "layers": [2]})
    for layer in model.bert.encoder.layer[:2]:
        assert all(type(module).__module__.startswith(("torch.", "transformers.")) for module in layer.modules())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules())
    counts = unipelt.parameter_counts(model)
    assert counts.gates == {"prefix": 33, "lora_query": 33, "lora_value": 33, "adapter": 33}
    with unipelt.record_gates(model) as gates:
        logits(model, tiny_batch())
    assert gates["prefix"].shape == (3, 1)


def test_initialisation() -> None:
    model: Any = unipelt.inject(tiny_bert(hidden_size=256, intermediate_size=64), "unipelt-apl")
    network = added_to(model.bert.encoder).prefix_network
    for weight in (network.embedding, network.w1.weight, network.w2.weight):
        assert abs(weight.std().item() - 0.02) < 2e-3
    for linear in (network.w1, network.w2):
        assert not linear.bias.any()
    of_layer = {name.partition("layer.1.")[2]: tensor for name, tensor in parts(model).items() if "layer.1." in name}
    for name in ("adapter.down", "adapter.up"):
        assert not of_layer[f"{name}.bias"].any()
        assert abs(of_layer[f"{name}.weight"].std().item() - 0.02) < 2e-3
    bound = (1 / 256) ** 0.5  # Kaiming-uniform, a = sqrt(5): sqrt(6 / ((1 + 5) fan_in))
    for name in ("lora_query", "lora_value"):
        assert not of_layer[f"{name}.B"].any()
        assert bound * 0.97 < of_layer[f"{name}.A"].abs().max() <= bound
    for name in ("prefix", "lora_query", "lora_value", "adapter"):
        assert abs(of_layer[f"gate.{name}.weight"].std().item() - 0.02) < 5e-3
        assert not of_layer[f"gate.{name}.bias"].any()
    with unipelt.record_gates(model) as gates:
        logits(model, tiny_batch())
    assert all((values - 0.5).abs().max() < 0.25 for values in gates.values())


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "base"])
@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_submodules_are_in_single_precision_over_half_or_of_their_hosts_kind(
    base: torch.dtype, dtype: str, deployed: bool
) -> None:
    model: Any = tiny_bert()
    model.to(base)
    config = unipelt.resolve({"preset": "unipelt-apl", "dtype": dtype})
    inject_as(model, config, deployed=deployed, head=None)
    assert {own.part.kind for own in own_parts(model)} == {"adapter", "prefix", "lora", "gate"}
    assert {own.full_name for own in own_parts(model)} == own_parameters(model).keys()
    want = torch.float32 if dtype == "float32" and base.itemsize == 2 else base
    for name, parameter in own_parameters(model).items():
        assert (parameter.device.type, parameter.dtype) == ("cpu", want), name
    assert {parameter.dtype for parameter in model.classifier.parameters()} == {want}, "the head trains too"
    assert model.bert.pooler.dense.weight.dtype == base


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_draft_is_what_injecting_makes_without_memory(base: torch.dtype, deployed: bool) -> None:
    model: Any = tiny_bert()
    model.to(base)
    config = unipelt.resolve({"preset": "unipelt-apl", "prompt": {"length": 2}, "tokens": {"ids": [3, 7]}})
    before, modules = state(model), list(model.modules())
    drawn = shapes(draft(model, config, deployed))
    assert_same(model, before)
    assert list(model.modules()) == modules
    assert all(tensor.is_meta for tensor in drawn.values())
    inject_as(model, config, deployed=deployed, head=None)
    made = {name: (parameter.shape, parameter.dtype) for name, parameter in own_parameters(model).items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in drawn.items()} == made


def passes_alive() -> list[Any]:
    """Whatever is there of any pass, without a collection of garbage."""
    return [found for found in gc.get_objects() if type(found) in (ForwardPass, AttentionPass, PassFacts)]


PARTLY_GATED = (
    {"adapter": {"gate": False}},
    {"prefix": {"gate": False}},
    {"lora": {"gate": False}},
    {"lora": {"gate": False}, "prefix": {"gate": False}},
    {"adapter": None, "prefix": None},
)


@pytest.mark.parametrize("changes", [{}, *PARTLY_GATED], ids=str)
def test_a_pass_leaves_nothing_behind(changes: dict[str, Any]) -> None:
    """What nobody takes would be kept, with its graph, until the next pass."""
    model: Any = unipelt.inject(tiny_bert(), changes)
    passes = {id(room.passes): room.passes for _, room in rooms(model)}.values()
    assert len(passes) == 1
    inside: list[list[Any]] = []
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: inside.append(passes_alive()))
    gc.collect()
    loss = model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss
    assert {type(found) for found in inside[0]} >= {ForwardPass, PassFacts}
    inside.clear()
    assert not passes_alive()
    loss.backward()
    assert not passes_alive()
    for one in passes:
        assert one.current() is None
        assert is_idle(one)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["encoder.layer.1", "encoder.layer.1.attention.self.key", "encoder.layer.2.output"])
def test_a_pass_that_breaks_off_leaves_nothing_behind(place: str, error: type[BaseException]) -> None:
    model: Any = unipelt.inject(tiny_bert(), "unipelt-apl")
    shake(model)
    want = logits(model, tiny_batch())
    passes = next(rooms(model))[1].passes

    def fail(*_: Any) -> None:
        assert passes.current() is not None
        raise error("here")

    handle = model.bert.get_submodule(place).register_forward_hook(fail)
    gc.collect()
    ended = False
    try:
        model(**tiny_batch(), labels=torch.tensor([0, 1, 1]))
        ended = True
    except error:  # and not pytest.raises, which keeps the frames
        pass
    assert not ended
    assert not passes_alive()
    assert passes.current() is None
    handle.remove()
    assert torch.equal(logits(model, tiny_batch()), want)
    assert is_idle(passes)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_that_breaks_off_leaves_nothing_behind(reentrant: bool, error: type[BaseException]) -> None:
    """As for want of memory, where checkpointed layers are computed again."""
    model: Any = unipelt.inject(tiny_bert(), "unipelt-apl").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    passes = next(rooms(model))[1].passes
    inside: list[list[Any]] = []

    def fail(*_: Any) -> None:
        inside.append(passes_alive())
        raise error("here")

    def watch(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    computed: list[int] = []
    model.bert.encoder.layer[2].register_forward_pre_hook(lambda *_: computed.append(1))
    model.bert.encoder.layer[0].register_forward_hook(watch)
    loss = model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss
    gc.collect()
    assert not passes_alive()
    ended = False
    try:
        loss.backward()
        ended = True
    except error:
        pass
    assert not ended
    assert inside
    if len(computed) == 1:  # Transformers 5.0 calls a layer's hooks again, which end what they began
        assert inside[0], "two layers were computed again"
    inside.clear()
    del loss
    assert not passes_alive()
    assert is_idle(passes)


def test_only_what_trains_of_the_base_is_remembered() -> None:
    for preset, kept in (("unipelt-apl", {"classifier.weight", "classifier.bias"}), ("fine-tuning", None)):
        model = tiny_bert()
        names = {name for name, _ in model.named_parameters()}
        unipelt.inject(model, preset)
        assert injection_of(model).originals.keys() == (names if kept is None else kept)


@pytest.mark.parametrize("config", ["unipelt-apl", MASS, "unipelt-al", "prefix"])
def test_padding_and_neighbours_do_not_matter(config: object) -> None:
    model: Any = unipelt.inject(tiny_bert(), config)  # type: ignore[arg-type]
    shake(model)
    batch = tiny_batch()
    alone = torch.cat(
        [
            logits(model, {key: tensor[i : i + 1, :length] for key, tensor in batch.items()})
            for i, length in enumerate((5, 9, 7))
        ]
    )
    wider = {key: torch.nn.functional.pad(tensor, (0, 20)) for key, tensor in batch.items()}
    for other in (batch, wider):
        torch.testing.assert_close(logits(model, other), alone, atol=1e-5, rtol=0)


def test_mean_pooling_is_the_release_and_sees_padding() -> None:
    model: Any = unipelt.inject(tiny_bert(), {"preset": "unipelt-apl", "gate": {"pooling": "mean"}})
    shake(model)
    batch = tiny_batch()
    wider = {key: torch.nn.functional.pad(tensor, (0, 20)) for key, tensor in batch.items()}
    assert (logits(model, wider) - logits(model, batch)).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_closed_mass_gate_is_the_model_without_prefix(attention: str, padded: bool) -> None:
    base = tiny_bert(attn_implementation=attention)
    batch = tiny_batch() if padded else tiny_batch(lengths=(9, 9, 9))
    want = logits(base, batch)
    for gating in ("mass", "scale"):
        model = copy.deepcopy(base)
        unipelt.inject(model, {"preset": "prefix", "prefix": {"gate": True, "gating": gating}})
        shake(model)
        with torch.no_grad():
            model.classifier.load_state_dict(base.classifier.state_dict())
        assert fill(model, "gate.prefix.weight", 0.0) == fill(model, "gate.prefix.bias", -1e4) == 3
        got = model(**batch).logits
        if gating == "mass":
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
            got.sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all(), name
        else:
            assert (got - want).abs().max() > 1e-4, "footnote 3: a closed gate still takes softmax mass"


def test_zero_updates_are_the_identity() -> None:
    base, batch = tiny_bert(), tiny_batch()
    want = logits(base, batch)
    model: Any = unipelt.inject(base, "lora")
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=0)  # B starts at zero
    unipelt.remove(model)
    unipelt.inject(model, "adapter")
    assert (logits(model, batch) - want).abs().max() > 1e-5  # near, not at, the identity
    assert fill(model, "adapter.up.weight", 0.0) == 3
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=0)


def test_back_ends_agree_and_switch_after_injection() -> None:
    model: Any = unipelt.inject(tiny_bert(), "unipelt-apl")
    shake(model)
    batch = tiny_batch()
    sdpa = logits(model, batch)
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    torch.testing.assert_close(out.logits, sdpa, atol=1e-5, rtol=0)
    assert len(out.attentions) == 3
    length = 10
    for weights in out.attentions:
        assert weights.shape == (3, 4, 9, length + 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 9))
        assert (weights[..., :length] > 0).all()
        assert not weights[0, ..., length + 5 :].any()


def test_other_back_ends_are_refused() -> None:
    model: Any = tiny_bert()
    model.config._attn_implementation = "flash_attention_2"
    before = state(model)
    with pytest.raises(ValueError, match="back-ends eager and sdpa, not 'flash_attention_2'"):
        unipelt.inject(model, "prefix")
    assert_same(model, before)
    model.config._attn_implementation = "sdpa"
    unipelt.inject(model, "prefix")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="not 'flex_attention'"):
        model.bert.encoder.layer[0](torch.zeros(1, 2, 32), attention_mask=None)


def test_bad_models_are_refused_and_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(unipelt.InjectionError, match="no description of 'vit' models, and inspection did not find one"):
        unipelt.inject(vit, "adapter")
    with pytest.raises(unipelt.InjectionError, match="takes a PreTrainedModel"):
        unipelt.inject(torch.nn.Linear(2, 2), "adapter")  # type: ignore[arg-type]
    model: Any = tiny_bert()
    before = state(model)
    with pytest.raises(unipelt.ConfigError, match="there is no preset 'xyz'; the presets are fine-tuning"):
        unipelt.inject(model, "xyz")
    with pytest.raises(unipelt.InjectionError, match="layers names 3, but the model's 3 layers are 0 to 2"):
        unipelt.inject(model, {"preset": "adapter", "layers": [0, 3]})
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.remove(model)
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.parameter_counts(model)
    model.bert.encoder.layer[1].attention.self.query = torch.nn.Bilinear(32, 32, 32)
    with pytest.raises(unipelt.InjectionError, match="query is a Bilinear"):
        unipelt.inject(model, "lora")
    model = tiny_bert()
    unipelt.inject(model, "unipelt-apl")
    injected = state(model)
    for part in (model, model.bert):
        with pytest.raises(unipelt.InjectionError, match="carries submodules already"):
            unipelt.inject(part, "lora")
        assert_same(model, injected)
    model.peft_config = {}  # as PEFT marks the model that it holds
    with pytest.raises(ValueError, match=r"PEFT holds the sets of this BertFor.*; call model = unipelt\.from_peft"):
        unipelt.remove(model)
    assert_same(model, injected)
    del model.peft_config
    unipelt.remove(model)
    assert_same(model, before)


@pytest.mark.parametrize("config", ["unipelt-apl", "prompt"])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("encoder", "unipelt"),
        ("encoder", "unipelt_layer"),
        ("encoder.layer.1", "unipelt"),
        ("encoder.layer.1", "unipelt_chunk_size"),
        ("encoder.layer.1.attention.self", "unipelt_port"),
        ("encoder.layer.1.attention.self.query", "unipelt_port"),
        ("encoder.layer.1.output.LayerNorm", "unipelt_port"),
        ("embeddings.word_embeddings", "unipelt_tokens"),
        ("", "unipelt"),
        ("", "unipelt_prompt"),
    ],
)
@pytest.mark.parametrize("mine", ["text", "module"])
def test_what_a_host_calls_by_one_of_our_names_is_its_own(place: str, name: str, mine: str, config: str) -> None:
    model: Any = tiny_bert()
    host = model.bert.get_submodule(place)
    value = "mine" if mine == "text" else torch.nn.Linear(2, 2)
    setattr(host, name, value)
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(unipelt.InjectionError, match=rf"has an attribute '{name}' of its own"):
        unipelt.inject(model, config)
    assert getattr(host, name) is value
    assert_same(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("encoder", "prefix_network"),
        ("encoder.layer.1.attention.self", "gates"),
        ("encoder.layer.1.attention.self", "prefix"),
        ("encoder.layer.1.attention.self.query", "lora_query"),
        ("encoder.layer.1.attention.self.value", "lora_value"),
        ("encoder.layer.1.output.LayerNorm", "adapter"),
    ],
)
def test_other_names_are_free(place: str, name: str) -> None:
    model: Any = tiny_bert()
    host = model.bert.get_submodule(place)
    setattr(host, name, torch.nn.Linear(2, 2))
    before = state(model)
    mine = getattr(host, name)
    unipelt.inject(model, "unipelt-apl")
    shake(model)
    assert getattr(host, name) is mine
    logits(model, tiny_batch())
    unipelt.remove(model)
    assert_same(model, before)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_bert()
    before, attributes = state(model), [set(vars(module)) for module in model.modules()]
    calls = []

    def fail(self: LoRA, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError("no room")
        original(self, *args)

    original = LoRA.__init__
    monkeypatch.setattr(LoRA, "__init__", fail)
    with pytest.raises(MemoryError):
        unipelt.inject(model, "unipelt-apl")
    assert len(calls) == 4
    assert_same(model, before)
    assert [type(module) for module in model.modules()] == [type(module) for module in tiny_bert().modules()]
    assert [set(vars(module)) for module in model.modules()] == attributes
    monkeypatch.undo()
    unipelt.inject(model, "unipelt-apl")


def test_attention_that_takes_other_arguments_is_refused_or_checked_at_its_call() -> None:
    model: Any = tiny_bert()
    attention = model.bert.encoder.layer[1].attention.self
    forward, before = attention.forward, state(model)

    def renamed(states: Tensor, attention_mask: Tensor | None = None) -> Any:
        return forward(states, attention_mask)

    def passed_through(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    attention.forward = renamed
    with pytest.raises(unipelt.InjectionError, match=r"the forward of Bert.* has no argument 'hidden_states'"):
        unipelt.inject(model, "unipelt-apl")
    assert_same(model, before)
    assert getattr(model, "unipelt_injection", None) is None
    attention.forward = passed_through
    unipelt.inject(model, "unipelt-apl")
    with pytest.raises(RuntimeError, match="attention was called without 'hidden_states'"):
        logits(model, tiny_batch())


def test_layers_of_other_widths_take_no_prefix() -> None:
    model: Any = tiny_bert()
    model.bert.encoder.layer[2].attention.self.value = torch.nn.Linear(32, 16)
    before = state(model)
    with pytest.raises(
        unipelt.InjectionError, match=r"needs layers of one width, and their values are \[16, 32\] wide"
    ):
        unipelt.inject(model, "prefix")
    assert_same(model, before)
    assert getattr(model, "unipelt_injection", None) is None


def test_a_head_that_the_model_does_not_have_is_named() -> None:
    model: Any = tiny_bert()
    with pytest.raises(unipelt.InjectionError, match=r"has no head parameter 'classifier\.scale'"):
        inject_as(model, resolve("lora"), deployed=False, head=frozenset({"classifier.weight", "classifier.scale"}))
    assert getattr(model, "unipelt_injection", None) is None


@pytest.mark.parametrize("config", ["adapter", "prefix", "lora"])
@pytest.mark.parametrize("place", ["", "attention", "attention.self.query", "attention.self", "output.LayerNorm"])
def test_layers_that_share_modules_are_refused(place: str, config: str) -> None:
    model: Any = tiny_bert()
    layers = model.bert.encoder.layer
    if place:
        parent, _, name = place.rpartition(".")
        setattr(layers[2].get_submodule(parent), name, layers[1].get_submodule(place))
    else:
        layers[2] = layers[1]
    before, attributes = state(model), [set(vars(module)) for module in model.modules()]
    hosts = {"adapter": "output.LayerNorm", "prefix": "attention.self", "lora": "attention.self.query"}
    if not hosts[config].startswith(place):  # nothing is added at what is shared
        unipelt.inject(model, config)
        unipelt.remove(model)
    else:
        with pytest.raises(unipelt.InjectionError, match="share modules"):
            unipelt.inject(model, config)
    assert not any(isinstance(module, (Adapter, Prefix, LoRA)) for module in model.modules())
    assert_same(model, before)
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_models_without_a_classification_head() -> None:
    config = tiny_bert().config
    batch = tiny_batch()
    for cls in (BertModel, BertForTokenClassification, BertForMaskedLM):
        torch.manual_seed(0)
        model = cls(config).eval()
        before = state(model)
        unipelt.inject(model, "unipelt-apl")
        with torch.no_grad():
            model(**batch)
        unipelt.remove(model)
        assert_same(model, before)


def test_token_weights() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    want = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    additive = torch.where(mask[:, None, None].bool(), 0.0, torch.finfo(torch.float32).min)
    infinite = torch.where(mask[:, None, None].bool(), 0.0, -torch.inf)
    four = mask[:, None, None].bool().expand(2, 1, 3, 3)
    for form in (mask, mask.bool(), four, four.clone(), additive, additive.expand(2, 1, 3, 3), infinite):
        weights = token_weights(form, 2)
        assert weights is not None
        torch.testing.assert_close(weights, want)
    assert token_weights(None, 2) is None
    shared = token_weights(mask[:1], 3)
    assert shared is not None
    assert shared.shape == (3, 3)
    nobody = token_weights(torch.zeros(1, 3, dtype=torch.long), 1)
    assert nobody is not None
    assert not nobody.any()
