"""Gates, and the slots that carry what they give, by themselves."""

from __future__ import annotations

import copy
import pickle
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn

from unipelt.config.methods import GateConfig
from unipelt.submodules.forward_pass import Slot
from unipelt.submodules.gate import Gates, product, token_weights

NAMES = ("one", "two", "three")
LIKE = torch.zeros(1)


def make(pooling: str = "masked_mean", causal: bool = False) -> Gates:
    torch.manual_seed(0)
    gates = Gates(5, NAMES, GateConfig(pooling), LIKE, causal=causal)  # type: ignore[arg-type]
    nn.init.normal_(gates.bias)
    return gates


def test_what_is_put_is_taken_once() -> None:
    slot, value = Slot(), torch.ones(2)
    assert slot.is_empty()
    with pytest.raises(KeyError):
        slot.take()
    slot.put(torch.zeros(2))
    slot.put(value)
    assert not slot.is_empty()
    assert slot.take() is value
    assert slot.is_empty()
    slot.put(None)  # where every token is real
    assert not slot.is_empty()
    assert slot.take() is None
    with pytest.raises(KeyError):
        slot.take()


def test_each_thread_takes_its_own() -> None:
    slot, barrier, taken = Slot(), Barrier(3), {}

    def work(number: int) -> None:
        slot.put(torch.tensor(number))
        barrier.wait(10)  # all are there
        taken[number] = slot.take()

    threads = [Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == {0: torch.tensor(0), 1: torch.tensor(1), 2: torch.tensor(2)}
    assert slot.is_empty()


def test_a_copy_of_a_slot_is_empty() -> None:
    slot = Slot()
    slot.put(torch.ones(1))
    for other in (copy.deepcopy(slot), copy.copy(slot), pickle.loads(pickle.dumps(slot))):
        assert type(other) is Slot
        assert other.is_empty()
    assert not slot.is_empty()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gates_are_parameters_of_their_neighbours_kind(dtype: torch.dtype, device: str) -> None:
    gates = Gates(5, NAMES, GateConfig(), torch.empty(0, dtype=dtype, device=device), causal=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in gates.named_parameters()}
    assert shapes == {"weight": (3, 5), "bias": (3,)}
    assert all(p.dtype == dtype and p.device.type == device and p.requires_grad for p in gates.parameters())


def test_gates_start_near_one_half() -> None:
    torch.manual_seed(0)
    gates = Gates(2_000, NAMES, GateConfig(), LIKE, causal=False)
    assert gates.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(gates.weight.mean().item()) < 0.001
    assert not gates.bias.any()


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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(), (2,), (4, 1, 6)], ids=str)
def test_one_product_is_each_of_them(sizes: tuple[int, ...], biased: bool) -> None:
    gates, x = make(), torch.randn(2, 4, 5)
    others = [torch.randn(size, 5) for size in sizes]
    bias = torch.randn(sum(sizes)) if biased and sizes else None
    logits, low = product(x, gates, others, bias)
    torch.testing.assert_close(logits, x @ gates.weight.t() + gates.bias)
    want: Tensor = torch.cat([x @ other.t() for other in others], dim=-1) if others else x.new_zeros(2, 4, 0)
    torch.testing.assert_close(low, want if bias is None else want + bias)


def test_a_token_that_some_query_may_attend_to_is_real() -> None:
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 2, :3] = True
    mask[0, 0, 0, 0] = True
    weights = token_weights(mask, 1)
    assert weights is not None
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))


def test_a_small_bias_in_an_additive_mask_hides_nothing() -> None:
    mask = torch.tensor([0.0, -1e4, 5.0, torch.finfo(torch.float32).min]).view(1, 1, 1, 4)
    weights = token_weights(mask, 1)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot read a list .*set_attn_implementation\('sdpa'\)"):
        token_weights([1, 1], 1)  # type: ignore[arg-type]


def test_gates_say_what_they_are() -> None:
    assert repr(make("mean")) == "Gates(one, two, three; pooling=mean)"
    assert repr(make(causal=True)) == "Gates(one, two, three; pooling=token)"
