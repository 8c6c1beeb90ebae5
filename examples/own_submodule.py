"""A submodule of your own. Its gate, saving, counting and removal work as for the built-in submodules."""

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
    """The term f(x, y) = b. With a gate, the output of the place is `y + g b`."""

    def __init__(self, config: ShiftConfig, target: unipelt.TargetInfo) -> None:
        super().__init__()
        self.b = nn.Parameter(target.weight.new_zeros(target.outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the term, (B, T, O), for the place's input x, (B, T, I), and its output y, (B, T, O)."""
        return self.b.expand_as(y)


unipelt.register_submodule("shift", ShiftConfig, Shift)


def main() -> None:
    """Inject the submodule and LoRA into a small random BERT, and print the additions to a layer."""
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_hidden_layers=2, **size))
    unipelt.inject(model, {"preset": "lora", "shift": {"gate": True}})
    print(model.bert.encoder.layer[0].unipelt)
    print(unipelt.parameter_counts(model))


if __name__ == "__main__":
    main()
