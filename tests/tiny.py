"""Tiny random models of every architecture in the table, with any head, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from unipelt.config.presets import PRESETS
from unipelt.hosts.families import FAMILIES as ALL_FAMILIES

VOCABULARY = 60
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""The name of a model's argument for a cache."""
PAD, EOS = 1, 2
DEPTH = 3

FAMILIES = {
    name: ALL_FAMILIES[name]
    for name in (
        *("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"),
        *("roberta-prelayernorm", "xlm-roberta-xl", "distilbert", "albert", "mpnet", "deberta", "deberta-v2"),
        *("modernbert", "bart", "marian", "plbart", "mbart", "pegasus", "m2m_100", "blenderbot", "t5", "mt5", "umt5"),
        *("gpt2", "gpt_neox", "gptj", "bloom", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
        *("gemma3_text", "olmo2", "phi", "phi3", "starcoder2", "stablelm", "granite", "cohere", "smollm3", "nemotron"),
    )
}
"""The families on which every property is tested. `tests/scripts/coverage_table.py` tries the others of the table."""

ENCODER_DECODERS = [name for name, family in FAMILIES.items() if len(family.stacks) == 2]
DECODERS = [name for name, family in FAMILIES.items() if len(family.stacks) == 1 and family.stacks[0].causal]
ENCODERS = [name for name in FAMILIES if name not in (*ENCODER_DECODERS, *DECODERS)]
GATED = [name for name, family in FAMILIES.items() if family.stacks[0].gate and name != "t5"]
"""Families whose feed-forward network has its own projection for its gate. T5's has none by default."""
SIMPLE = [name for name in FAMILIES if "prefix" in FAMILIES[name].refused]
"""Families that take everything except a prefix."""
_INTERFACE_SINCE = {"t5": "5.15", "mt5": "5.15", "umt5": "5.15", "modernbert": "5.1", "nemotron": "5.13"}
"""The first version of Transformers in which the family's attention calls the attention interface. In older versions a
prefix cannot enter.
"""
WITHOUT_INTERFACE = [
    name for name, since in _INTERFACE_SINCE.items() if Version(transformers.__version__) < Version(since)
]
INSERTED = ("mpnet",)  # in these families, a prefix makes the text longer
WITH_PREFIX = [name for name in FAMILIES if name not in (*SIMPLE, *WITHOUT_INTERFACE)]
FURTHER: dict[str, dict[str, Any]] = {
    "ia3": {},
    "red": {},
    "houlsby": {"bottleneck": 5, "activation": "gelu"},  # so narrow a ReLU may give zero for every token
    "parallel": {"bottleneck": 6, "activation": "gelu"},
    "compacter": {"bottleneck": 4, "terms": 2},
}
"""Further submodules, gated, as small as the tiny models."""
KINDS = (
    "bert",
    "albert",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "bart",
    "t5",
    "gpt2",
    "llama",
    "gpt_neox",
    "bloom",
    "opt",
)
"""One family for each way in which a layer is built."""
METHODS = [name for name in PRESETS if name not in ("houlsby", "parallel", "mam", "red", "prompt", "ln_tuning", "reft")]
"""Presets that differ in their parts. Compacter has the places of Houlsby and of RED, and gated MAM has those of the
other two. A prompt does not suit all families. LayerNorm tuning and ReFT have tests of every family of their own.
"""
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "decoder_start_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": DEPTH,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64, "n_inner": 40}
_OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 40, "n_layers": DEPTH, "n_heads": 4},
    "albert": {"embedding_size": 16, "num_hidden_groups": 1, "inner_group_num": 1},
    "electra": {"embedding_size": 32},
    "xlm-roberta-xl": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {"cls_token_id": 0, "sep_token_id": EOS, "local_attention": 6, "global_attn_every_n_layers": 2},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "bloom": {"n_layer": DEPTH, "n_head": 4},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.5, **_GROUPED},
    "phi3": _GROUPED,
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "olmo2": _GROUPED,
    "starcoder2": {**_GROUPED, "sliding_window": None},
    "stablelm": _GROUPED,
    "granite": _GROUPED,
    "cohere": _GROUPED,
    "smollm3": _GROUPED,
    "nemotron": _GROUPED,
    **dict.fromkeys(("bart", "marian", "plbart", "mbart", "pegasus", "m2m_100", "blenderbot"), _BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
}


def tiny_config(family: str, dropout: float = 0.0, **changes: Any) -> PreTrainedConfig:
    """Return a configuration small enough for tests. Every dropout is `dropout`, and no layer is ever skipped."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_OWN.get(family, {}), **changes})
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0 if "layerdrop" in name else dropout)
    if getattr(config, "classifier_dropout", None) is None:
        config.classifier_dropout = dropout  # decoders' heads for tokens use 0.1 without a value
    return config


def tiny_model(
    family: str, head: str = "", attention: str = "sdpa", dropout: float = 0.0, seed: int = 0, **changes: Any
) -> Any:
    """Return a random model in evaluation mode, the same for the same seed.

    Args:
        family: the `model_type`.
        head: the part of the class name after `AutoModelFor`. The default is sequence classification for an encoder,
            and the language model for a decoder or an encoder-decoder.
        attention: the attention back-end.
        dropout: the probability of every dropout.
        seed: the seed of the weights.
        changes: changes to the configuration.
    """
    if not head:
        head = {True: "CausalLM", False: "SequenceClassification"}[family in DECODERS]
        if family in ENCODER_DECODERS:
            head = "Seq2SeqLM"
    cls = getattr(transformers, f"AutoModelFor{head}" if head != "Model" else "AutoModel")
    config = tiny_config(family, dropout, **changes)
    config._attn_implementation = attention if _has_sdpa(cls._model_mapping[type(config)]) else "eager"
    torch.manual_seed(seed)
    model: PreTrainedModel = cls.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases of 0 and norms of 1 would hide errors
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def _has_sdpa(cls: Any) -> bool:
    """Return whether a class of models supports sdpa. Some models of Transformers support eager attention only."""
    return (cls[0] if isinstance(cls, tuple) else cls)._supports_sdpa


def tiny_batch(
    family: str, seed: int = 0, lengths: tuple[int, ...] = (5, 9, 7), tokens: int = 9, left: bool = False
) -> dict[str, Tensor]:
    """Return random texts of the given lengths, padded to `tokens`: ids and mask, (len(lengths), tokens).

    An encoder-decoder also gets the decoder's input, (len(lengths), 6).
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(lengths), tokens), generator=generator)
    places, ends = torch.arange(tokens), torch.tensor(lengths)[:, None]
    mask = (places >= tokens - ends) if left else (places < ends)
    last = tokens - 1 if left else ends - 1
    ids = ids.masked_fill(places == last, EOS).masked_fill(~mask, PAD)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if family in ENCODER_DECODERS:
        batch["decoder_input_ids"] = torch.randint(5, VOCABULARY, (len(lengths), 6), generator=generator)
    return batch
