"""UniPELT in a model of your own, not in Transformers: `python examples/own_model.py` (seconds on one core).

`unipelt.inject` can take this model for three reasons. The model is a `PreTrainedModel` with a `model_type`. Its
attention calls Transformers' attention interface, by the name in its `config`; the prefix enters at this interface, and
any other attention takes adapters and LoRA only. And `unipelt.register_family` describes the places of its parts.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import unipelt

HEADS, WORDS = 4, 40  # word 0 is padding
OWN = unipelt.Stack("blocks", unipelt.Attention("attention", query="q", value="v"), output="down")  # pre-LN
METHOD = {"preset": "unipelt-apl", "adapter": {"bottleneck": 8}, "prefix": {"hidden": 32}, "lora": {"rank": 4}}


class OwnConfig(PreTrainedConfig):
    """The sizes of the model. `model_type` is the key of its description."""

    model_type = "own"
    width: int = 32
    depth: int = 3
    initializer_range: float = 0.2


class OwnAttention(nn.Module):
    """An attention over the whole text."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the output of the attention, (texts, tokens, width), for states of the same shape."""
        projected = (projection(hidden_states) for projection in (self.q, self.k, self.v))
        query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in projected)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return self.out(attend(self, query, key, value, attention_mask)[0].flatten(-2))


class OwnBlock(nn.Module):
    """A layer. The outputs of its attention and of its feed-forward network are added to the states (pre-LN)."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = OwnAttention(config)
        self.up, self.down = nn.Linear(config.width, 64), nn.Linear(64, config.width)

    def forward(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the states after the layer, (texts, tokens, width), for states of the same shape."""
        states = states + self.attention(self.norm1(states), attention_mask)
        return states + self.down(nn.functional.gelu(self.up(self.norm2(states))))


class OwnModel(PreTrainedModel):
    """Embeddings and layers."""

    config_class, base_model_prefix, _supports_sdpa = OwnConfig, "model", True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(WORDS, config.width)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.depth))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states after the last layer, (texts, tokens, width), for token ids (texts, tokens)."""
        states = self.embed_tokens(input_ids)
        for block in self.blocks:
            states = block(states, attention_mask[:, None, None].bool())
        return states


class OwnClassifier(PreTrainedModel):
    """The model and a head that reads a text's first word.

    The head trains because the head is outside `base_model_prefix`.
    """

    config_class, base_model_prefix, _supports_sdpa = OwnConfig, "model", True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model, self.classifier = OwnModel(config), nn.Linear(config.width, 2)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return logits, (texts, 2), and their loss."""
        logits = self.classifier(self.model(input_ids, attention_mask)[:, 0])
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def pretrained() -> Any:
    """Return a random model, the same each time, in place of a model on your disk."""
    torch.manual_seed(0)
    return OwnClassifier(OwnConfig()).eval()


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Return texts of 3 to 15 words, (count, 15), padded.

    The label tells whether most words are from the second half.
    """
    torch.manual_seed(seed)
    lengths = 2 * torch.randint(1, 8, (count, 1)) + 1
    words = torch.randint(1, WORDS, (count, 15)) * (torch.arange(15) < lengths)
    labels = (words >= WORDS // 2).sum(dim=1) > lengths[:, 0] // 2
    return {"input_ids": words, "attention_mask": words.sign(), "labels": labels.long()}


def main(steps: int = 150) -> tuple[float, float, float]:
    """Inject, train, save and load. Return the accuracies before training, after training, and of the loaded model."""
    test = texts(500, seed=1)

    def accuracy(of: Any) -> float:
        return (of(**test).logits.argmax(dim=-1) == test["labels"]).float().mean().item()

    unipelt.register_family("own", OWN)
    model: Any = unipelt.inject(pretrained(), METHOD)
    print(unipelt.parameter_counts(model))
    before = accuracy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        model(**texts(32, seed=2 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(model)
    with tempfile.TemporaryDirectory() as folder:
        unipelt.save(model, folder, deploy=True)
        loaded = unipelt.load(pretrained(), folder)
    with unipelt.record_gates(loaded) as gates:
        again = accuracy(loaded)
    print(f"accuracy  {before:.3f} untrained, {after:.3f} after {steps} steps, {again:.3f} saved and loaded")
    for name, values in gates.items():  # (texts, layers)
        print(f"gate      {name:10} {values.mean(dim=0).numpy().round(2)}")
    return before, after, again


if __name__ == "__main__":
    main()
