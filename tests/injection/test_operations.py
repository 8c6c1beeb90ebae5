"""What a pass costs in operations, what is computed once in it, and that doing so changes no number."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from helpers import shake, tiny_batch, tiny_bert
from inside import added_to, is_idle
from measuring import OperationCounter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

import unipelt
from unipelt.submodules.forward_pass import PassFacts, split_heads
from unipelt.submodules.room import rooms
from unipelt.submodules.tokens import token_weights

LABELS = torch.tensor([0, 1, 1])
SCALE = "unipelt-apl"
MASS = {"preset": "unipelt-apl", "prefix": {"gating": "mass"}}
OWN = {"preset": "unipelt-apl", "prefix": {"softmax": "own"}}
NOGATE = "unipelt-apl-nogate"
TOKEN = {"preset": "unipelt-apl", "gate": {"pooling": "token"}}


def bert(layers: int, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "vocab_size": 60,
        "num_labels": 2,
    }
    drop: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, **drop, num_hidden_layers=layers)
    return BertForSequenceClassification(config)


def batch(padded: bool) -> dict[str, Tensor]:
    """16 x 64 tokens, some of them padding or none."""
    return tiny_batch(lengths=(64, 40, *range(50, 64)) if padded else (64,) * 16, tokens=64)


def forward_operations(model: Any, padded: bool = True) -> Counter[str]:
    given = batch(padded)
    with torch.no_grad(), OperationCounter() as counting:
        model.eval()(**given)
    return counting.counts


def step_operations(model: Any, padded: bool = True) -> Counter[str]:
    """Forward and backward."""
    given = batch(padded)
    with OperationCounter() as counting:
        model.train()(**given, labels=torch.arange(16) % 2).loss.backward()
    return counting.counts


# Counts


@pytest.mark.parametrize(("method", "most"), [(SCALE, (16, 13)), (OWN, (17, 17))], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_operations_of_a_forward_pass(padded: bool, method: Any, most: tuple[int, int]) -> None:
    """At most so many a layer more than without, and a few for the pass."""
    plain = {layers: forward_operations(bert(layers), padded).total() for layers in (4, 5)}
    ours = {layers: forward_operations(unipelt.inject(bert(layers), method), padded).total() for layers in (4, 5)}
    a_layer = (ours[5] - ours[4]) - (plain[5] - plain[4])
    assert 0 < a_layer <= most[padded]
    assert ours[4] - plain[4] - 4 * a_layer <= 14, "of the pass: the prefixes, the token weights, the prefix's mask"


@pytest.mark.parametrize("padded", [False, True])
def test_operations_of_a_training_step(padded: bool) -> None:
    tuned = step_operations(unipelt.inject(bert(4), "fine-tuning"), padded).total()
    ours = step_operations(unipelt.inject(bert(4), SCALE), padded).total()
    assert ours <= 375, "five more than here, for other versions of PyTorch"
    assert ours < 1.9 * tuned


@pytest.mark.parametrize(("method", "most"), [(SCALE, 698), ("unipelt", 828)])
def test_operations_of_six_layers_with_dropout(method: str, most: int) -> None:
    """The setting of the table in docs/speed.md."""
    model = unipelt.inject(bert(6, dropout=0.1), method)
    assert step_operations(model, padded=False).total() <= most, "five more than here"


def test_the_gradient_of_all_prefixes_is_copied_once() -> None:
    """The layers' gradients are joined, and one copy puts them in the order of the network's outputs."""
    network = added_to(make(SCALE).bert.encoder).prefix_network
    facts = PassFacts()
    facts.prefixes[network.key] = network()
    found: list[Any] = [facts.prefix(network.key, index, 4) for index in range(3)]
    want = [split_heads(network(index), 4) for index in range(3)]
    torch.testing.assert_close(found, want)
    seeds = [torch.randn_like(one) for one in want]
    with OperationCounter() as counting:
        got = torch.autograd.grad(found, list(network.parameters()), seeds)
    assert counting.counts["aten.clone.default"] == 1
    torch.testing.assert_close(got, torch.autograd.grad(want, list(network.parameters()), seeds))


# A prefix as a matrix product


def test_a_gated_prefix_as_a_product_is_the_same_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(SCALE)
    want_gradients = gradients(model)
    with OperationCounter() as counting:
        gradients(model)
    monkeypatch.setattr("unipelt.submodules.prefix._is_product", lambda x: False)
    with OperationCounter() as elementwise:
        got = gradients(model)
    assert_close(got, want_gradients)
    assert elementwise.counts.total() - counting.counts.total() == 2 * 3, "in each of three layers"


def test_layers_without_submodules_cost_nothing() -> None:
    """One layer of four, or of six: the same operations are added."""
    added = [
        forward_operations(unipelt.inject(bert(layers), {"preset": "unipelt-apl", "layers": [1]}))
        - forward_operations(bert(layers))
        for layers in (4, 6)
    ]
    assert added[0] == added[1]
    assert added[0]


def test_nothing_waits_for_numbers() -> None:
    """No operation reads a number off the device but those of the model itself."""
    waits = {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default", "aten.equal.default"}
    plain, ours = (step_operations(model) for model in (bert(4), unipelt.inject(bert(4), SCALE)))
    assert {name: plain[name] for name in waits} == {name: ours[name] for name in waits}


def test_all_prefixes_of_a_pass_are_computed_at_once() -> None:
    for method in ("prefix", SCALE, MASS, OWN):
        model = make(method)
        calls: list[Any] = []
        added_to(model.bert.encoder).prefix_network.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(args)
        )
        model(**tiny_batch())
        model(**tiny_batch())
        assert calls == [(), ()]


# Once a pass and once a layer are the same


def make(method: Any) -> Any:
    model: Any = unipelt.inject(tiny_bert(), method)
    shake(model)
    return model


def gradients(model: Any, *batches: dict[str, Tensor], call: Any = None) -> dict[str, Tensor]:
    """Of the summed losses, one backward pass behind all forward passes."""
    model.zero_grad()
    call = model if call is None else call
    total = torch.stack([call(**given, labels=LABELS).loss for given in batches or (tiny_batch(),)]).sum()
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def each_layer_its_own(model: Any) -> None:
    """Take away what the pass computes once."""
    passes = next(rooms(model))[1].passes
    model.bert.encoder.register_forward_pre_hook(lambda *_: passes.current().facts.prefixes.clear())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["prefix", SCALE, MASS, NOGATE], ids=str)
def test_each_layer_by_itself_computes_the_same(method: Any) -> None:
    model = make(method)
    want = gradients(model)
    with torch.no_grad():
        want_logits = model(**tiny_batch()).logits
    calls: list[Any] = []
    added_to(model.bert.encoder).prefix_network.register_forward_hook(lambda module, args, output: calls.append(args))
    each_layer_its_own(model)
    assert_close(gradients(model), want)
    assert calls == [(), (0,), (1,), (2,)]
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_batch()).logits, want_logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("some", [(0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("method", [SCALE, MASS, TOKEN], ids=str)
def test_layers_that_somebody_else_checkpoints(method: Any, some: tuple[int, ...], reentrant: bool) -> None:
    """By PyTorch's own function, which Transformers' switches know nothing of; two passes before one backward pass."""
    model = make(method).train()
    both = (tiny_batch(), tiny_batch(1, lengths=(8, 2, 4)))
    want = [gradients(model), gradients(model, *both)]
    for index in some:
        layer = model.bert.encoder.layer[index]

        def again(hidden: Tensor, mask: Tensor, *args: Any, forward: Any = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(partial(forward, **kwargs), hidden, mask, *args, use_reentrant=reentrant)

        layer.forward = again
    if reentrant:
        model.enable_input_require_grads()
    for got, expected in zip((gradients(model), gradients(model, *both)), want, strict=True):
        assert_close(got, expected)


def test_a_layer_called_without_its_stack() -> None:
    """It uses the parameters as they are now, not what the last pass computed."""
    model = make(SCALE).train()
    seen: list[tuple[Any, Any, Tensor]] = []
    layer = model.bert.encoder.layer[1]
    handle = layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    gradients(model)
    handle.remove()
    ((args, kwargs, want),) = seen
    torch.testing.assert_close(layer(*args, **kwargs), want, atol=1e-6, rtol=0)
    added_to(model.bert.encoder).prefix_network.w2.bias.data += 1.0
    assert (layer(*args, **kwargs) - want).abs().max() > 1e-3


def test_a_pass_that_fails_leaves_nothing() -> None:
    model = make(SCALE)
    with torch.no_grad():
        want = model(**tiny_batch()).logits
        handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**tiny_batch())
        handle.remove()
        assert all(room.passes.current() is None for _, room in rooms(model))
        assert all(is_idle(room.passes) for _, room in rooms(model))
        assert torch.equal(model(**tiny_batch()).logits, want)


# What is derived from a mask


def four(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask.bool(), torch.finfo(torch.float32).min)[:, None, None]


@pytest.mark.parametrize("method", [SCALE, MASS, NOGATE], ids=str)
def test_a_mask_may_be_changed_between_passes(method: Any) -> None:
    """A mask of the caller's own, kept and written to."""
    model, given = make(method), tiny_batch()
    mask = four(given["attention_mask"])
    with torch.no_grad():
        first = model(given["input_ids"], attention_mask=mask).logits
        want = model(given["input_ids"], attention_mask=four(torch.ones(3, 9))).logits
        mask.zero_()
        assert torch.equal(model(given["input_ids"], attention_mask=mask).logits, want)
    assert (first - want).abs().max() > 1e-4


def test_a_mask_of_inference_mode_may_train() -> None:
    model, given = make(SCALE), tiny_batch()
    mask = four(given["attention_mask"])
    with torch.inference_mode():
        want = model(given["input_ids"], attention_mask=mask).logits.clone()
        inside = four(given["attention_mask"])
        assert torch.equal(model(given["input_ids"], attention_mask=inside).logits, want)
        inside.zero_()
        assert not torch.equal(model(given["input_ids"], attention_mask=inside).logits, want)
    loss = model(given["input_ids"], attention_mask=mask, labels=LABELS).loss
    loss.backward()
    got = model(given["input_ids"], attention_mask=mask).logits.detach()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # what trains rounds its last bit otherwise
    with torch.no_grad():
        assert torch.equal(model(given["input_ids"], attention_mask=mask).logits, want)


def test_one_mask_may_serve_several_models() -> None:
    """Prefixes of other lengths, and weights of another precision."""
    given = tiny_batch()
    mask = four(given["attention_mask"])
    models = [make({"preset": "unipelt-apl", "prefix": {"length": length}}) for length in (3, 7)]
    models.append(make({"preset": "unipelt-apl", "prefix": {"length": 3}}).double())
    with torch.no_grad():
        want = [model(given["input_ids"], attention_mask=mask.clone()).logits for model in models]
        for _ in range(2):
            for model, logits in zip(models, want, strict=True):
                assert torch.equal(model(given["input_ids"], attention_mask=mask).logits, logits)


def test_once_a_pass() -> None:
    tensor, made, facts = torch.ones(3), [], PassFacts()

    def make_it() -> Tensor:
        made.append(1)
        return tensor * 2

    assert facts.once(tensor, "twice", make_it) is facts.once(tensor, "twice", make_it)
    assert len(made) == 1
    facts.once(tensor, "other", make_it)
    assert len(made) == 2
    tensor += 1
    assert torch.equal(PassFacts().once(tensor, "twice", make_it), torch.full((3,), 4.0)), "a pass of its own"
    assert len(made) == 3
    facts.once(tensor.clone(), "twice", make_it)
    facts.once(tensor[:1], "twice", make_it)
    assert len(made) == 5, "a tensor that is gone leaves its identity to nobody"
    for _ in range(2):
        facts.once(torch.ones(3, requires_grad=True), "twice", make_it)
    needs = torch.ones(3, requires_grad=True)
    assert facts.once(needs, "twice", make_it) is not facts.once(needs, "twice", make_it), "each has its own graph"


def test_token_weights_of_one_mask_for_several_batches() -> None:
    mask = torch.ones(1, 4, dtype=torch.long)
    shapes = [token_weights(mask, size) for size in (1, 3, 1)]
    assert [None if found is None else tuple(found.shape) for found in shapes] == [(1, 4), (3, 4), (1, 4)]


# torch.compile


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lengths_do_not_compile_for_ever(training: bool) -> None:
    """The second length makes the graph one for all lengths, forward and backward."""
    torch._dynamo.reset()
    try:
        torch.compile(bert(1), backend="eager", fullgraph=True)(**tiny_batch())
    except torch._dynamo.exc.Unsupported as error:  # PyTorch 2.6 and Transformers 5.0 together, for one
        pytest.skip(f"here the model does not compile without submodules either: {error!s:.60}")
    model = make(SCALE).train(training)
    graphs: list[nn.Module] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=count, fullgraph=True)
    for tokens in (9, 12, 15, 20, 31):
        given = tiny_batch(lengths=(5, tokens, 7), tokens=tokens)
        if training:
            want = gradients(model, given)
            assert_close(gradients(model, given, call=compiled), want)
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-5, rtol=0)
    torch._dynamo.reset()
    assert len(graphs) <= 2
