"""Gates and entries by themselves, and the passes that carry what they give."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from inside import is_idle
from torch import Tensor, nn

from unipelt.config.gate import GateConfig
from unipelt.config.schema import ConfigError
from unipelt.submodules.entry import Entry, Rows, shares_product
from unipelt.submodules.forward_pass import (
    UNSEEN,
    AttentionPass,
    ForwardPass,
    Passes,
    PassFacts,
    SetRows,
    replace_arguments,
)
from unipelt.submodules.gate import Gates
from unipelt.submodules.tokens import CLOSED, token_weights

NAMES = ("one", "two", "three")
LIKE = torch.zeros(1)


def make(pooling: str = "masked_mean", causal: bool = False) -> Gates:
    return Gates(NAMES, GateConfig(pooling), causal=causal)  # type: ignore[arg-type]


def make_entry(rows: tuple[Rows, ...] = (), causal: bool = False, like: Tensor = LIKE, **gate: Any) -> Entry:
    torch.manual_seed(0)
    entry = Entry(5, NAMES, GateConfig(**gate), like, causal=causal, rows=rows)
    if not like.is_meta:
        nn.init.normal_(entry.bias[: len(NAMES)])
    return entry


def rows_of(sizes: tuple[int, ...], biased: bool) -> tuple[Rows, ...]:
    """Further rows for the first gates, of these sizes."""
    return tuple(
        Rows(name, f"{name}.A", "lora", torch.randn(size, 5), torch.randn(size) if biased else None)
        for name, size in zip(NAMES, sizes, strict=False)
    )


# Passes


class Caller(nn.Module):
    """Calls a function within a pass, as a stack does."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.passes = passes
        self.register_forward_pre_hook(
            lambda module, args, kwargs: (passes.enter(PassFacts(), args), kwargs), with_kwargs=True
        )
        self.register_forward_hook(lambda *_: passes.leave(), always_call=True)

    def forward(self, function: Any) -> Any:
        return function()


def test_a_pass_is_of_its_call() -> None:
    passes, facts = Passes(), PassFacts()
    assert passes.current() is None
    assert passes.current_or_recomputed() is None
    args = passes.enter(facts, (1, "two"))
    assert args == (1, "two")
    first = passes.current()
    assert first is not None
    assert first is passes.current_or_recomputed()
    assert first.facts is facts
    assert not first.by_layer
    second = PassFacts()
    more = passes.enter(second, args, by_layer=True)
    assert more == (1, "two")
    now = passes.current()
    assert now is not None
    assert now.facts is second
    assert now.by_layer
    del now
    passes.leave()
    assert passes.current() is None
    passes.leave()
    assert passes.current() is None


def test_a_pass_that_its_call_no_longer_holds_is_gone() -> None:
    """The arguments hold it, and a call's arguments go with the call, however that ends."""
    passes = Passes()
    args = passes.enter(PassFacts(), ())
    reference = weakref.ref(passes.current())
    assert reference() is not None
    del args
    assert reference() is None
    assert passes.current() is None
    passes.leave()
    assert is_idle(passes)


def test_other_arguments_of_a_call_hold_its_pass_too() -> None:
    passes = Passes()
    args = passes.enter(PassFacts(), (1, 2))
    other = replace_arguments(args, (3,))
    assert other == (3,)
    del args
    assert passes.current() is not None
    del other
    assert passes.current() is None
    assert replace_arguments((1, 2), (3,)) == (3,), "a call outside of a pass"


def test_losses_are_collected_from_one_call_to_the_other_in_their_thread() -> None:
    passes, loss, seen = Passes(), torch.ones(()), []
    assert passes.losses() is None
    passes.collect_losses()
    found = passes.losses()
    assert found == []
    found.append(loss)
    thread = Thread(target=lambda: seen.extend([passes.losses(), passes.take_losses()]))
    thread.start()
    thread.join()
    assert seen == [None, []]
    assert passes.take_losses() == [loss]
    assert passes.losses() is None
    assert passes.take_losses() == []


def test_facts_are_computed_once_unless_they_are_part_of_a_graph() -> None:
    facts, source = PassFacts(), torch.ones(2)
    first = facts.once(source, "name", lambda: [1])
    assert facts.once(source, "name", lambda: [2]) is first
    assert facts.once(source, "other", lambda: [2]) == [2]
    source.requires_grad_(True)
    assert facts.once(source, "name", lambda: [3]) == [3], "each layer that is checkpointed has a graph of its own"


def test_a_prefix_of_all_layers_is_not_for_a_checkpointed_layer() -> None:
    """Such a layer computes its own, in both of its computations, so that both have the same operations."""
    both = torch.randn(3, 2, 4, 6)
    facts = PassFacts()
    assert facts.prefix(7, 1, 2) is None
    facts.prefixes[7] = both
    found = facts.prefix(7, 1, 2)
    assert found is not None
    assert torch.equal(found, both[1].unflatten(-1, (2, 3)).transpose(1, 2))
    assert facts.prefix(7, 1, 3).shape == (2, 3, 4, 2), "heads of another number"  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert facts.prefix(7, 1, 2) is None, "a layer under checkpointing without reentrance"
        inside = PassFacts()
        inside.prefixes[7] = both
        assert inside.prefix(7, 1, 2) is not None, "the whole pass is under the same hooks"
    both.requires_grad_(True)
    assert facts.prefix(7, 1, 2) is not None
    with torch.no_grad():
        assert facts.prefix(7, 1, 2) is None, "the first computation of a layer under reentrant checkpointing"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_leaves_nothing_however_it_ends(nested: bool, error: type[BaseException] | None) -> None:
    passes = Passes()
    caller, seen = Caller(passes), []

    def inside() -> str:
        now = passes.current()
        assert now is not None
        now.attention(3).gates["one"] = torch.ones(1)
        seen.append(weakref.ref(now))
        if error is not None:
            raise error
        return "done"

    gc.collect()
    gc.disable()  # references alone
    try:
        ended = caller(lambda: caller(inside)) if nested else caller(inside)
    except (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        ended = "raised"
    finally:
        gc.enable()
    assert ended == ("done" if error is None else "raised")
    assert len(seen) == 1
    assert seen[0]() is None
    assert passes.current() is None
    assert passes.given_rows() is None
    assert caller(lambda: passes.current() is not None)
    assert is_idle(passes)


def test_each_thread_has_its_own() -> None:
    passes, barrier, seen = Passes(), Barrier(3), {}
    caller = Caller(passes)

    def inside(number: int) -> None:
        now = passes.current()
        assert now is not None
        now.attention(0).gates["one"] = torch.tensor(number)
        barrier.wait(10)  # all are there
        assert passes.current() is now
        seen[number] = now.attention(0).gate_for("one", False)
        barrier.wait(10)

    outside = caller(lambda: passes.current())
    assert passes.current() is None
    threads = [Thread(target=caller, args=(lambda number=number: inside(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: torch.tensor(0), 1: torch.tensor(1), 2: torch.tensor(2)}
    del outside
    assert passes.current() is None
    assert is_idle(passes)


def test_a_copy_of_passes_is_in_none() -> None:
    passes = Passes()
    held = passes.enter(PassFacts(), ())
    rows = SetRows(("one",), (2,))
    with passes.rows(rows):
        for other in (copy.deepcopy(passes), copy.copy(passes), pickle.loads(pickle.dumps(passes))):
            assert type(other) is Passes
            assert other.current() is None
            assert other.given_rows() is None
        assert passes.given_rows() is rows
    assert passes.current() is not None
    del held
    assert passes.current() is None


def test_rows_are_given_to_a_thread_for_a_block() -> None:
    passes, first, second, seen = Passes(), SetRows(("one",), (2,)), SetRows((None, "two"), (1, 1)), []
    with passes.rows(first):
        with passes.rows(second):
            assert passes.given_rows() is second
            thread = Thread(target=lambda: seen.append(passes.given_rows()))
            thread.start()
            thread.join()
        assert passes.given_rows() is first
        with pytest.raises(KeyboardInterrupt), passes.rows(second):
            raise KeyboardInterrupt
        assert passes.given_rows() is first
    assert passes.given_rows() is None
    assert seen == [None]
    assert is_idle(passes)


def test_rows_are_split_by_set_whatever_a_layer_did_with_them() -> None:
    rows = SetRows(("one", None, "two"), (2, 1, 3))
    assert [len(part) for part in rows.split(torch.zeros(6, 4, 5))] == [2, 1, 3]
    assert [len(part) for part in rows.split(torch.zeros(24, 5))] == [8, 4, 12]
    assert torch.equal(torch.cat(rows.split(torch.arange(12))), torch.arange(12))
    for count in (5, 7, 0):
        with pytest.raises(RuntimeError, match=f"given {count} rows in a batch of 6"):
            rows.split(torch.zeros(count, 2))


def test_what_an_attention_did_not_see_or_compute_is_asked_for_in_vain() -> None:
    """Or it would be silently another model."""
    now = ForwardPass(PassFacts())
    attention = now.attention(5)
    assert now.attention(5) is attention
    assert now.attention(6) is not attention
    assert attention.mask is UNSEEN
    with pytest.raises(RuntimeError, match="averages over real tokens, and the layer's attention was not called"):
        attention.weights_for(False, torch.zeros(1, 2, 3))
    with pytest.raises(RuntimeError, match="the gate 'one' was not computed; a gated submodule was called outside"):
        attention.gate_for("one", False)
    attention.mask = None
    assert attention.weights_for(False, torch.zeros(1, 2, 3)) is None


def test_gates_are_kept_by_name() -> None:
    attention, values = AttentionPass(), torch.randn(2, 4, 3)
    attention.note_gates(NAMES, values)
    for index, name in enumerate(NAMES):
        assert torch.equal(attention.gate_for(name, False), values[..., index : index + 1])
    attention.note_gates(("two",), values[..., :1])
    assert torch.equal(attention.gate_for("two", True), values[..., :1])
    attention.lengthened = 3
    longer = attention.gate_for("one", True)
    assert longer.shape == (2, 7, 1)
    assert not longer[:, :3].any()
    assert torch.equal(longer[:, 3:], attention.gate_for("one", False))
    attention.note_gates(("one",), values[:, :1, :1])
    assert attention.gate_for("one", True).shape == (2, 1, 1), "a gate of a text is the same for a longer one"


def test_the_weights_of_a_longer_text_leave_its_first_tokens_out() -> None:
    attention = AttentionPass(mask=None, lengthened=2)
    longer = torch.zeros(3, 6, 5)
    want = torch.tensor([0.0, 0.0, 0.25, 0.25, 0.25, 0.25]).expand(3, -1)
    torch.testing.assert_close(attention.weights_for(True, longer), want)
    assert attention.weights_for(False, longer) is None
    attention.weights = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(attention.weights_for(True, longer[:1]), torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0, 0.0]]))
    assert attention.weights_for(False, longer) is attention.weights


# Gates


def test_gates_have_no_parameters_of_their_own() -> None:
    assert not list(make().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sizes", [(), (2,), (4, 1, 6)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_an_entry_is_of_its_neighbours_kind(
    dtype: torch.dtype, device: str, sizes: tuple[int, ...], biased: bool
) -> None:
    like = torch.empty(0, dtype=dtype, device=device)
    rows = tuple(
        Rows(row.name, row.part, row.kind, row.weight.to(like), None if row.bias is None else row.bias.to(like))
        for row in rows_of(sizes, biased)
    )
    entry = make_entry(rows, like=like)
    shapes = {name: tuple(parameter.shape) for name, parameter in entry.named_parameters()}
    count = 3 + sum(sizes)
    assert shapes == {"weight": (count, 5), "bias": (count if biased and sizes else 3,)}
    assert all(p.dtype == dtype and p.device.type == device and p.requires_grad for p in entry.parameters())


def test_gates_start_near_one_half() -> None:
    torch.manual_seed(0)
    entry = Entry(2_000, NAMES, GateConfig(), LIKE, causal=False)
    assert entry.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(entry.weight.mean().item()) < 0.001
    assert not entry.bias.any()


def test_further_rows_start_where_they_are_said_to() -> None:
    rows = rows_of((4, 2), True)
    entry = Entry(5, NAMES, GateConfig(), LIKE, causal=False, rows=rows)
    assert torch.equal(entry.weight[3:], torch.cat([row.weight for row in rows]))
    assert torch.equal(entry.bias[3:], torch.cat([row.bias for row in rows]))  # type: ignore[misc]
    assert not entry.bias[:3].any()
    entry.start_rows("two", torch.ones(2, 5), torch.full((2,), 7.0))
    assert torch.equal(entry.weight[:7], torch.cat([entry.weight[:3].detach(), rows[0].weight]))
    assert torch.equal(entry.weight[7:], torch.ones(2, 5))
    assert torch.equal(entry.bias[7:], torch.full((2,), 7.0))


def test_a_gate_of_a_text_is_the_mean_over_its_tokens() -> None:
    logits, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    each = torch.sigmoid(logits)
    whole = each.mean(dim=1)[:, None]
    for pooling in ("masked_mean", "mean"):
        torch.testing.assert_close(make(pooling)(logits, None), whole)
    real = torch.stack([each[0, :3].mean(dim=0), each[1, 0]])[:, None]
    torch.testing.assert_close(make()(logits, token_weights(mask, 2)), real)


def test_the_weights_of_a_mean_follow_the_precision_of_the_gates() -> None:
    """Once for all gates of that precision, and anew for another."""
    gates, weights = make(), token_weights(torch.tensor([[1, 1, 0]]), 1)
    logits = torch.randn(1, 3, 3)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        values = gates(logits.to(dtype), weights)
        assert values.dtype == dtype
        torch.testing.assert_close(values.float(), torch.sigmoid(logits[:, :2]).mean(1, True), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(2, 4), (4,), (2, 3, 4)], ids=str)
def test_a_gate_of_a_token_is_its_own(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 3)
    for weights in (None, torch.ones(2, 4)):
        assert torch.equal(make(causal=True)(logits, weights), torch.sigmoid(logits))


# Entries


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(), (2,), (4, 1, 6)], ids=str)
def test_one_product_is_each_of_them(sizes: tuple[int, ...], biased: bool) -> None:
    rows, x = rows_of(sizes, biased), torch.randn(2, 4, 5)
    entry = make_entry(rows, causal=True)
    gates, low = entry(x, None)
    torch.testing.assert_close(gates, torch.sigmoid(x @ entry.weight[:3].t() + entry.bias[:3]))
    if not sizes:
        assert low is None
        return
    want = torch.cat([x @ row.weight.t() + (0 if row.bias is None else row.bias) for row in rows], dim=-1)
    torch.testing.assert_close(low, want)
    assert entry.row_names == NAMES[: len(sizes)]


def test_an_entry_computes_in_the_precision_of_its_weight() -> None:
    entry, x = make_entry(rows_of((2,), False), causal=True), torch.randn(2, 4, 5).bfloat16()
    gates, low = entry(x, None)
    assert gates.dtype == low.dtype == torch.float32
    torch.testing.assert_close(low, x.float() @ entry.weight[3:].t())


def test_parts_are_views_of_rows_that_cover_every_parameter_once() -> None:
    for sizes, biased in (((), False), ((4, 1, 6), False), ((4, 2), True)):
        entry = make_entry(rows_of(sizes, biased))
        seen = {name: torch.zeros(parameter.shape) for name, parameter in entry.named_parameters()}
        for part in entry.parts:
            part.of(seen[part.parameter]).add_(1)
        assert all((count == 1).all() for count in seen.values())
        names = [part.name for part in entry.parts]
        assert len(set(names)) == len(names)
        assert {"gate.one.weight", "gate.three.bias"} <= set(names)
        assert {part.gate for part in entry.parts if part.kind == "gate"} == set(NAMES)
        suffixes = (".weight", ".bias") if biased else ("",)
        rows = {f"{name}.A{suffix}" for name in NAMES[: len(sizes)] for suffix in suffixes}
        assert {part.name for part in entry.parts if part.kind == "lora"} == rows


def test_gates_behind_a_network_and_without_input_share_no_product() -> None:
    for gate in ({"network": "mlp"}, {"network": "recurrent"}, {"network": "transformer"}, {"pooling": "static"}):
        assert not shares_product(GateConfig(**gate))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="share no product"):
            make_entry(rows_of((2,), False), **gate)  # type: ignore[arg-type]
    static = make_entry(pooling="static")
    assert [name for name, _ in static.named_parameters()] == ["bias"]
    values, low = static(torch.randn(2, 4, 5), None)
    assert low is None
    torch.testing.assert_close(values, torch.sigmoid(static.bias).expand(2, 1, 3))
    network = make_entry(network="mlp", hidden=4)
    assert {part.gate for part in network.parts} == {*NAMES, "network"}
    x = torch.randn(2, 4, 5)
    assert network.network is not None
    each = torch.sigmoid(network.network(x, None) @ network.weight.t() + network.bias)
    torch.testing.assert_close(network(x, None)[0], each.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("network", ["recurrent", "transformer"])
def test_a_network_reads_a_text_without_a_mask_as_one_without_padding(network: str) -> None:
    entry, x = make_entry(network=network, hidden=4), torch.randn(2, 3, 5)
    values = entry(x, None)[0]
    assert values.shape == (2, 1, 3)
    torch.testing.assert_close(values, entry(x, torch.full((2, 3), 1 / 3))[0])
    padded, weights = torch.cat([x, torch.randn(2, 2, 5)], dim=1), torch.tensor([[1 / 3] * 3 + [0.0] * 2] * 2)
    torch.testing.assert_close(values, entry(padded, weights)[0])


def test_gates_start_where_they_are_said_to() -> None:
    for gate in ({}, {"temperature": 2.0}, {"activation": "tanh"}):
        config = GateConfig(**gate)
        entry = Entry(5, NAMES, config, LIKE, causal=True, starts={"two": 0.25})
        values = entry(torch.zeros(1, 1, 5), None)[0][0, 0]
        rest = 0.0 if "activation" in gate else 0.5
        torch.testing.assert_close(values, torch.tensor([rest, 0.25, rest]))


def test_a_softmax_over_one_gate_and_a_text_network_in_a_causal_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="a softmax over one gate, one, is always 1"):
        Gates(("one",), GateConfig(activation="softmax", shared=True), causal=False)
    with pytest.raises(ConfigError, match="a causal layer would see the future"):
        Gates(NAMES, GateConfig(network="recurrent"), causal=True)


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_kept_of_an_entry_computes_as_before(biased: bool) -> None:
    rows, x = rows_of((4, 1, 6), biased), torch.randn(2, 4, 5)
    entry = make_entry(rows)
    whole, low = entry(x, None)
    kept = copy.deepcopy(entry)
    kept.keep({"one", "three"})
    gates, further = kept(x, None)
    torch.testing.assert_close(gates, whole[..., [0, 2]])
    torch.testing.assert_close(further, low[..., [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]])
    assert kept.gates.names == kept.row_names == ("one", "three")
    assert kept.weight.shape == (12, 5)
    assert sum(part.of(kept.get_parameter(part.parameter)).numel() for part in kept.parts) == sum(
        parameter.numel() for parameter in kept.parameters()
    )
    linear = entry.extract("two")
    torch.testing.assert_close(linear(x), low[..., 4:5])
    assert (linear.bias is not None) is biased
    linear.weight.data.zero_()
    torch.testing.assert_close(entry(x, None)[1], low)


@pytest.mark.parametrize("biased", [False, True])
def test_an_entry_with_separate_parameters_computes_and_is_stored_as_before(biased: bool) -> None:
    entry, x = make_entry(rows_of((4, 1, 6), biased)), torch.randn(2, 4, 5)
    entry.weight.requires_grad_(False)
    apart = copy.deepcopy(entry)
    apart.separate()
    biases = {"gate_bias", "row_bias"} if biased else {"bias"}
    own = dict(apart.named_parameters())
    assert own.keys() == {"gate_weight", "row_weight", *biases}
    assert {name for name, parameter in own.items() if parameter.requires_grad} == biases
    apart.separate()
    assert all(parameter is own[name] for name, parameter in apart.named_parameters()), "nothing is left to separate"
    assert [part.name for part in apart.parts] == [part.name for part in entry.parts]
    for part, former in zip(apart.parts, entry.parts, strict=True):
        assert torch.equal(part.of(own[part.parameter]), former.of(entry.get_parameter(former.parameter)))
    state = entry.state_dict()
    assert apart.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in apart.state_dict().items())
    other = make_entry(rows_of((4, 1, 6), biased))
    other.separate()
    other.load_state_dict(state)
    for made in (apart, other):
        for got, want in zip(made(x, None), entry(x, None), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="size mismatch for row_weight"):
        other.load_state_dict({**state, "weight": state["weight"][:-1]})
    apart.keep(NAMES)
    assert {name: tuple(p.shape) for name, p in apart.named_parameters()} == {
        name: tuple(p.shape) for name, p in entry.named_parameters()
    }
    for got, want in zip(apart(x, None), entry(x, None), strict=True):
        torch.testing.assert_close(got, want)
    alone = make_entry()
    alone.separate()
    assert alone.state_dict().keys() == dict(alone.named_parameters()).keys() == {"weight", "bias"}


# Real tokens


def test_a_token_that_some_query_may_attend_to_is_real() -> None:
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 2, :3] = True
    mask[0, 0, 0, 0] = True
    weights = token_weights(mask, 1)
    assert weights is not None
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_bias_in_an_additive_mask_hides_what_softmax_gives_nothing(dtype: torch.dtype) -> None:
    logits = [0.0, -100.0, 5.0, -105.0, -1e4, torch.finfo(dtype).min, -torch.inf]
    mask = torch.tensor(logits, dtype=dtype).view(1, 1, 1, 7)
    real = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal((mask.float().view(-1).exp() > 0).float(), real)
    weights = token_weights(mask, 1)
    assert weights is not None
    torch.testing.assert_close(weights, real[None] / 3)
    assert torch.tensor(CLOSED - 0.8).exp() == 0
    assert torch.tensor(CLOSED + 0.01).exp() > 0


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.uint8, torch.float32, torch.float16])
def test_a_mask_of_two_dimensions_has_zeros_at_padding(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]]).to(dtype)
    torch.testing.assert_close(token_weights(mask, 2), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_truth_values_of_four_dimensions(dtype: torch.dtype) -> None:
    """DeBERTa reads a mask of any type so; others add a floating-point one."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]]).to(dtype)[:, None, None]
    want = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(token_weights(mask, 2, truth_values=True), want)
    if dtype.is_floating_point:
        torch.testing.assert_close(token_weights(mask, 2), torch.full((2, 3), 1 / 3))
    else:
        torch.testing.assert_close(token_weights(mask, 2), want)


def test_zeros_of_a_floating_point_mask_are_open_where_the_attention_adds_it() -> None:
    """DeBERTa reads its mask of four dimensions as truth values, and Longformer adds its mask of two dimensions."""
    mask = torch.tensor([[0.0, -200.0, 0.0]])
    for dims, options, want in (
        (2, {}, [[0.0, 1.0, 0.0]]),
        (2, {"added": True}, [[0.5, 0.0, 0.5]]),
        (2, {"added": True, "truth_values": True}, [[0.0, 1.0, 0.0]]),
        (4, {}, [[0.5, 0.0, 0.5]]),
        (4, {"truth_values": True}, [[0.0, 1.0, 0.0]]),
    ):
        shaped = mask if dims == 2 else mask[:, None, None]
        assert token_weights(shaped, 1, **options).tolist() == want  # type: ignore[arg-type, union-attr]
        assert token_weights(shaped, 3, **options).tolist() == 3 * want  # type: ignore[arg-type, union-attr]


def test_a_block_mask_of_flex_attention_is_read() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    ends = torch.tensor([3, 5])
    mask = flex.create_block_mask(lambda b, h, q, kv: kv < ends[b], 2, None, 5, 5, device="cpu")
    real = (torch.arange(5) < ends[:, None]).float()
    torch.testing.assert_close(token_weights(mask, 2), real / real.sum(1, keepdim=True))


def test_weights_are_computed_once_a_pass() -> None:
    mask, facts = torch.tensor([[1, 1, 0]]), PassFacts()
    weights = token_weights(mask, 1, facts)
    assert token_weights(mask, 1, facts) is weights
    assert token_weights(mask.clone(), 1, facts) is not weights
    assert token_weights(mask, 1, PassFacts()) is not weights


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot read a mask of type list; call .*set_attn_implementation\('sdpa'\)"):
        token_weights([1, 1], 1)


def test_gates_say_what_they_are() -> None:
    assert repr(make("mean")) == "Gates(one, two, three; pooling=mean)"
    assert repr(make(causal=True)) == "Gates(one, two, three; pooling=token)"
    assert repr(make_entry(rows_of((2, 3), True))).startswith(
        "Entry(\n  rows: one, two, three, one.A.weight, two.A.weight\n"
    )
