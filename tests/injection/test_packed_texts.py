"""Several texts in one row, told apart by their positions: each text is computed as in a row of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shake
from tiny import tiny_model

import unipelt

PREFIX: dict[str, Any] = {"length": 4, "hidden": 10}
METHODS: dict[str, Any] = {
    "shared softmax": {"preset": "unipelt-apl", "prefix": PREFIX},
    "own softmax": {"preset": "unipelt-apl", "prefix": {**PREFIX, "softmax": "own"}},
    "unipelt-al": "unipelt-al",
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_each_text_is_as_alone(method: str, attention: str) -> None:
    model = unipelt.inject(tiny_model("llama", attention=attention), METHODS[method])
    shake(model)
    texts = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11, 12]])]
    row = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(text.shape[1])[None] for text in texts], dim=1)
    with torch.no_grad():
        want = torch.cat([model(input_ids=text, use_cache=False).logits for text in texts], dim=1)
        got = model(input_ids=row, position_ids=positions, use_cache=False).logits
        mixed = model(input_ids=row, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (mixed - want).abs().max() > 1e-3
