"""The same promises for every architecture of the table."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_near, shake
from inside import added_to, gradients_of_parts, parts
from tiny import (
    DECODERS,
    DEPTH,
    ENCODER_DECODERS,
    ENCODERS,
    FAMILIES,
    FURTHER,
    KINDS,
    SIMPLE,
    WITH_PREFIX,
    WITHOUT_INTERFACE,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn

import unipelt
from unipelt.hosts.families import FAMILIES as ALL_FAMILIES
from unipelt.hosts.generate import text_types
from unipelt.injection.state import injection_of
from unipelt.submodules.adapter import Adapter
from unipelt.submodules.gate import Gates
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import Prefix, PrefixNetwork
from unipelt.submodules.room import own_parameters
from unipelt.submodules.tokens import token_weights

PARTS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 12},  # ReLUs of fewer may be closed for every token
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3, "alpha": 6.0},
}
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
ALWAYS_TIED = ("t5", "mt5", "umt5", "marian")
"""Transformers (of Marian, 5.0.0) ties input and output embeddings whatever the configuration is given."""
LANGUAGE_MODELS = ("MaskedLM", "CausalLM", "Seq2SeqLM")


def _mapped(head: str, family: str) -> bool:
    mapping = getattr(transformers, f"AutoModelFor{head}")._model_mapping
    return type(tiny_config(family)) in mapping


TASK_HEADS = [(family, head) for family in FAMILIES for head in TASKS if _mapped(head, family)]
LANGUAGE_HEADS = [(family, head) for family in FAMILIES for head in LANGUAGE_MODELS if _mapped(head, family)]


def small(preset: str, **changes: Any) -> unipelt.UniPELTConfig:
    """A preset with submodules as small as the tiny models."""
    config = unipelt.resolve(preset)
    return config.updated({name: part for name, part in PARTS.items() if getattr(config, name)}).updated(changes)


def method(family: str, **changes: Any) -> unipelt.UniPELTConfig:
    """Everything of the paper that the family can take, gated; in one family of each kind, all there is."""
    further = FURTHER if family in KINDS else {}
    return small("unipelt-apl" if family in WITH_PREFIX else "unipelt-al", **{**further, **changes})


def make(family: str, **options: Any) -> Any:
    model = unipelt.inject(tiny_model(family, **options), method(family))
    shake(model)
    return model


def first(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits, whatever the head calls them."""
    out: Tensor = model(**batch)[0]
    return out


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return first(model, batch)


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of a random sum of the logits; of a decoder's, those of real tokens."""
    model.zero_grad()
    torch.manual_seed(0)
    out = first(model, batch)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    mask = batch["attention_mask"]
    if out.shape[:2] == mask.shape:
        weights = weights * mask.unsqueeze(-1)
    (out * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(got: dict[str, Tensor | None], want: dict[str, Tensor | None], rtol: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] is None) == (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(got[name], tensor, atol=1e-5 * tensor.abs().max().item() + 1e-7, rtol=rtol)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def trained(model: Any) -> set[str]:
    """Names of the model's own parameters that train."""
    ours = own_parameters(model).keys()
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad} - ours


def positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Where each token stands, for the models that do not count from the mask themselves."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


# The layers


@pytest.mark.parametrize("family", FAMILIES)
def test_submodules_move_the_logits_of_every_layer(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    want = logits(model, batch)
    for layer in range(DEPTH if family != "albert" else 1):
        unipelt.inject(model, method(family, layers=[layer]))
        assert (logits(model, batch) - want).abs().max() > 1e-6, layer
        shake(model)
        assert (logits(model, batch) - want).abs().max() > 1e-3, layer
        unipelt.remove(model)
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", [*ENCODERS, *ENCODER_DECODERS])
def test_padding_does_not_matter_to_an_encoder(family: str) -> None:
    model, lengths = make(family), (5, 9, 7)
    batch = tiny_batch(family, lengths=lengths)
    wider = {
        name: tensor if name == "decoder_input_ids" else nn.functional.pad(tensor, (0, 7), value=name == "input_ids")
        for name, tensor in batch.items()
    }
    for i, length in enumerate(lengths):
        alone = {name: tensor[i : i + 1, : min(length, tensor.shape[1])] for name, tensor in batch.items()}
        if family in ENCODER_DECODERS:
            alone["decoder_input_ids"] = batch["decoder_input_ids"][i : i + 1]
        want = logits(model, alone)[0]
        for other in (batch, wider):
            assert_near(logits(model, other)[i], want)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_padding_does_not_matter_to_a_decoder(family: str, left: bool) -> None:
    model, lengths = make(family), (5, 9, 7)
    batch = tiny_batch(family, lengths=lengths, left=left)
    together = logits(model, {**batch, **positions(model, batch["attention_mask"])})
    for i, length in enumerate(lengths):
        real = batch["attention_mask"][i].bool()
        want = logits(model, {name: tensor[i : i + 1, real] for name, tensor in batch.items()})[0]
        assert len(want) == length
        assert_near(together[i, real], want)


def switches(family: str) -> bool:
    """Whether Transformers takes another back-end for the model after it was made."""
    model = tiny_model(family, "Model")
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa" if own == "eager" else "eager")
    except ValueError:
        assert not type(model)._supports_sdpa
    return bool(model.config._attn_implementation != own)


@pytest.mark.parametrize("family", FAMILIES)
def test_back_ends_agree(family: str) -> None:
    model, batch = make(family), tiny_batch(family)
    if not switches(family):
        return  # Transformers runs these by one back-end only
    real = batch["attention_mask"].bool() if family in DECODERS else slice(None)
    bare = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    cases: list[tuple[dict[str, Any], Any]] = [(bare, slice(None)), (batch, real)]
    if family in DECODERS:
        seen = batch["attention_mask"].bool()[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
        added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        place = torch.arange(9).expand(3, 9)
        cases.append(({"input_ids": batch["input_ids"], "attention_mask": added, "position_ids": place}, real))
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    sdpa = [logits(model, case)[where] for case, where in cases]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    for (case, where), want in zip(cases, sdpa, strict=True):
        assert_near(logits(model, case)[where], want)
    if family in DECODERS and not getattr(model.config, "sliding_window", None):
        assert_near(sdpa[2], sdpa[1])


# Reversible, copied, saved, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_is_bitwise(family: str) -> None:
    model: Any = tiny_model(family)
    next(model.parameters()).requires_grad_(False)
    batch = tiny_batch(family)
    want = logits(model, batch)  # a first pass may leave something behind in the model
    before, config = state(model), model.config.to_dict()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    kept = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    unipelt.inject(model, method(family))
    assert {name: tensor for name, tensor in model.state_dict().items() if name in before}.keys() == before.keys()
    shake(model)
    gradients(model, batch)
    unipelt.remove(model)
    assert_same(model.state_dict(), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == modules
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(model.get_submodule(name).config is held for name, held in kept.items())
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_checkpoint_still_loads(family: str) -> None:
    model, other = make(family), tiny_model(family, seed=5)
    ours = own_parameters(model).keys()
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == ours
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_checkpoints_are_equal(family: str, tmp_path: Path) -> None:
    model, batch = make(family), tiny_batch(family)
    want = logits(model, batch)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, batch), want)
    for deploy in (False, True):
        unipelt.save(model, tmp_path / str(deploy), deploy=deploy)
        loaded: Any = unipelt.load(tiny_model(family), tmp_path / str(deploy))
        networks = [module for module in loaded.modules() if isinstance(module, PrefixNetwork)]
        assert bool(networks) == (family in WITH_PREFIX and not deploy)
        assert torch.equal(logits(loaded, batch), want)
    shake(copied, seed=7)
    assert (logits(copied, batch) - want).abs().max() > 1e-3
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_just_what_trains(family: str) -> None:
    model = make(family).train()
    found = gradients(model, tiny_batch(family))
    wanted = own_parameters(model).keys() | injection_of(model).head
    assert {name for name, gradient in found.items() if gradient is not None} == wanted
    for name, gradient in found.items():
        assert gradient is None or (gradient.isfinite().all() and gradient.any()), name
    for name, gradient in gradients_of_parts(model).items():
        assert gradient is not None, name
        assert gradient.any(), name


# Gradient checkpointing


def checkpoint_activations(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def count_passes(model: Any) -> list[int]:
    """A list that holds, after passes, how often each adapter was called."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    passes = [0] * len(adapters)

    def count(place: int) -> None:
        passes[place] += 1

    for place, adapter in enumerate(adapters):
        # before and not after: what is computed again stops at the last number that is needed
        adapter.register_forward_pre_hook(lambda *_, place=place: count(place))
    return passes


def can_checkpoint(family: str) -> bool:
    """Some models of Transformers cannot, and say so themselves."""
    model = tiny_model(family)
    if model.supports_gradient_checkpointing:
        return True
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        checkpoint_activations(model, False)
    return False


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing(family: str, reentrant: bool) -> None:
    if not can_checkpoint(family):
        return
    model, batch = make(family, dropout=0.1).train(), tiny_batch(family)
    want = gradients(model, batch)
    model.eval()
    still = gradients(model, batch)
    with pytest.raises(AssertionError):  # dropout did something
        assert_close(still, want)
    model.train()
    passes = count_passes(model)
    checkpoint_activations(model, reentrant)
    assert_close(gradients(model, batch), want)
    assert passes == [2] * DEPTH * len(FAMILIES[family].stacks), "every layer was computed twice"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_gradients_with_checkpointing_and_inputs_embeds(family: str, reentrant: bool) -> None:
    model, texts = make(family, dropout=0.1).train(), tiny_batch(family)
    generator = torch.Generator().manual_seed(4)
    batch = {
        name.replace("input_ids", "inputs_embeds"): torch.randn(*tensor.shape, 32, generator=generator)
        for name, tensor in texts.items()
        if name.endswith("input_ids")
    }
    batch["attention_mask"] = texts["attention_mask"]
    want = gradients(model, batch)
    passes = count_passes(model)
    checkpoint_activations(model, reentrant)
    assert_close(gradients(model, batch), want)
    assert passes == [2] * DEPTH * len(FAMILIES[family].stacks), "every layer was computed twice"


# torch.compile


QUICK = ("bert", "bart", "gpt2", "llama")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family == "bert" else pytest.mark.slow) for family in FAMILIES],
)
# Bloom's own activation, as Dynamo traces it
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager(family: str) -> None:
    torch._dynamo.reset()
    model, batch = tiny_model(family), tiny_batch(family)
    if family != "albert":
        for stack in FAMILIES[family].stacks:
            # what more layers would show is not worth its time
            del model.base_model.get_submodule(stack.layers)[1 if family in QUICK else 2 :]
    unipelt.inject(model, method(family, **({} if family in QUICK else dict.fromkeys(FURTHER))))
    shake(model)
    want, out = gradients(model, batch), logits(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = batch["attention_mask"].bool() if family in DECODERS else slice(None)
    try:
        found = gradients(compiled, batch)
    except torch._dynamo.exc.Unsupported:  # PyTorch 2.6 and Transformers 5.0 together, for one
        plain = torch.compile(tiny_model(family), fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported):
            plain(**batch)
        pytest.skip("here the model does not compile without submodules either")
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert_close(got, want)
    assert_near(logits(compiled, batch)[real], out[real])


# Heads


def head_batch(family: str, head: str) -> dict[str, Tensor]:
    batch = tiny_batch(family, lengths=(9, 9, 9))
    if head in ("CausalLM", "MaskedLM", *TASKS) and not (family in ENCODER_DECODERS and head == "Seq2SeqLM"):
        batch.pop("decoder_input_ids", None)
    if head == "MultipleChoice":
        batch = {name: tensor.unsqueeze(1).repeat(1, 2, 1) for name, tensor in batch.items()}
    return batch


def outside_base(model: Any, family: str) -> set[str]:
    """Names of the parameters that the model without a head does not have."""
    base = {name for name, _ in tiny_model(family, "Model").named_parameters()}
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not {name, name.removeprefix(prefix)} & base}


@pytest.mark.parametrize(("family", "head"), TASK_HEADS)
def test_task_heads_train(family: str, head: str) -> None:
    model, batch = tiny_model(family, head), head_batch(family, head)
    try:
        logits(model, batch)
        runs = True
    except IndexError:  # two classes in transformers 5.0.0 make no pooler and ask for it
        assert head == "MultipleChoice"
        runs = False
    want = outside_base(model, family)
    assert want
    unipelt.inject(model, small("lora"))
    assert trained(model) == want
    shake(model)
    assert not runs or logits(model, batch).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_heads_of_language_models_are_frozen(family: str, head: str, tied: bool, tmp_path: Path) -> None:
    def build() -> Any:
        return tiny_model(family, head, tie_word_embeddings=tied)

    def is_tied(model: Any) -> bool:
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (inputs.data_ptr() == outputs.data_ptr()) == (inputs is outputs)
        return inputs is outputs

    if (family, head, tied, transformers.__version__) == ("camembert", "CausalLM", True, "5.0.0"):
        with pytest.raises(ValueError, match="your definition of `tie_weights_keys`"):
            build()
        return
    model = build()
    want_tied = is_tied(model)
    assert want_tied == tied or family in ALWAYS_TIED
    unipelt.inject(model, small("lora"))
    assert trained(model) == set()
    assert not model.get_output_embeddings().weight.requires_grad
    assert is_tied(model) == want_tied
    shake(model)
    batch = head_batch(family, head)
    want = logits(model, batch)
    unipelt.save(model, tmp_path)
    loaded = unipelt.load(build(), tmp_path)
    assert is_tied(loaded) == want_tied
    assert trained(loaded) == set()
    assert torch.equal(logits(loaded, batch), want)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        (family, next(head for name, head in heads if name == family))
        for heads in (TASK_HEADS, LANGUAGE_HEADS)
        for family in FAMILIES
        if family in dict(heads)
    ],
)
def test_a_head_that_its_checkpoint_did_not_hold_trains(family: str, head: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": False} if head in LANGUAGE_MODELS else {}
    tiny_model(family, "Model", **changes).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, f"AutoModelFor{head}")
    model, info = cls.from_pretrained(tmp_path / "base", output_loading_info=True)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    own = {name for name, parameter in model.named_parameters() if id(parameter) not in embeddings}
    missing = set(info["missing_keys"]) & own
    assert missing or (family in ALWAYS_TIED and head in LANGUAGE_MODELS)
    base = copy.deepcopy(model)
    unipelt.inject(model, small("lora"))
    assert trained(model) == missing
    shake(model)
    batch = head_batch(family, head)
    want = logits(model.eval(), batch)
    unipelt.save(model, tmp_path / "trained")
    if set(info["missing_keys"]) <= missing:
        loaded = unipelt.from_pretrained(tmp_path / "trained")
    else:  # Marian's embeddings in transformers 5.0.0 are lost, so what the checkpoint gives is another base each time
        loaded = unipelt.load(base, tmp_path / "trained")
    assert trained(loaded) == missing
    assert torch.equal(logits(loaded, batch), want)


# Gates


@pytest.mark.parametrize("family", WITH_PREFIX)
def test_a_closed_mass_gate_is_the_model_without_prefix(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    want = logits(model, batch)
    unipelt.inject(model, small("prefix", prefix={"gate": True, "gating": "mass"}, train_head=False))
    shake(model)
    opened = logits(model, batch)
    for name, part in parts(model, "gate").items():
        part.fill_(0.0 if name.endswith(".weight") else -1e4)
    real = batch["attention_mask"].bool() if family in DECODERS else slice(None)
    got = first(model, batch)
    assert_near(got[real], want[real], 2e-6)
    assert (opened[real] - want[real]).abs().max() > 1e-3
    got[real].sum().backward()
    found = gradients_of_parts(model)
    for name in parts(model, "gate"):
        gradient = found[name]
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("gating", ["scale", "mass"])
@pytest.mark.parametrize("family", FAMILIES)
def test_how_gates_act_is_decided_by_what_a_layer_may_see(family: str, gating: str) -> None:
    """Where attention is causal, a gate is each token's own, and acts on the prefix's mass."""
    changes = {"prefix": {"gating": gating}} if family in WITH_PREFIX else {}
    pooling = "mean" if gating == "mass" else "masked_mean"
    model = unipelt.inject(tiny_model(family), method(family, gate={"pooling": pooling}, **changes))
    kinds = set()
    for name, module in model.named_modules():
        causal = family in DECODERS or ".decoder." in f".{name}"
        if isinstance(module, Prefix):
            kinds.add("prefix")
            assert module.gating == ("mass" if causal else gating), name
        if isinstance(module, Gates):
            kinds.add("gates")
            assert module.pooling == ("token" if causal else pooling), name
    assert kinds == ({"prefix", "gates"} if family in WITH_PREFIX else {"gates"})


# Which layers


def placed(model: Any) -> Counter[type]:
    return Counter(type(m) for m in model.modules() if isinstance(m, (Adapter, LoRA, Prefix, PrefixNetwork)))


@pytest.mark.parametrize(
    ("layers", "chosen"), [([2], (2,)), ([0, 2], (0, 2)), (range(1, 3), (1, 2)), ("1-2", (1, 2)), (None, (0, 1, 2))]
)
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2", "llama", "bloom"])
def test_layers_that_are_not_chosen_carry_nothing(family: str, layers: Any, chosen: tuple[int, ...]) -> None:
    model = tiny_model(family)
    unipelt.inject(model, method(family, layers=layers))
    for stack in FAMILIES[family].stacks:
        for index, layer in enumerate(model.base_model.get_submodule(stack.layers)):
            found = placed(layer)
            attentions = 1 + (family in ENCODER_DECODERS and stack.causal)
            full = {Adapter: 1, LoRA: 2 * attentions, Prefix: attentions if family in WITH_PREFIX else 0}
            assert found == (Counter(full) if index in chosen else Counter()), (stack.layers, index)
            if index not in chosen:
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
                assert not any("unipelt" in name for m in layer.modules() for name in (*vars(m), *m._modules))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_not_there_is_refused(family: str) -> None:
    model = tiny_model(family)
    before = state(model)
    depth = 1 if family == "albert" else DEPTH
    with pytest.raises(unipelt.InjectionError, match=f"names {depth}, but the model's {depth} layers are 0 to"):
        unipelt.inject(model, method(family, layers=[0, depth]))
    assert_same(model.state_dict(), before)


def test_a_layer_that_one_stack_lacks_is_that_of_the_other() -> None:
    model, batch = tiny_model("bart", num_hidden_layers=2, encoder_layers=2, decoder_layers=4), tiny_batch("bart")
    want = logits(model, batch)
    with pytest.raises(unipelt.InjectionError, match="layers names 4, but the model's 4 layers are 0 to 3"):
        unipelt.inject(model, small("lora", layers="3-4"))
    assert not placed(model)
    for layers, count in (([3], 4), ("1-3", 2 + 3 * 4), ("0-3", 2 * 2 + 4 * 4)):
        unipelt.inject(model, small("lora", layers=layers))
        shake(model)
        assert placed(model) == {LoRA: count}
        assert bool(placed(model.get_encoder())) == (layers != [3])
        assert placed(model.get_decoder().layers[3]) == {LoRA: 4}
        assert (logits(model, batch) - want).abs().max() > 1e-3
        unipelt.remove(model)
    with pytest.raises(unipelt.InjectionError, match="encoder=True, decoder=False, cross=False leave nothing of"):
        unipelt.inject(model, small("lora", layers=[3], decoder=False, cross=False))
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_side_may_be_left_out(family: str) -> None:
    sizes = {"encoder": (1, 1, 1), "decoder": (1, 1, 1), "cross": (0, 1, 1)}  # adapters, prefixes, networks
    batch = tiny_batch(family)
    for out in sizes:
        model = tiny_model(family)
        bare = logits(model, batch)
        unipelt.inject(model, method(family, **{out: False}))
        shake(model)
        rest = [size for side, size in sizes.items() if side != out]
        prefix = family in WITH_PREFIX
        want = {
            Adapter: DEPTH * sum(size[0] for size in rest),
            LoRA: 2 * DEPTH * 2,
            Prefix: DEPTH * 2 * prefix,
            PrefixNetwork: 2 * prefix,
        }
        assert placed(model) == Counter(want)
        stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
        cross = FAMILIES[family].stacks[1].cross
        assert cross is not None
        layers = model.base_model.get_submodule(FAMILIES[family].stacks[1].layers)
        crossing = [added_to(layer).cross for layer in layers]
        assert [added is not None and bool(placed(added)) for added in crossing] == [out != "cross"] * DEPTH
        assert all(
            added is None or layer.get_submodule(cross.path) is layer.get_submodule(added.wiring.attention)
            for layer, added in zip(layers, crossing, strict=True)
        )
        assert bool(placed(stacks["encoder"])) == (out != "encoder")
        assert bool(placed(stacks["decoder"])) is True
        found = gradients(model, batch)
        assert all(found[name] is not None for name in own_parameters(model))
        unipelt.remove(model)
        assert torch.equal(logits(model, batch), bare)
    with pytest.raises(unipelt.InjectionError, match="encoder=False, decoder=False, cross=False leave nothing"):
        unipelt.inject(model, method(family, encoder=False, decoder=False, cross=False))


def test_an_adapter_alone_in_the_attention_to_the_encoder_is_nowhere() -> None:
    """It was taken as a model that is frozen and carries nothing."""
    model = tiny_model("bart")
    before = state(model)
    with pytest.raises(unipelt.InjectionError, match="encoder=False, decoder=False, cross=True leave nothing of"):
        unipelt.inject(model, small("adapter", encoder=False, decoder=False))
    assert_same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


# Refusals


@pytest.mark.parametrize("family", [*SIMPLE, *WITHOUT_INTERFACE])
def test_a_prefix_that_cannot_enter_is_refused(family: str) -> None:
    model = tiny_model(family)
    before = state(model)
    reason = {"deberta": "relative position to the query", "gptj": "own softmax", "bloom": "own softmax"}
    reason["deberta-v2"] = reason["deberta"]
    match = f"'{family}' models cannot take a prefix: .*{reason.get(family)}"
    if family in WITHOUT_INTERFACE:
        match = r"a prefix cannot enter \w+Attention: in transformers .* does not go through the attention interface"
    for preset in ("prefix", "unipelt-ap", "unipelt-apl"):
        with pytest.raises(unipelt.InjectionError, match=match):
            unipelt.inject(model, small(preset))
    assert_same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_these_take_no_prefix() -> None:
    assert set(SIMPLE) == {"deberta", "deberta-v2", "gptj", "bloom"}


def test_an_unknown_architecture_is_described_by_inspection() -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
    )
    unipelt.inject(transformers.CLIPTextModel(config), "lora")
    stack = ALL_FAMILIES.pop("clip_text_model").stacks[0]
    assert (stack.attention.query, stack.attention.value, stack.output) == ("q_proj", "v_proj", "mlp")


@pytest.mark.parametrize("family", WITH_PREFIX)
def test_other_back_ends_are_refused_with_a_prefix(family: str) -> None:
    model = tiny_model(family)
    before = state(model)
    for name in ("flash_attention_2", "flex_attention"):
        own = model.config._attn_implementation
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match=f"back-ends eager and sdpa, not '{name}'"):
            unipelt.inject(model, small("prefix"))
        model.config._attn_implementation = own
    assert_same(model.state_dict(), before)
    unipelt.inject(model, small("prefix"))
    ids = {name: tensor for name, tensor in tiny_batch(family).items() if name != "attention_mask"}
    if family == "mpnet":  # it reads no back-end
        logits(model, ids)
        return
    for module in model.modules():  # a stack may have a copy of the model's configuration
        if hasattr(module, "config") and not hasattr(module, "unipelt_port"):
            module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="not 'flash_attention_2'"):
        logits(model, ids)


def test_a_gate_that_cannot_read_a_mask_says_so() -> None:
    class BlockMask:
        pass

    with pytest.raises(ValueError, match=r"cannot read a mask of type BlockMask.*set_attn_implementation"):
        token_weights(BlockMask(), 1)
    model = unipelt.inject(tiny_model("bert"), small("unipelt-al"))
    layer = model.base_model.get_submodule("encoder.layer.0")
    with pytest.raises(ValueError, match="cannot read a mask of type BlockMask"):
        layer(torch.zeros(1, 2, 32), attention_mask=BlockMask())


@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_trains_biases_or_is_refused(family: str) -> None:
    model = tiny_model(family)
    before, flags = state(model), {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = {name for name, _ in model.named_parameters()} - outside_base(model, family)
    if any(name.endswith("bias") for name in base):
        unipelt.inject(model, "bitfit")
        assert {name for name in trained(model) if name in base} == {name for name in base if name.endswith("bias")}
        unipelt.remove(model)
    else:
        with pytest.raises(unipelt.InjectionError, match=f"{type(model).__name__} has none"):
            unipelt.inject(model, "bitfit")
    assert_same(model.state_dict(), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert getattr(model, "unipelt_injection", None) is None


def test_llama_has_no_biases_for_bitfit() -> None:
    with pytest.raises(unipelt.InjectionError, match="bitfit trains biases, and this LlamaForCausalLM has none"):
        unipelt.inject(tiny_model("llama"), "bitfit")


# Architectures with something of their own


@pytest.mark.parametrize("groups", [1, 2])
def test_albert_has_one_set_a_distinct_layer(groups: int) -> None:
    model = tiny_model("albert", num_hidden_groups=groups, num_hidden_layers=4)
    unipelt.inject(model, small("unipelt-apl"))
    shake(model)
    assert placed(model) == {Adapter: groups, LoRA: 2 * groups, Prefix: groups, PrefixNetwork: 1}
    batch = tiny_batch("albert")
    with unipelt.record_gates(model) as gates:
        logits(model, batch)
    for name in ("adapter", "prefix", "lora_query", "lora_value"):
        assert gates[name].shape == (3, 4), "a column for each pass"
        assert len({tuple(column.tolist()) for column in gates[name].T}) == 4, "each pass reads another state"
    counts = unipelt.parameter_counts(model)
    assert counts.gates == dict.fromkeys(("prefix", "lora_query", "lora_value", "adapter"), 33 * groups)


def seen_by_query(model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What the first layer's query projection was given and gave, call by call."""
    calls: list[tuple[Tensor, Tensor]] = []
    query = model.deberta.encoder.layer[0].attention.self.query_proj
    handle = query.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    logits(model, batch)
    handle.remove()
    return calls


def test_a_gated_update_leaves_relative_positions_alone() -> None:
    model, batch = tiny_model("deberta-v2"), tiny_batch("deberta-v2")
    unipelt.inject(model, small("unipelt-al"))
    shake(model)
    with unipelt.record_gates(model) as gates:
        calls = seen_by_query(model, batch)
    assert [tuple(given.shape) for given, _ in calls] == [(3, 9, 32), (1, 8, 32)], "a text, then positions"
    own, query = parts(model.deberta.encoder.layer[0]), model.deberta.encoder.layer[0].attention.self.query_proj
    (text, text_out), (places, places_out) = calls
    update = text @ own["lora_query.A"].T @ own["lora_query.B"].T * gates["lora_query"][:, :1, None]
    assert update.abs().max() > 1e-2
    torch.testing.assert_close(text_out, nn.functional.linear(text, query.weight, query.bias) + update)
    assert torch.equal(places_out, nn.functional.linear(places, query.weight, query.bias))


def test_an_ungated_update_is_a_change_of_weights() -> None:
    model, batch = tiny_model("deberta-v2"), tiny_batch("deberta-v2")
    merged = copy.deepcopy(model)
    unipelt.inject(model, small("lora", train_head=False))
    shake(model)
    with torch.no_grad():
        for layer, plain in zip(model.deberta.encoder.layer, merged.deberta.encoder.layer, strict=True):
            own, other = parts(layer), plain.attention.self
            for term, leaf in (("lora_query", other.query_proj), ("lora_value", other.value_proj)):
                leaf.weight += 2.0 * own[f"{term}.B"] @ own[f"{term}.A"]  # alpha / rank
    assert_near(logits(model, batch), logits(merged, batch))
    (_, _), (places, out) = seen_by_query(model, batch)
    query = model.deberta.encoder.layer[0].attention.self.query_proj
    assert (out - nn.functional.linear(places, query.weight, query.bias)).abs().max() > 1e-2


def test_every_family_has_a_row_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(re.findall("`([^`]+)`", "".join(rows[1:]))) == sorted(FAMILIES)


def test_every_type_of_the_table_has_a_row_in_the_generated_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures-table.md").read_text(encoding="utf-8")
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "model_type" not in line}
    written = re.search(r"architecture of Transformers ([0-9.]+),", page)
    assert written is not None
    if transformers.__version__ == written[1]:
        assert named == set(text_types())
    else:  # another version has lost a few types, or got some
        assert len(named & set(text_types())) > 0.9 * min(len(named), len(text_types()))


# how Transformers makes its block masks
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_flex_attention_works_in_a_decoder_without_a_prefix() -> None:
    model, batch = tiny_model("llama"), tiny_batch("llama")
    unipelt.inject(model, small("unipelt-al"))
    shake(model)
    want = logits(model, batch)
    model.set_attn_implementation("flex_attention")
    real = batch["attention_mask"].bool()
    assert_near(logits(model, batch)[real], want[real])


# how Transformers makes its block masks
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_flex_attention_works_where_a_gate_averages() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    unipelt.inject(model, small("unipelt-al"))
    shake(model)
    want = logits(model, batch)
    model.set_attn_implementation("flex_attention")
    assert_near(logits(model, batch), want)


def test_a_decoder_without_attention_to_an_encoder_has_nothing_there_to_add_to() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(unipelt.InjectionError, match="decoder=False, cross=True leave nothing of this GPT2"):
        unipelt.inject(model, {"preset": "lora", "decoder": False})
    assert not hasattr(model, "unipelt_injection")
