"""Whatever may be done to a model: checkpointing, copying, casting, compiling, masking, wrapping."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import logits, shake, tiny_batch, tiny_bert
from inside import added_to, entries, gradients_of_parts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, pipeline

import unipelt
from unipelt.submodules.prefix import Prefix
from unipelt.submodules.room import own_parameters, own_parts, rooms

MASS = {"preset": "unipelt-apl", "prefix": {"gating": "mass"}}
MEAN = {"preset": "unipelt-apl", "gate": {"pooling": "mean"}}
SOME = {"preset": "unipelt-apl", "layers": [1]}
METHODS = (*tiny.METHODS, MASS, MEAN, SOME)
FULL = ("unipelt-apl", MASS)
UNGATED = ("adapter", "prefix", "lora", "unipelt-apl-nogate")
LABELS = torch.tensor([0, 1, 1])
PREFIX_LENGTH = 10


def make_model(method: Any, **config: Any) -> Any:
    model = unipelt.inject(tiny_bert(**config), method)
    shake(model)
    return model


def gradients(model: Any, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the summed losses: every forward pass comes before the one backward pass."""
    model.zero_grad()
    torch.manual_seed(0)
    total = torch.stack([model(**batch, labels=LABELS).loss for batch in batches or (tiny_batch(),)]).sum()
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name] is not None, name
        torch.testing.assert_close(got[name], tensor, atol=atol, rtol=1e-5, msg=name)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def checkpoint_activations(model: Any, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_with_checkpointing(method: Any, reentrant: bool) -> None:
    """The same as without, with dropout, also when passes with different masks come before the backward pass."""
    model = make_model(method, dropout=0.1).train()
    one, other = tiny_batch(), tiny_batch(1, lengths=(8, 2, 4))
    want = [gradients(model, one), gradients(model, one, other)]
    assert all(gradient.any() for gradient in want[1].values())
    passes: list[None] = []
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: passes.append(None))
    checkpoint_activations(model, reentrant)
    got = [gradients(model, one), gradients(model, one, other)]
    assert len(passes) == 2 + 4, "every pass was computed twice"
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_prefix(reentrant: bool) -> None:
    """Recomputed attention has the prefix's keys: its weights and its gate's gradient depend on them."""
    model = make_model("unipelt-apl", attn_implementation="eager").train()
    checkpoint_activations(model, reentrant)
    widths: list[int] = []

    def look(attention: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        widths.append(output[1].shape[-1])

    model.bert.encoder.layer[1].attention.self.register_forward_hook(look)
    gate = "bert.encoder.layer.1.gate.prefix.weight"
    gradients(model)
    first = gradients_of_parts(model)[gate].clone()  # type: ignore[union-attr]
    assert widths == [PREFIX_LENGTH + 9] * 2
    with torch.no_grad():
        added_to(model.bert.encoder).prefix_network.w2.bias.add_(1.0)
    gradients(model)
    assert (first - gradients_of_parts(model)[gate]).abs().max() > 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_inputs_embeds(reentrant: bool) -> None:
    model = make_model("unipelt-apl").train()
    ids = tiny_batch()
    batch = {
        "inputs_embeds": model.get_input_embeddings()(ids["input_ids"]).detach(),
        "attention_mask": ids["attention_mask"],
    }
    want = gradients(model, batch)
    checkpoint_activations(model, reentrant)
    assert_close(gradients(model, batch), want)


def test_checkpointing_leaves_evaluation_and_the_embeddings_alone() -> None:
    model = make_model("unipelt-apl")
    want = logits(model)
    checkpoint_activations(model, True)
    assert torch.equal(logits(model), want)
    gradients(model.train())
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.get_input_embeddings().weight.grad is None


def test_checkpointing_that_does_not_say_which_is_reentrant() -> None:
    """As torch takes it, with a warning."""
    model, ids = make_model("unipelt-apl").train(), tiny_batch()
    embeddings = model.get_input_embeddings()(ids["input_ids"]).detach()  # which nobody else wakes
    batch = {"inputs_embeds": embeddings, "attention_mask": ids["attention_mask"]}
    want = gradients(model, batch)
    checkpoint_activations(model, True)
    for layer in model.bert.encoder.layer:  # Transformers itself always says
        layer._gradient_checkpointing_func = partial(checkpoint, preserve_rng_state=True)
    with pytest.warns(UserWarning, match="use_reentrant parameter should be passed explicitly"):
        got = gradients(model, batch)
    assert_close(got, want)


# Copies


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_copy_is_a_model_of_its_own(method: Any) -> None:
    model = make_model(method)
    gradients(model)  # whatever a pass leaves behind must not stop the copy
    copied = copy.deepcopy(model)
    before, want = state(model), logits(model)
    assert torch.equal(logits(copied), want)
    shared = {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in copied.parameters()}
    assert not shared
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.5)
    for seed in range(3):
        assert all(gradient is not None for gradient in gradients(copied, tiny_batch(seed)).values())
        optimizer.step()
    assert_same(state(model), before)
    assert torch.equal(logits(model), want)
    assert (logits(copied) - want).abs().max() > 1e-4
    trained = logits(copied)
    shake(model, seed=7)
    assert torch.equal(logits(copied), trained), "nor does the copy look at the original"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_removing_from_a_copy_leaves_the_original_injected(method: Any) -> None:
    base = tiny_bert()
    bare, model = logits(base), unipelt.inject(base, method)
    shake(model)
    want = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(unipelt.remove(copied)), bare)
    assert torch.equal(logits(model), want)
    assert unipelt.parameter_counts(model) == unipelt.parameter_counts(make_model(method))
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.parameter_counts(copied)
    again = copy.deepcopy(model)
    unipelt.remove(model)
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", FULL, ids=str)
def test_copies_do_not_mix(method: Any, reentrant: bool) -> None:
    """Passes over a model and its copy, other weights and masks, before layers are computed again."""
    model = make_model(method).train()
    copied = copy.deepcopy(model)
    shake(copied, seed=9)
    pairs = (model, tiny_batch()), (copied, tiny_batch(1, lengths=(2, 3, 9)))
    want = [gradients(each, batch) for each, batch in pairs]
    for each, _ in pairs:
        each.zero_grad()
        checkpoint_activations(each, reentrant)
    torch.stack([each(**batch, labels=LABELS).loss for each, batch in pairs]).sum().backward()
    for (each, _), expected in zip(pairs, want, strict=True):
        assert_close({n: p.grad for n, p in each.named_parameters() if p.requires_grad}, expected)


def test_a_copy_saves_itself(tmp_path: Any) -> None:
    model = make_model("unipelt-apl")
    copied = copy.deepcopy(model)
    shake(copied, seed=5)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(copied))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_whole_model_survives_torch_save(method: Any, tmp_path: Any) -> None:
    model = make_model(method)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(model))
    want = logits(again)
    shake(model, seed=5)
    assert torch.equal(logits(again), want), "the prefix's network is its own"
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), want)


# Replicas of nn.DataParallel


def replicate(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `torch.nn.parallel.replicate` does for one device, with parameters that went through `change`."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, change(parameter))
                replica._former_parameters[name] = getattr(replica, name)
    return replicas[model]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_replicas_are_refused_and_the_model_computes_as_before(method: Any) -> None:
    """With one sentence, at the first pass; a replica would share what its model is in."""
    model = make_model(method)
    want = logits(model)
    replica = replicate(model, lambda parameter: parameter.detach().clone())
    if method in ("fine-tuning", "bitfit"):  # nothing was added
        assert torch.equal(logits(replica), want)
        return
    with pytest.raises(RuntimeError, match="DataParallel does not work with submodules; start one process a GPU"):
        logits(replica)
    assert torch.equal(logits(model), want)
    assert logits(unipelt.remove(model)).shape == want.shape
    assert logits(replicate(model, lambda parameter: parameter.detach().clone())).shape == want.shape


@pytest.mark.parametrize("method", FULL, ids=str)
def test_threads_do_not_disturb_each_other(method: Any) -> None:
    """A base model may be called from several threads (a web server's); so may an injected one."""
    model = make_model(method)
    batches = [tiny_batch(seed, lengths=(3 + seed, 9, 2)) for seed in range(4)]
    want = [logits(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda turn: logits(model, batches[turn % 4]), range(200)))
    for turn, scores in enumerate(got):
        torch.testing.assert_close(scores, want[turn % 4], atol=1e-6, rtol=0)


# Dtypes


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_dtypes_and_back(method: Any, padded: bool) -> None:
    batch = tiny_batch() if padded else {"input_ids": tiny_batch()["input_ids"]}
    model = make_model(method)
    before, want = state(model), logits(model, batch)
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    wide = logits(model, batch)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), want, atol=1e-5, rtol=0)
    model.float()
    assert_same(state(model), before)
    assert torch.equal(logits(model, batch), want)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.06)):
        narrow = copy.deepcopy(model).to(dtype)
        assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
        scores = logits(narrow, batch)
        assert scores.dtype == dtype
        torch.testing.assert_close(scores.float(), want, atol=tolerance, rtol=0.05)
        grads = gradients(narrow.train(), batch)
        assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in grads.values())
        torch.testing.assert_close(logits(narrow.eval().float(), batch), want, atol=tolerance, rtol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "base"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_injecting_into_a_bf16_model(method: Any, dtype: str) -> None:
    base: Any = tiny_bert()
    base.to(torch.bfloat16)
    bare = logits(base)
    model: Any = unipelt.inject(base, {**unipelt.resolve(method).to_dict(), "dtype": dtype})
    shake(model, std=0.05)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    own = own_parameters(model)
    assert {parameter.dtype for parameter in own.values()} == ({kind} if own else set())
    frozen = [p for name, p in model.named_parameters() if name not in own and "classifier" not in name]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    reference: Any = unipelt.inject(tiny_bert(), method)
    reference.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(logits(model).float(), logits(reference), atol=0.05, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model.train()).values())
    assert torch.equal(logits(unipelt.remove(model).eval()), bare)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bf16_autocast(method: Any) -> None:
    model = unipelt.inject(tiny_bert(), method).train()
    shake(model, seed=3)
    want = gradients(model)
    loss = model(**tiny_batch(), labels=LABELS).loss.detach()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**tiny_batch(), labels=LABELS)
    assert out.logits.dtype == torch.bfloat16, "autocast was on"
    out.loss.backward()
    assert abs(out.loss.item() - loss.item()) < 0.03
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad is not None, name
    got = {own.full_name + own.part.name: own.part.of(own.parameter.grad) for own in own_parts(model)}  # type: ignore[arg-type]
    for own in own_parts(model):
        expected = own.part.of(want[own.full_name])
        assert (got[own.full_name + own.part.name] - expected).norm() < 0.3 * expected.norm() + 1e-3, own.part.name


# What goes in and what comes out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_no_mask_is_a_mask_of_ones(method: Any, attention: str) -> None:
    model = make_model(method, attn_implementation=attention)
    ids = tiny_batch(lengths=(9, 9, 9))["input_ids"]
    want = logits(model, {"input_ids": ids})
    ones = torch.ones_like(ids)
    square = torch.ones(3, 1, 9, 9)
    for mask in (ones, ones.bool(), square * 0.0, *([square.bool()] if attention == "sdpa" else [])):
        got = logits(model, {"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_four_dimensional_masks(method: Any, attention: str) -> None:
    model = make_model(method, attn_implementation=attention)
    batch = tiny_batch()
    want = logits(model, batch)
    real = batch["attention_mask"].bool()[:, None, None, :].expand(3, 1, 9, 9)
    additive = torch.zeros(3, 1, 9, 9).masked_fill(~real, torch.finfo(torch.float32).min)
    for mask in (additive, additive.expand(3, 4, 9, 9), *([real] if attention == "sdpa" else [])):
        got = logits(model, {**batch, "attention_mask": mask})
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def packed(additive: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two texts of 4 and 5 tokens in one row that do not see each other, and each by itself."""
    ids = tiny_batch()["input_ids"][1:2]
    parts = [{"input_ids": ids[:, :4]}, {"input_ids": ids[:, 4:]}]
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5))[None, None].bool()
    if additive:
        mask = torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, parts


def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("method", UNGATED)
def test_block_diagonal_masks(method: str, additive: bool) -> None:
    """Every block attends to the prefix and to itself alone. (A gate has one value for the whole row.)"""
    model = make_model(method)
    whole, parts = packed(additive)
    want = torch.cat([states(model, part) for part in parts], dim=1)
    torch.testing.assert_close(states(model, whole), want, atol=1e-6, rtol=0)
    alone = {name: tensor for name, tensor in whole.items() if name != "attention_mask"}
    assert (states(model, alone) - want).abs().max() > 1e-3, "the mask matters"


@pytest.mark.parametrize("additive", [True, False])
def test_gates_of_a_packed_row_average_over_all_blocks(additive: bool) -> None:
    model = make_model("unipelt-apl")
    whole, parts = packed(additive)
    first = []
    for batch in (whole, *parts):
        with unipelt.record_gates(model) as gates:
            logits(model, batch)
        first.append(torch.stack([gates[name][0, 0] for name in ("prefix", "lora_query", "lora_value")]))
    torch.testing.assert_close(first[0], (4 * first[1] + 5 * first[2]) / 9, atol=1e-6, rtol=0)
    # two copies of one text have its gates, so that packing them is the computation for each of them
    text = parts[0]["input_ids"]
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))[None, None].bool()
    if additive:
        mask = torch.zeros(1, 1, 8, 8).masked_fill(~mask, -torch.inf)
    twice = {
        "input_ids": text.repeat(1, 2),
        "attention_mask": mask,
        "position_ids": torch.arange(4).repeat(2)[None],
    }
    want = states(model, {"input_ids": text}).repeat(1, 2, 1)
    torch.testing.assert_close(states(model, twice), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_inputs_embeds_are_input_ids(method: Any) -> None:
    model = make_model(method)
    batch = tiny_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    got = logits(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]})
    assert torch.equal(got, logits(model, batch))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_attentions_and_hidden_states(method: Any) -> None:
    model = make_model(method, attn_implementation="eager")
    want = logits(model)
    with torch.no_grad():
        out = model(**tiny_batch(), output_attentions=True, output_hidden_states=True)
        flat = model(**tiny_batch(), output_attentions=True, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(out.logits, want)
    assert len(flat) == 3
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 9, 32)] * 4
    lengths = [  # a prefix with a softmax of its own puts no columns in front
        next(
            (module.length for module in layer.modules() if isinstance(module, Prefix) and module.gating != "added"), 0
        )
        for layer in model.bert.encoder.layer
    ]
    assert [tuple(weights.shape) for weights in out.attentions] == [(3, 4, 9, length + 9) for length in lengths]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_modes(method: Any) -> None:
    """Dropout in training only; without a graph the same numbers; inference first does not spoil training."""
    model = make_model(method, dropout=0.2)
    want = model(**tiny_batch()).logits
    assert want.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scores = model(**tiny_batch()).logits
        assert not scores.requires_grad
        torch.testing.assert_close(scores, want, atol=1e-6, rtol=0)  # another kernel, where the mask takes part
    model.train()
    torch.manual_seed(0)
    one, other = logits(model), logits(model)
    assert (one - other).abs().max() > 1e-4
    assert all(gradient is not None for gradient in gradients(model).values())
    torch.testing.assert_close(logits(copy.deepcopy(model).eval()), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_chunked_feed_forward(method: Any, masked: bool) -> None:
    """`chunk_size_feed_forward` cuts the texts; a gate still averages over all of a text."""
    batch = tiny_batch()
    if not masked:
        del batch["attention_mask"]
    want = logits(make_model(method), batch)
    model = make_model(method, chunk_size_feed_forward=3)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=0)
    unipelt.remove(model)
    assert {layer.chunk_size_feed_forward for layer in model.bert.encoder.layer} == {3}
    assert not any(name.startswith("unipelt") for layer in model.bert.encoder.layer for name in vars(layer))


def test_a_pass_that_failed_does_not_stop_what_follows() -> None:
    model = make_model("unipelt-apl")
    want = logits(model)
    bad = {"input_ids": tiny_batch()["input_ids"], "attention_mask": torch.ones(3, 1, 9, 4, dtype=torch.bool)}
    with pytest.raises((RuntimeError, IndexError)):
        model(**bad)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(copied), want)


# Tools around a model


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unipelt-apl", MASS], ids=str)
def test_compiled_is_eager(method: Any) -> None:
    """One whole graph, forward and backward."""
    model = make_model(method).train()
    want_logits, want = logits(model), gradients(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), want_logits, atol=1e-6, rtol=0)
    model.zero_grad()
    compiled(**tiny_batch(), labels=LABELS).loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, want)
    torch._dynamo.reset()


def test_part_of_a_model_may_be_compiled() -> None:
    """What a compiled part computes is found by the rest, which is not compiled."""
    model = make_model("unipelt-apl")
    want = logits(model)
    torch._dynamo.reset()
    attention = model.bert.encoder.layer[1].attention
    attention.forward = torch.compile(attention.forward, backend="aot_eager")
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)
    torch._dynamo.reset()


def test_what_is_compiled_finds_what_is_not() -> None:
    """The other way round: attention leaves the token weights, and the compiled block with the adapter takes them."""
    model = make_model("unipelt-apl")
    want = logits(model)
    block: Any = model.bert.encoder.layer[1].output
    block.forward = torch.compile(block.forward, backend="aot_eager")
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(58))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_pipeline() -> None:
    model, tokenizer = make_model("unipelt-apl"), make_tokenizer()
    texts = ["w3 w4 w5", "w9 w8 w7 w6 w5 w4 w3", "w1"]
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        classify: Any = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        for size in (1, 3):
            found = classify(texts, top_k=None, batch_size=size)
            for text, scores in zip(texts, found, strict=True):
                want = logits(model, tokenizer(text, return_tensors="pt")).softmax(-1)[0]
                got = {score["label"]: score["score"] for score in scores}
                for label in range(2):
                    assert abs(got[f"LABEL_{label}"] - want[label].item()) < 1e-5
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not messages


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for the whole process."""
    states = (AcceleratorState, GradientState, PartialState)
    for each in states:
        each._reset_state()
    yield
    for each in states:
        each._reset_state()


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Any) -> None:
    model = make_model("unipelt-apl")
    before = state(model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(wrapped(**tiny_batch(), labels=LABELS).loss)
    optimizer.step()
    plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert plain is model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    after = state(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    plain.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(wrapped))
    assert torch.equal(logits(unipelt.load(tiny_bert(), tmp_path)), logits(plain))
    unipelt.remove(plain)
    assert not entries(model)
    assert not list(rooms(model))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_pass_never_asks_for_a_value(method: Any) -> None:
    """On the meta device there are no values: `.item()`, `.cpu()` or a tensor made elsewhere is an error."""
    model = make_model(method).train()
    model.to("meta")
    batch = {name: tensor.to("meta") for name, tensor in tiny_batch().items()}
    mask = batch["attention_mask"][:, None, None, :].bool().expand(3, 1, 9, 9)  # the host looks into 2-D masks
    loss = model(input_ids=batch["input_ids"], attention_mask=mask, labels=LABELS.to("meta")).loss
    loss.backward()
    assert loss.device.type == "meta"
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
