"""`torch.compile` and batches of several tasks: the numbers are those of an ordinary pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import logits, shake
from tiny import tiny_batch, tiny_model

from unipelt import Tasks

METHODS: dict[str, Any] = {
    "al": "unipelt-al",
    "lora": "lora",
    "apl": {"preset": "unipelt-apl", "prefix": {"length": 3, "hidden": 8}},
}


@pytest.mark.parametrize(
    ("family", "whole"),
    [pytest.param(*one, marks=pytest.mark.slow) for one in (("llama", False), ("llama", True), ("bert", True))],
)
def test_rows_keep_their_tasks(family: str, whole: bool) -> None:
    torch._dynamo.reset()
    tasks, batch = Tasks(tiny_model(family)), tiny_batch(family)
    for seed, (name, method) in enumerate(METHODS.items()):
        shake(tasks.add(name, method), seed=seed)
    orders = (["al", "lora", "al"], ["apl", "al", "lora"], ["al", "lora", "al"])
    want = [logits(tasks, batch, tasks=order) for order in orders]
    assert (want[0] - logits(tasks.model, batch)).abs().max() > 1e-2
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled: Any = torch.compile(tasks, backend=count) if whole else tasks
    if not whole:
        assert tasks.shared is not None
        tasks.shared.base_model.compile(backend=count)
    seen = []
    for order, expected in zip(orders, want, strict=True):
        torch.testing.assert_close(logits(compiled, batch, tasks=order), expected, atol=1e-6, rtol=0)
        seen.append(len(graphs))
    assert seen[0] > 0
    assert seen[2] == seen[1], "a batch of tasks that was seen before was compiled again"
