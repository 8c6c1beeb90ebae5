"""A submodule of your own: it gets a gate, saving, counting and removal, as the built-in ones do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import unipelt
from unipelt.config import Place


@dataclass(frozen=True)
class ShiftConfig(unipelt.SubmoduleConfig):
    """A learned vector that is added to the values and to the output of the feed-forward network."""

    places: tuple[Place, ...] = ("value", "down")


class Shift(nn.Module):
    """The term f(x, y) = b; with a gate, the place gives `y + g b`."""

    def __init__(self, config: ShiftConfig, target: unipelt.TargetInfo) -> None:
        super().__init__()
        self.b = nn.Parameter(target.weight.new_zeros(target.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O), for the place's input x, (B, T, I), and its output y, (B, T, O)."""
        return self.b.expand_as(y)


unipelt.register_submodule("shift", ShiftConfig, Shift)


def main() -> None:
    """Put it beside LoRA into a small random BERT, and show what was added to a layer."""
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_hidden_layers=2, **size))
    unipelt.inject(model, {"preset": "lora", "shift": {"gate": True}})
    print(model.bert.encoder.layer[0].unipelt)
    print(unipelt.parameter_counts(model))


if __name__ == "__main__":
    main()
