"""The device and the precision of a run."""

from __future__ import annotations

import pytest
import torch

from unipelt.runs import device
from unipelt.runs.device import describe_precision, find_device, precision_of
from unipelt.runs.errors import RunError


@pytest.mark.parametrize(
    ("wanted", "gpu", "accelerate", "found"),
    [
        ("auto", False, None, "cpu"),
        ("auto", True, None, "cuda"),
        ("auto", True, "false", "cuda"),
        ("auto", True, "True", "cpu"),
        ("auto", True, "1", "cpu"),
        ("cpu", True, None, "cpu"),
        ("cuda", True, None, "cuda"),
        ("cuda", False, None, "device is cuda, and PyTorch finds no GPU; use --device cpu"),
        ("cuda", True, "true", "device is cuda, and accelerate's configuration asks for the CPU"),
    ],
)
def test_the_device_of_a_run(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpu: bool, accelerate: str | None, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if accelerate is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", accelerate)
    if found in ("cpu", "cuda"):
        assert find_device(wanted) == found
    else:
        with pytest.raises(RunError, match=found):
            find_device(wanted)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_of_a_product(precision: str, dtype: torch.dtype) -> None:
    one = torch.ones(2, 2)
    with precision_of("cpu", precision):
        assert (one @ one).dtype == dtype


@pytest.mark.parametrize("fast", [True, False])
def test_a_slow_precision_is_warned_of(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "_fast_bf16", lambda: fast)
    assert [describe_precision(*case) for case in (("cpu", "fp32"), ("cuda", "bf16"))] == [[], []]
    lines = describe_precision("cpu", "bf16")
    assert len(lines) == (not fast)
    assert all("bf16 is many times slower than fp32 on this CPU" in line for line in lines)


@pytest.mark.parametrize("answer", [True, False])
def test_pytorch_is_asked(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer)
    assert bool(describe_precision("cpu", "bf16")) != answer
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a PyTorch that has not the question
    assert describe_precision("cpu", "bf16") == []
