"""Prefixes by themselves: their network, a pass's own, the masks they make; and how attention finds its arguments."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inside import is_idle
from torch import Tensor, nn

from unipelt.config.parts import PrefixConfig
from unipelt.hosts.attention_interface import is_causal
from unipelt.injection.hooks import enter_layer, enter_stack, leave_layer, leave_stack
from unipelt.submodules.forward_pass import ForwardPass, Passes, PassFacts, SetRows, split_heads
from unipelt.submodules.prefix import Prefix, PrefixNetwork
from unipelt.submodules.room import ROOM, ForwardArgument, Room, StackSet

LENGTH, HIDDEN, WIDTH, LAYERS, TOKENS = 3, 6, 4, 2, 5
LOWEST = torch.finfo(torch.float32).min
LIKE = torch.zeros(1)


def make_network() -> PrefixNetwork:
    torch.manual_seed(0)
    network = PrefixNetwork(HIDDEN, WIDTH, LAYERS, PrefixConfig(LENGTH, 7), LIKE)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def make(
    gating: str = "scale",
    gate: bool = True,
    network: PrefixNetwork | None = None,
    causal: bool = False,
    index: int = 1,
    softmax: str = "shared",
) -> Prefix:
    config = PrefixConfig(LENGTH, 7, gate, gating, softmax=softmax)  # type: ignore[arg-type]
    torch.manual_seed(1)
    prefix = Prefix(index, "prefix_network", WIDTH, config, network, LIKE, by_query=causal, gate_name="prefix")
    if prefix.keys_values is not None:
        nn.init.normal_(prefix.keys_values)
    return prefix


# The network


def test_a_network_is_two_layers_and_each_attention_has_its_part() -> None:
    network = make_network()
    low = torch.tanh(network.embedding @ network.w1.weight.t() + network.w1.bias)
    whole = low @ network.w2.weight.t() + network.w2.bias  # (L, N 2 W)
    want = whole.view(LENGTH, LAYERS, 2, WIDTH).permute(1, 2, 0, 3)
    torch.testing.assert_close(network(), want)
    for index in range(LAYERS):
        torch.testing.assert_close(network(index), want[index])
        torch.testing.assert_close(make(network=network, index=index)(), want[index])


def test_a_deployed_prefix_is_a_parameter_that_starts_at_zero() -> None:
    config = PrefixConfig(LENGTH, 7)
    prefix = Prefix(0, "prefix_network", WIDTH, config, None, LIKE, by_query=False, gate_name="prefix")
    assert [name for name, _ in prefix.named_parameters()] == ["keys_values"]
    assert prefix() is prefix.keys_values
    assert torch.equal(prefix(), torch.zeros(2, LENGTH, WIDTH))
    assert "deployed, gating=scale" in repr(prefix)
    assert "part 1 of prefix_network, gating=mass" in repr(make("mass", network=make_network()))
    assert "gating=none" in repr(make(gate=False))
    prefix = make(gate=False)
    prefix.mass = -0.5
    assert "constant, log g = -0.500" in repr(prefix)


# A pass


class Owner(nn.Module):
    """A stack with a prefix network in its room, and a layer in it."""

    def __init__(self, network: PrefixNetwork | None) -> None:
        super().__init__()
        self.passes = Passes()
        room = Room(self.passes)
        room["default"] = StackSet()
        if network is not None:
            room["default"].add_module("prefix_network", network)
        self.add_module(ROOM, room)
        self.layer = nn.Module()
        self.layer.add_module(ROOM, Room(self.passes))

    def enter(self) -> Any:
        """Begin a pass of the stack; what is given back holds it."""
        held, kwargs = enter_stack(self, (), {})
        assert kwargs == {}
        return held

    def facts(self) -> PassFacts:
        """The facts of the present pass."""
        now = self.passes.current()
        assert now is not None
        return now.facts


def counted(network: PrefixNetwork) -> list[Any]:
    """The arguments of its calls from now on."""
    calls: list[Any] = []
    network.register_forward_hook(lambda module, args, output: calls.append(args))
    return calls


def test_prefixes_are_computed_and_split_by_heads_once_a_pass() -> None:
    network = make_network()
    calls, owner = counted(network), Owner(network)
    prefixes = [make(network=network, index=index) for index in range(LAYERS)]
    held = owner.enter()
    assert calls == [()], "computed at the entry"
    facts = owner.facts()
    for index, prefix in enumerate(prefixes):
        for heads in (1, 2):
            both = prefix.by_head(facts, heads)
            torch.testing.assert_close(both, split_heads(network()[index], heads))
            assert both.shape == (2, heads, LENGTH, WIDTH // heads)
            assert both is prefix.by_head(facts, heads)
    del calls[1:]  # the test's own
    leave_stack(owner, (), None)
    assert owner.passes.current() is None
    held = owner.enter()
    assert owner.facts() is not facts
    assert calls == [(), ()]
    del held
    assert owner.passes.current() is None


def test_a_deployed_prefix_takes_no_part_in_what_a_pass_computes() -> None:
    prefix, facts = make(), PassFacts()
    torch.testing.assert_close(prefix.by_head(facts, 2), split_heads(prefix(), 2))
    assert not facts.prefixes
    owner = Owner(None)
    held = owner.enter()
    assert not owner.facts().prefixes
    del held


def test_networks_are_told_apart_and_those_of_sets_that_do_not_compute_are_left_alone() -> None:
    first, second = make_network(), make_network()
    with torch.no_grad():
        second.embedding.add_(1.0)
    owner: Any = Owner(first)
    room = owner._modules[ROOM]
    room["other"] = StackSet()
    room["other"].add_module("prefix_network", second)
    calls = [counted(first), counted(second)]
    prefixes = [make(network=network) for network in (first, second)]
    held = owner.enter()
    assert calls == [[()], []]
    torch.testing.assert_close(prefixes[0].by_head(owner.facts(), 1), split_heads(first(1), 1))
    torch.testing.assert_close(prefixes[1].by_head(owner.facts(), 1), split_heads(second(1), 1))
    room.active = None
    held = owner.enter()
    assert not owner.facts().prefixes
    with owner.passes.rows(SetRows(("other", None, "default"), (1, 1, 1))):
        held = owner.enter()
    facts = owner.facts()
    assert facts.rows == SetRows(("other", None, "default"), (1, 1, 1))
    assert facts.prefixes.keys() == {first.key, second.key}
    for prefix, network in zip(prefixes, (first, second), strict=True):
        torch.testing.assert_close(prefix.by_head(facts, 1), split_heads(network(1), 1))
    del held


def test_a_layer_without_gradients_in_a_pass_with_them_computes_its_own() -> None:
    """As gradient checkpointing does, which computes the layer again, and wants the same operations."""
    network = make_network()
    calls, owner, prefix = counted(network), Owner(network), make(network=network)
    held = owner.enter()
    facts = owner.facts()
    assert prefix.by_head(facts, 2).requires_grad
    assert calls == [()], "computed at the entry"
    with torch.no_grad():
        assert not prefix.by_head(facts, 2).requires_grad
    assert calls == [(), (1,)]
    assert prefix.by_head(facts, 2).requires_grad
    assert calls == [(), (1,)]
    leave_stack(owner, (), None)
    with torch.no_grad():  # nothing of this pass has gradients
        held = owner.enter()
        prefix.by_head(owner.facts(), 2)
        leave_stack(owner, (), None)
    assert calls == [(), (1,), ()]
    del held


def test_a_layer_that_another_saves_tensors_for_computes_its_own() -> None:
    """Gradient checkpointing without reentry packs what a layer saves: in the layer, not in the stack."""
    network = make_network()
    calls, owner, prefix = counted(network), Owner(network), make(network=network)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        held = owner.enter()
        prefix.by_head(owner.facts(), 2)
        assert calls == [()], "of the whole pass"
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            prefix.by_head(owner.facts(), 2)
        assert calls == [(), (1,)]
    held = owner.enter()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        prefix.by_head(owner.facts(), 2)
    assert calls == [(), (1,), (), (1,)]
    del held


def test_a_layer_begins_a_pass_where_its_stack_does_not() -> None:
    network = make_network()
    owner = Owner(network)
    assert enter_layer(owner.layer, (3,), {"a": 4}) == ((3,), {"a": 4})
    assert owner.passes.current() is None, "nothing holds it"
    entered = enter_layer(owner.layer, (3,), {})
    now = owner.passes.current()
    assert now is not None
    assert now.by_layer
    assert not now.facts.prefixes
    now.attention(1)
    assert enter_layer(owner.layer, (), {}) is None, "of one in the other"
    leave_layer(owner.layer, (), None)
    assert owner.passes.current() is None
    del entered, now
    held = owner.enter()
    inside = owner.passes.current()
    assert inside is not None
    assert enter_layer(owner.layer, (), {}) is None
    inside.attention(1)
    leave_layer(owner.layer, (), None)
    assert owner.passes.current() is inside
    assert not inside.attentions, "the next layer's are its own"
    leave_stack(owner, (), None)
    assert owner.passes.current() is None
    del held


def test_replicas_are_refused() -> None:
    owner: Any = Owner(make_network())
    owner._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel does not work with submodules; start one process a GPU"):
        owner.enter()
    assert owner.passes.current() is None


def test_a_pass_that_is_traced_is_of_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.compile` records does not see what a pass before it left; a pass around a compiled part it does."""
    passes, ran, traced = Passes(), PassFacts(), PassFacts()
    held = passes.enter(PassFacts(), ())
    del held  # by an interrupt
    rows = SetRows(("one",), (1,))

    def check(around: ForwardPass | None) -> None:
        with passes.rows(rows), monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert passes.current() is around
            assert passes.current_or_recomputed() is around
            assert passes.given_rows() is rows
            args = (1, 2)
            assert passes.enter(traced, args) is args
            now = passes.current_or_recomputed()
            assert now is not None
            assert now.facts is traced
            passes.leave()
            assert passes.current() is around

    check(None)
    held = passes.enter(ran, ())
    now = passes.current()
    assert now is not None
    assert now.facts is ran
    check(now)
    assert passes.current() is now
    del held, now
    check(None)
    passes.leave()
    check(None)
    assert is_idle(passes)


class Again(torch.autograd.Function):
    """Calls a function in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.function()
        return grads[0], None


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_backward_pass_begins_one_of_its_own_until_it_ends(error: type[BaseException] | None) -> None:
    """Where gradient checkpointing computes a layer again, in whichever thread."""
    passes, seen = Passes(), []

    def again() -> None:
        found = passes.current_or_recomputed()
        assert found is not None
        assert found is passes.current_or_recomputed() is passes.current()
        found.attention(1)
        seen.append(weakref.ref(found))
        held = passes.enter(PassFacts(), ())  # a stack that is computed again has one of its own
        inside = passes.current()
        assert inside not in (None, found)
        del held, inside
        assert passes.current() is found

    def fail() -> None:
        assert passes.current() is not None
        if error is not None:
            raise error("here")

    x = torch.ones(2, requires_grad=True)
    y = Again.apply(Again.apply(Again.apply(x, fail), again), again)
    gc.collect()
    gc.disable()  # references alone
    try:
        y.sum().backward()
        ended = True
    except (ValueError, KeyboardInterrupt):
        ended = False
    finally:
        gc.enable()
    assert ended is (error is None)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0]() is None
    assert passes.current() is None
    assert is_idle(passes)


def test_one_backward_pass_inside_another_has_its_own() -> None:
    """As reentrant gradient checkpointing nests them."""
    passes, seen = Passes(), []

    def note() -> None:
        seen.append(passes.current_or_recomputed())

    def inner() -> None:
        note()
        with torch.enable_grad():
            Again.apply(torch.ones(1, requires_grad=True), note).sum().backward()
        note()

    Again.apply(torch.ones(1, requires_grad=True), inner).sum().backward()
    assert None not in seen
    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]
    assert passes.current() is None


# Keys, values and masks


def test_a_gate_scales_keys_and_values_of_its_example() -> None:
    gate = torch.tensor([[0.25], [0.5]])
    for gating, want in (("scale", gate), ("mass", torch.ones(2, 1))):
        prefix = make(gating)
        for both in (prefix(), split_heads(prefix(), 2)):
            rows = torch.stack(prefix.scaled(both, 2, torch.float32, gate))
            assert rows.shape == (2, 2, *both.shape[1:])
            torch.testing.assert_close(rows, both[:, None] * want.view(1, 2, *[1] * (both.dim() - 1)))
            plain = torch.stack(prefix.scaled(both, 2, torch.float32, None))
            torch.testing.assert_close(plain, both[:, None].expand(2, 2, *both.shape[1:]))
            assert {rows.dtype for rows in prefix.scaled(both, 2, torch.bfloat16, gate)} == {torch.bfloat16}


FORMS = ("none", "boolean", "additive", "boolean of queries", "additive of one")


def mask(form: str) -> Tensor | None:
    """Two texts, the second two tokens shorter."""
    real = torch.arange(TOKENS) < torch.tensor([5, 3])[:, None, None, None]
    if form == "none":
        return None
    if form == "boolean of queries":
        return real.expand(2, 1, TOKENS, TOKENS) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    if form == "boolean":
        return real
    additive = torch.zeros(2, 1, 1, TOKENS).masked_fill(~real, LOWEST)
    return additive[1:] if form == "additive of one" else additive


def weights(given: Tensor | None, keys: int) -> Tensor:
    """What a mask makes of keys that are all alike, (2, 1, queries, keys)."""
    if given is None:
        return torch.full((2, 1, 1, keys), 1 / keys)
    additive = torch.zeros(given.shape).masked_fill(~given, -torch.inf) if given.dtype == torch.bool else given
    return additive.softmax(dim=-1).expand(2, 1, -1, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mass", ["none", "gate", "gate of a query", "constant", "scale"])
def test_the_masks_of_a_prefix(mass: str, form: str) -> None:
    """A prefix key weighs g times as much as a key of the text; where it has no such gate, as much."""
    given, prefix = mask(form), make("scale" if mass in ("none", "scale") else "mass", gate=mass != "constant")
    gate, g = None, torch.ones(1, 1)
    if mass == "gate":
        gate = g = torch.tensor([[0.25], [0.0]])
    elif mass == "gate of a query":
        gate = g = torch.linspace(0.1, 0.9, 2 * TOKENS).view(2, TOKENS)
    elif mass == "constant":
        prefix.mass, g = -0.7, torch.tensor([[-0.7]]).exp()
    elif mass == "scale":
        gate = torch.tensor([[0.25], [0.5]])
    columns = prefix.columns(given, torch.float32, TOKENS, gate, PassFacts())
    if form == "none" and mass in ("none", "scale"):
        assert columns is None
        return
    assert columns is not None
    assert columns.shape[-1] == LENGTH + TOKENS
    assert columns.dtype == torch.float32
    assert not columns.isnan().any()
    text = weights(given, TOKENS)
    rows = max(text.shape[2], g.shape[1])
    before = g[:, None, :, None].expand(2, 1, rows, LENGTH)
    seen = (text > 0).float().expand(2, 1, rows, TOKENS)  # those keys that are seen are all alike
    share = torch.cat([before, seen], dim=-1)
    torch.testing.assert_close(weights(columns, LENGTH + TOKENS), share / share.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_gate_has_a_finite_gradient(dtype: torch.dtype) -> None:
    gate = torch.tensor([[0.0], [0.5]], dtype=dtype, requires_grad=True)
    columns = make("mass").columns(mask("boolean"), dtype, TOKENS, gate, PassFacts())
    assert columns is not None
    assert columns.dtype == dtype
    assert (columns[0, ..., :LENGTH] == -torch.inf).all()
    columns.softmax(dim=-1)[..., 0].sum().backward()
    assert gate.grad is not None
    assert gate.grad.isfinite().all()


def test_masks_are_of_the_attentions_precision_and_made_once_a_pass() -> None:
    prefix, given, facts = make(), mask("boolean"), PassFacts()
    narrow = prefix.columns(given, torch.bfloat16, TOKENS, None, facts)
    assert narrow is not None
    assert narrow.dtype == torch.bfloat16
    assert prefix.columns(given, torch.bfloat16, TOKENS, None, facts) is narrow
    assert make().columns(given, torch.bfloat16, TOKENS, None, facts) is narrow, "the next layer's"
    assert prefix.columns(given, torch.bfloat16, TOKENS, None, PassFacts()) is not narrow
    wide = prefix.columns(given, torch.float32, TOKENS, None, facts)
    assert wide is not None
    assert wide.dtype == torch.float32


def test_causal_attention_has_its_gate_in_the_mass() -> None:
    assert make(causal=True).gating == "mass"
    assert make("mass").gating == "mass"
    assert make().gating == "scale"


# A softmax of its own


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_the_prefix_alone(causal: bool) -> None:
    """Two heads of keys for four of queries; a gate of an example, or one of each query."""
    torch.manual_seed(2)
    prefix = make(softmax="own", causal=causal)
    query = torch.randn(2, 4, TOKENS, WIDTH // 2)
    gate = torch.rand(2, TOKENS if causal else 1)
    keys, values = (part.view(LENGTH, 2, WIDTH // 2).repeat_interleave(2, dim=1) for part in prefix())
    both = prefix.by_head(PassFacts(), 2)
    torch.testing.assert_close(both, split_heads(prefix(), 2))
    shares = (0.3 * torch.einsum("bhtd,lhd->bhtl", query, keys)).softmax(dim=-1)
    want = torch.einsum("bhtl,lhd->bthd", shares, values)
    torch.testing.assert_close(prefix.attention(both, query, None, scaling=0.3), want)
    torch.testing.assert_close(prefix.attention(both, query, gate, scaling=0.3), want * gate[:, :, None, None])
    plain = prefix.attention(both, query, None)
    torch.testing.assert_close(plain, prefix.attention(both, query, None, scaling=(WIDTH // 2) ** -0.5))
    assert (plain - want).abs().max() > 1e-3
    assert prefix.attention(both, query.bfloat16(), gate.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [1, 3])
def test_a_gate_of_an_example_scales_the_values(batch: int) -> None:
    """Values and gradients are those of the same gate at every query, which scales the output."""
    torch.manual_seed(3)
    prefix = make(softmax="own")
    query = torch.randn(batch, 2, TOKENS, WIDTH // 2, requires_grad=True)
    gate = torch.rand(batch, 1, requires_grad=True)
    both = prefix.by_head(PassFacts(), 2).detach().requires_grad_()
    scaled, weighed = (prefix.attention(both, query, one) for one in (gate, gate.expand(-1, TOKENS)))
    torch.testing.assert_close(scaled, weighed)
    seed = torch.randn_like(scaled)
    got, want = (torch.autograd.grad(out, (both, query, gate), seed) for out in (scaled, weighed))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(prefix.attention(both, query, gate), scaled)
        assert not prefix.attention(both, query, torch.zeros_like(gate)).any(), "exactly"


def test_it_drops_what_the_models_attention_drops() -> None:
    prefix, query = make(softmax="own"), torch.zeros(1, 1, 4000, WIDTH)
    kept = prefix.attention(split_heads(prefix(), 1), query, None)
    dropped = prefix.attention(split_heads(prefix(), 1), query, None, dropout=0.5)
    assert (dropped - kept).abs().max() > 0.1
    torch.testing.assert_close(dropped.mean(1), kept.mean(1), atol=0.05, rtol=0)


def test_its_form_shows() -> None:
    assert "deployed, gating=added" in repr(make(softmax="own"))
    assert "gating=added" in repr(make(softmax="own", gate=False))


# Arguments


def test_an_argument_is_found_wherever_it_was_given() -> None:
    named, passed = ForwardArgument("mask", 1), ForwardArgument("mask", None)
    assert named.read(("x", "m"), {}) == "m"
    assert named.read(("x",), {"mask": "m"}) == "m"
    assert named.read(("x",), {}) is None
    assert passed.read(("x", "y"), {"mask": "m"}) == "m"
    with pytest.raises(RuntimeError, match="called without 'mask'; its description names another argument"):
        passed.read(("x", "y"), {"other": 1})
    for argument, args, want in (
        (named, ["x", "m"], (["x", "new"], {})),
        (named, ["x"], (["x"], {"mask": "new"})),
        (passed, ["x", "y"], (["x", "y"], {"mask": "new"})),
    ):
        kwargs: dict[str, Any] = {}
        argument.write(args, kwargs, "new")
        assert (args, kwargs) == want


def test_attention_is_causal_as_transformers_decides() -> None:
    plain, looks_both_ways = nn.Module(), nn.Module()
    looks_both_ways.is_causal = False  # type: ignore[assignment]
    assert is_causal(plain, {})
    assert not is_causal(looks_both_ways, {})
    assert not is_causal(looks_both_ways, {"is_causal": None})
    assert is_causal(looks_both_ways, {"is_causal": True})
    assert not is_causal(plain, {"is_causal": False})
