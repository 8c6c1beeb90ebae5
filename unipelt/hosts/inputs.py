"""Random texts and images as inputs of small models.

Shapes: B examples, T tokens, S source tokens, D width, C channels, N pixels on a side.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from unipelt.hosts.shrink import FIRST_WORD, VOCABULARY, sub_configs

TOKENS, SOURCE_TOKENS = 9, 11
"""Numbers of tokens: of a text, and of an encoder's text if a decoder reads another text."""
_END = 2


def text_batch(
    model: PreTrainedModel, *, crossing: bool = False, two: bool = True, images: bool = False
) -> dict[str, Any]:
    """Return two random texts, one with padding, as arguments of a small model; every call returns the same texts.

    Args:
        model: a small model.
        crossing: whether a model that is no encoder-decoder gets the states of an encoder.
        two: whether the decoder of an encoder-decoder gets its own text.
        images: whether a random image goes with each text.

    Returns:
        Arguments by name: token ids and mask, (B, T); encoder states, (B, S, D), if `crossing`; images, (B, C, N, N),
        if `images`. B is 2.
    """
    generator = torch.Generator().manual_seed(1)
    signature = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    try:
        words = getattr(model.get_input_embeddings(), "num_embeddings", None) or VOCABULARY
    except NotImplementedError:  # some models hash characters, and have no table of embeddings
        words = VOCABULARY

    def text(tokens: int) -> Tensor:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (2, tokens), generator=generator) % words
        ids[:, -1] = _END
        return ids

    two = two and bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in signature
    ids = text(SOURCE_TOKENS if two else TOKENS)
    mask = torch.ones_like(ids)
    # padding on the left would mask all keys of a causal model's first tokens, which would then attend to every key
    mask[1, -2:] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if two:
        batch["decoder_input_ids"] = text(TOKENS)
    if crossing:
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        name = "encoder_hidden_states" if "encoder_hidden_states" in signature else "encoder_outputs"
        batch[name] = torch.randn(2, SOURCE_TOKENS, width, generator=generator, requires_grad=True)
    if images:
        batch |= _images(model.config, generator)
    return {name: value for name, value in batch.items() if name in signature or "kwargs" in signature}


def _images(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a random image for each text, of the size that the configuration of the vision part gives; or nothing."""
    for part in sub_configs(config):
        size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", 3)
        if size is not None:
            high, wide = size if isinstance(size, (list, tuple)) else (size, size)
            return {"pixel_values": torch.randn(2, channels, high, wide, generator=generator)}
    return {}
