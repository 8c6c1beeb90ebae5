"""Tests for a GPU: the same numbers as on a CPU, in every way that a model is used.

`.ci/gpu` runs these on a GPU. Elsewhere they run on the CPU, so that they are known to work before a GPU is at hand.
`UNIPELT_DEVICE` names the device.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gates.test_fold import by_name, hold
from helpers import assert_near, shake, small
from measuring import OperationCounter
from tiny import DECODERS, FAMILIES, KINDS, WITHOUT_INTERFACE, tiny_batch, tiny_model
from torch import Tensor, nn

import unipelt
from unipelt.pack import Pack, kept_values, losses

pytestmark = pytest.mark.cuda
DEVICE = os.environ.get("UNIPELT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.startswith("cuda")
METHODS = ("unipelt-apl", "unipelt-al")
LABELS = torch.tensor([0, 1, 1])
EVERY = list(FAMILIES) if ON_GPU else list(KINDS)


def method_for(family: str, method: str = "unipelt-apl") -> unipelt.UniPELTConfig:
    """The method, without a prefix where the family takes none."""
    refused = family in WITHOUT_INTERFACE or "prefix" in FAMILIES[family].refused
    return small("unipelt-al" if refused else method)


def made(family: str, method: str = "unipelt-apl", **options: Any) -> Any:
    model = unipelt.inject(tiny_model(family, **options), method_for(family, method))
    shake(model)
    return model


def there(batch: dict[str, Tensor], device: str = DEVICE) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **options).logits
    return found.cpu()


def waits(step: Callable[[], None]) -> int:
    """Count how often a step waits for the device; on a CPU, the operations that would."""
    if not ON_GPU:
        with OperationCounter() as counting:
            step()
        return sum(counting.counts[f"aten.{name}.default"] for name in ("_local_scalar_dense", "nonzero"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


@pytest.mark.parametrize("family", EVERY)
def test_the_device_gives_the_numbers_of_the_cpu(family: str) -> None:
    model, batch = made(family), tiny_batch(family)
    want = logits(model, batch)
    assert_near(logits(model.to(DEVICE), there(batch)), want, 1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_gradients_are_those_of_the_cpu(family: str) -> None:
    model, batch = made(family), tiny_batch(family)
    other = copy.deepcopy(model).to(DEVICE)
    model(**batch).logits.float().square().mean().backward()
    other(**there(batch)).logits.float().square().mean().backward()
    found = dict(other.named_parameters())
    largest = max(one.grad.abs().max().item() for one in model.parameters() if one.grad is not None)
    for name, one in model.named_parameters():
        other_grad = found[name].grad
        assert (one.grad is None) == (other_grad is None), name
        if one.grad is not None and other_grad is not None:
            torch.testing.assert_close(other_grad.cpu(), one.grad, atol=2e-4 * max(1.0, largest), rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", "gpt2", "llama"])
def test_half_precision_is_near(family: str) -> None:
    """Trained parameters are float32 over a base in bfloat16."""
    model, batch = made(family), tiny_batch(family)
    want = logits(model, batch)
    half: Any = unipelt.inject(tiny_model(family).to(torch.bfloat16), method_for(family))
    half.load_state_dict(kept_values(model), strict=False)
    assert {one.dtype for one in half.parameters() if one.requires_grad} == {torch.float32}
    got = logits(half.to(DEVICE).eval(), there(batch)).float()
    assert (got - want).abs().max() < 0.1 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16] if ON_GPU else [torch.bfloat16])
def test_a_model_learns_in_half_precision(kind: torch.dtype) -> None:
    model, batch = made("bert").to(DEVICE).train(), there(tiny_batch("bert"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, enabled=kind is torch.float16)
    seen = []
    for _ in range(30):
        with torch.autocast(DEVICE, kind):
            loss = model(**batch, labels=LABELS.to(DEVICE)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_pack_gives_the_gradients_of_single_models(method: str) -> None:
    model = made("bert", method).to(DEVICE)
    begun = []
    for seed in range(3):
        other = copy.deepcopy(model)
        shake(other, seed + 5)
        begun.append(kept_values(other))
    pack = Pack(model, tokens=9)
    replicas = [pack.add(values) for values in begun]
    batch = there(tiny_batch("bert"))
    joined = {name: torch.stack([tensor] * 3) for name, tensor in batch.items()}
    labels = torch.stack([LABELS] * 3).to(DEVICE)
    pack.backward(losses(pack(joined), labels, torch.ones_like(labels, dtype=torch.bool)))
    for values, replica in zip(begun, replicas, strict=True):
        single = copy.deepcopy(model)
        single.load_state_dict(values, strict=False)
        single(**batch, labels=LABELS.to(DEVICE)).loss.backward()
        grads = torch.cat([one.grad for one in replica.parameters if one.grad is not None])
        for name, one in single.named_parameters():
            if one.grad is not None:
                torch.testing.assert_close(pack.places[name].of(grads), one.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing_changes_no_gradient(family: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = made(family).to(DEVICE).train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        options = {"use_cache": False} if family in DECODERS else {}
        model(**there(tiny_batch(family)), **options).logits.square().mean().backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_gives_the_same(family: str) -> None:
    torch._dynamo.reset()
    model, batch = made(family).to(DEVICE), there(tiny_batch(family))
    fast = torch.compile(model, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    options = {"use_cache": False} if family in DECODERS else {}
    assert_near(logits(fast, batch, **options), logits(model, batch, **options), 1e-4)


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_a_saved_folder_comes_back(family: str, tmp_path: Path) -> None:
    model, batch = made(family).to(DEVICE), there(tiny_batch(family))
    unipelt.save(model, tmp_path)
    loaded = unipelt.load(tiny_model(family).to(DEVICE), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert {one.device.type for one in loaded.parameters()} == {torch.device(DEVICE).type}


def test_rows_of_several_tasks() -> None:
    base = tiny_model("bert").to(DEVICE)
    tasks = unipelt.Tasks(base)
    for seed, name in enumerate(("unipelt-apl", "lora", "adapter")):
        shake(tasks.add(name, small(name), num_labels=2), seed=seed + 1)
    batch, order = there(tiny_batch("bert")), ["lora", "unipelt-apl", "adapter"]
    got = logits(tasks.eval(), batch, tasks=order)
    for row, name in enumerate(order):
        want = logits(tasks, {key: tensor[row : row + 1] for key, tensor in batch.items()}, tasks=[name])
        assert_near(got[row : row + 1], want, 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_a_cache_changes_no_token(family: str) -> None:
    model = made(family, head="Seq2SeqLM" if family in ("bart", "t5") else "CausalLM").to(DEVICE)
    batch = {name: one for name, one in there(tiny_batch(family)).items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    found = [model.generate(**batch, use_cache=use, **options).cpu() for use in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_no_more_than_the_base(method: str) -> None:
    """The base may ask whether its mask is whole."""
    found = []
    for own in (method, "frozen"):
        base = tiny_model("bert")
        model: Any = unipelt.inject(base, small(own)) if own != "frozen" else base
        model.to(DEVICE).train()
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        batch, labels = there(tiny_batch("bert")), LABELS.to(DEVICE)

        def step(model: Any = model, optimizer: Any = optimizer, batch: Any = batch, labels: Tensor = labels) -> None:
            nn.functional.cross_entropy(model(**batch).logits, labels).backward()
            if ON_GPU:  # on a CPU, AdamW reads its own count of steps, which lies there
                optimizer.step()
            optimizer.zero_grad()

        step()  # makes the optimizer's state
        found.append(waits(step))
    assert found[0] <= found[1]


def test_gates_are_recorded_and_folded() -> None:
    model, batch = made("bert").to(DEVICE), there(tiny_batch("bert"))
    on_cpu = copy.deepcopy(model).cpu()
    with unipelt.record_gates(model) as got:
        logits(model, batch)
    with unipelt.record_gates(on_cpu) as want:
        logits(on_cpu, there(batch, "cpu"))
    assert set(got) == set(want)
    for name, values in want.items():
        assert got[name].device.type == torch.device(DEVICE).type
        assert_near(got[name].cpu(), values, 1e-4)
    hold(model, by_name)
    before = logits(model, batch)
    report = unipelt.fold(model, [batch], tolerance=1e-3, closed=0.0)
    assert report.gates
    assert_near(logits(model, batch), before, 1e-4)
    assert {one.device.type for one in model.parameters()} == {torch.device(DEVICE).type}
