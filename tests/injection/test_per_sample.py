"""Gradients of single examples by `torch.func`, as differentially private training needs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, shake, tiny_batch, tiny_bert
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import unipelt

METHODS: tuple[Any, ...] = (
    *("adapter", "prefix", "lora", "unipelt-apl", "unipelt-al", "unipelt", "houlsby", "parallel", "ia3", "red"),
    *("compacter", "bitfit"),
    {"preset": "unipelt-apl", "gate": {"pooling": "static"}},
    {"preset": "lora", "tokens": {"ids": [3]}},
)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch loops over examples in sdpa
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_of_single_examples(method: Any) -> None:
    model = unipelt.inject(tiny_bert(attn_implementation="eager"), method).train()
    shake(model)
    batch, labels = tiny_batch(), torch.tensor([0, 1, 0])
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def loss(values: dict[str, Tensor], ids: Tensor, real: Tensor, label: Tensor) -> Tensor:
        out = functional_call(model, values, (), {"input_ids": ids[None], "attention_mask": real[None, None, None]})
        return cross_entropy(out.logits, label[None])

    each = vmap(grad(loss), (None, 0, 0, 0), randomness="different")
    values = {name: one.detach() for name, one in trained.items()}
    got = each(values, batch["input_ids"], torch.where(batch["attention_mask"].bool(), 0.0, -1e9), labels)
    for row in range(3):
        model.zero_grad()
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        cross_entropy(model(**one).logits, labels[row : row + 1]).backward()
        for name, parameter in trained.items():
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_near(got[name][row], want)
