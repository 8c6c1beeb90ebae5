"""Prefixes by themselves: their network, a pass's own, the masks they make; and how attention finds its arguments."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipelt.config.methods import PrefixConfig
from unipelt.hosts.attention_interface import is_causal
from unipelt.injection.attention_hooks import ForwardArgument
from unipelt.submodules.forward_pass import Pass
from unipelt.submodules.prefix import Prefix, PrefixNetwork, enter_stack, leave_stack

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
    prefix = Prefix(index, "prefix_network", WIDTH, config, network, LIKE, by_query=causal)
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
    prefix = Prefix(0, "prefix_network", WIDTH, PrefixConfig(LENGTH, 7), None, LIKE, by_query=False)
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


def test_a_pass_shows_its_prefixes_until_it_ends() -> None:
    first, second, one = (torch.ones(2),), (torch.zeros(2),), Pass()
    assert one.look() is None
    one.enter(first)
    assert one.look() is first
    one.enter(second)
    assert one.look() is second
    seen: list[Any] = []
    thread = Thread(target=lambda: seen.append(one.look()))
    thread.start()
    thread.join()
    assert seen == [None], "another thread is in no pass"
    one.leave()
    assert one.look() is None


def test_a_pass_without_gradients_keeps_nothing() -> None:
    one = Pass()
    with torch.no_grad():
        one.enter((torch.ones(2),))
        one.leave()
    assert not one._prefixes
    one.enter((torch.ones(2),))
    one.leave()
    assert one._prefixes, "the backward pass may want them"
    one.leave()


def test_a_pass_that_is_traced_is_of_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.compile` records does not see what a pass beside it left."""
    ran, traced = (torch.ones(2, 1, 3),), (torch.zeros(2, 1, 3),)
    of_stack = Pass()
    of_stack.enter(ran)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert of_stack.look() is None
    of_stack.enter(traced)
    assert of_stack.look() is traced
    of_stack.leave()
    assert of_stack.look() is None
    monkeypatch.undo()
    assert of_stack.look() is ran


def test_a_backward_pass_in_a_thread_of_its_own_finds_the_only_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; of two passes it would not know which is its own."""
    of_stack, prefixes = Pass(), (torch.ones(2, 1, 3),)

    def forward() -> None:
        of_stack.enter(prefixes)
        of_stack.leave()

    def in_a_thread() -> None:
        thread = Thread(target=forward)
        thread.start()
        thread.join()

    in_a_thread()
    assert of_stack.look() is None
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    assert of_stack.look() is prefixes
    of_stack._prefixes[0] = (torch.zeros(2, 1, 3),)  # of one more thread
    assert of_stack.look() is None


def test_a_layer_without_gradients_in_a_pass_with_them_computes_its_own() -> None:
    """As every later one of that pass."""
    network, calls = make_network(), []
    prefix = make(network=network)
    network.register_forward_hook(lambda module, args, output: calls.append(args))
    owner = nn.Module()
    owner.prefix_network = network
    enter_stack(owner, ())
    assert prefix().requires_grad
    assert calls == [()], "computed at the entry"
    with torch.no_grad():
        assert not prefix().requires_grad
    assert calls == [(), (1,)]
    prefix()
    assert calls == [(), (1,), (1,)]
    leave_stack(owner, (), None)
    with torch.no_grad():  # nothing of this pass has gradients
        enter_stack(owner, ())
        prefix()
        leave_stack(owner, (), None)
    assert calls == [(), (1,), (1,), ()]


# Keys, values and masks


def test_a_gate_scales_keys_and_values_of_its_example() -> None:
    gate = torch.tensor([[0.25], [0.5]])
    for gating, want in (("scale", gate), ("mass", torch.ones(2, 1))):
        prefix = make(gating)
        rows = prefix.rows(2, torch.float32, gate)
        assert rows.shape == (2, 2, LENGTH, WIDTH)
        torch.testing.assert_close(rows, prefix()[:, None] * want.view(1, 2, 1, 1))
        torch.testing.assert_close(prefix.rows(2, torch.float32, None), prefix()[:, None].expand(2, 2, -1, -1))
        assert prefix.rows(2, torch.bfloat16, gate).dtype == torch.bfloat16


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
    columns = prefix.columns(given, torch.float32, TOKENS, gate)
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
    columns = make("mass").columns(mask("boolean"), dtype, TOKENS, gate)
    assert columns is not None
    assert columns.dtype == dtype
    assert (columns[0, ..., :LENGTH] == -torch.inf).all()
    columns.softmax(dim=-1)[..., 0].sum().backward()
    assert gate.grad is not None
    assert gate.grad.isfinite().all()


def test_masks_are_of_the_attentions_precision_and_made_once() -> None:
    prefix, given = make(), mask("boolean")
    narrow = prefix.columns(given, torch.bfloat16, TOKENS, None)
    assert narrow is not None
    assert narrow.dtype == torch.bfloat16
    assert prefix.columns(given, torch.bfloat16, TOKENS, None) is narrow
    wide = prefix.columns(given, torch.float32, TOKENS, None)
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
    shares = (0.3 * torch.einsum("bhtd,lhd->bhtl", query, keys)).softmax(dim=-1)
    want = torch.einsum("bhtl,lhd->bthd", shares, values)
    torch.testing.assert_close(prefix.attention(query, 2, None, scaling=0.3), want)
    torch.testing.assert_close(prefix.attention(query, 2, gate, scaling=0.3), want * gate[:, :, None, None])
    plain = prefix.attention(query, 2, None)
    torch.testing.assert_close(plain, prefix.attention(query, 2, None, scaling=(WIDTH // 2) ** -0.5))
    assert (plain - want).abs().max() > 1e-3
    assert prefix.attention(query.bfloat16(), 2, gate.bfloat16()).dtype == torch.bfloat16


def test_it_drops_what_the_models_attention_drops() -> None:
    prefix, query = make(softmax="own"), torch.zeros(1, 1, 4000, WIDTH)
    kept = prefix.attention(query, 1, None)
    dropped = prefix.attention(query, 1, None, dropout=0.5)
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
