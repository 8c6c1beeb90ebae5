"""Small random models of the same type as a given model, for finding and checking descriptions.

The small configuration keeps every setting that decides how a model is built. Widths and the numbers of heads, layers,
experts and vocabulary entries become as small as possible; their settings are known by Transformers' names. One layer
of each kind is kept, and at least two layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
FIRST_WORD = 96
"""The first token id after all special tokens of a small configuration."""

MOST_PARAMETERS = 30_000_000
"""The largest number of parameters of a small model."""
HEADS, KEY_HEADS = 4, 2
_SIZES: tuple[tuple[int, str], ...] = (
    (
        32,
        """hidden_size d_model n_embd dim embedding_size emb_dim embed_dim embedding_dim word_embed_proj_dim
        lru_width input_embedding_size hidden_size_global pooler_hidden_size d_latents
        prediction_head_size backbone_hidden_size input_size router_hidden_size audio_hidden_size out_hidden_size
        encoder_hidden_size output_embedding_size""",
    ),
    (
        40,
        """intermediate_size ffn_dim d_ff ffn_hidden_size n_inner d_inner hidden_dim dff dim_ff encoder_ffn_dim
        decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size dense_intermediate_size intermediate_size_mlp expert_ffn_hidden_size
        feed_forward_size mlp_dim moe_shared_expert_intermediate_size block_ff_dim block_multiple_of
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim""",
    ),
    (
        64,
        """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len
        max_encoder_position_embeddings max_decoder_position_embeddings original_max_position_embeddings context_length
        max_2d_position_embeddings max_length model_max_length mamba_d_ssm
        encoder_hash_byte_group_vocab attention_hidden_size""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        num_self_attention_heads num_cross_attention_heads num_query_groups linear_num_heads linear_num_value_heads
        index_n_heads speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads""",
    ),
    (
        8,
        """head_dim d_kv dim_head d_head attention_head_size attention_head_dim kv_channels v_head_dim
        qk_nope_head_dim qk_rope_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
        state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank hidden_size_per_layer_input
        laurel_rank hc_lowrank gated_norm_rank index_topk ple_embed_dim lang_embed_dim
        mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_headdim n_mamba_heads""",
    ),
    (
        16,
        """swa_head_dim q_lora_rank kv_lora_rank qk_head_dim o_lora_rank index_head_dim chunk_size mamba_chunk_size
        block_size sliding_window sliding_window_size attention_window_size local_attention
        attention_chunk_size embedding_rank
        rel_extent d_rel local_attention_window_len""",
    ),
    (
        4,
        """shape_size attention_window num_experts num_local_experts n_routed_experts moe_num_experts
        num_feedforward_networks rotary_dim zero_expert_num""",
    ),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads attn_layer_period
        layer_group_size sliding_window_pattern _sliding_window_pattern global_attn_every_n_layers
        no_rope_layer_interval encoder_sparse_step decoder_sparse_step hc_mult hc_count swa_num_key_value_heads""",
    ),
    (0, "num_kv_shared_layers"),
    (6, "coordinate_size"),
    (
        1,
        """topk_group n_group attn_layer_offset first_k_dense_replace num_expert_group n_groups
        num_sparse_encoder_layers num_sparse_decoder_layers num_dense_layers moe_layer_start_index
        num_nextn_predict_layers mamba_n_groups mamba_ngroups""",
    ),
)
SIZE = {name: value for value, names in _SIZES for name in names.split()}
"""Name of a setting -> its value in a small model."""
_LAYERS = frozenset(
    """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers num_blocks speech_encoder_layers t2u_encoder_layers t2u_decoder_layers""".split()  # noqa: SIM905
)
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "padding_idx": 1}
_UNSAID = {"pad_token_id": 1, "head_dim": 8, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY} | {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
}
"""Values that replace None."""
_ROPE_LENGTHENED = ("llama3", "longrope", "yarn", "dynamic", "linear", "su")
_FEWEST_LAYERS = 2


class CannotShrink(ValueError):
    """Error for a type of which no small model can be built."""


def small_model(model: PreTrainedModel, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Build a small random model of the same class, on the CPU; equal configurations give equal models.

    PyTorch's random state does not change.

    Args:
        model: a model of any size, on any device, also on `meta`; only its class and its configuration are read.
        changes: values for the small configuration, by name.

    Returns:
        The small model, in float32 and in evaluation mode.

    Raises:
        CannotShrink: no small model of the class can be built from the configuration.
    """
    return build_small(type(model), model.config, changes)


def build_small(cls: Any, config: PreTrainedConfig, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Build a small random model of a class or an `AutoModelFor...`, as `small_model` does for a model."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _quiet():
        try:
            small = small_config(config, changes)
            make = cls.from_config if hasattr(cls, "_model_mapping") else cls
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in make(copy.deepcopy(small)).parameters())
            if size > MOST_PARAMETERS:
                raise CannotShrink(f"its smallest model has {size} parameters")
            torch.manual_seed(0)
            made: PreTrainedModel = make(small)
        except CannotShrink:
            raise
        except Exception as error:
            name = getattr(cls, "__name__", str(cls))
            reason = " ".join(str(error).split())[:200]
            raise CannotShrink(f"a small {name} could not be built: {type(error).__name__}: {reason}") from error
        made = made.float()
        with torch.no_grad():
            for parameter in made.parameters():  # biases of 0 and norms of 1 would hide their effects
                parameter.copy_(torch.nan_to_num(parameter) + 0.05 * torch.randn(parameter.shape))
    return made.eval()


def small_config(config: PreTrainedConfig, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the configuration of a small model with the same structure as a model of `config`."""
    given = _merged(_shrink(config.to_dict()), changes or {})
    given.pop("transformers_version", None)
    if given.get("is_encoder_decoder") and given.get("decoder_start_token_id") is None:
        given["decoder_start_token_id"] = _SPECIAL["decoder_start_token_id"]
    small = type(config)(**given)
    for part in (small, *sub_configs(small)):
        part._attn_implementation = "eager"
        part.use_cache = False
    return small


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes; a dictionary changes only the settings that it names."""
    merged = dict(settings)
    for name, value in changes.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        merged[name] = value
    return merged


def sub_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configurations inside a configuration, at any depth."""
    found = []
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found += [value, *sub_configs(value)]
    return found


def _shrink(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a small model, from the settings of a configuration as `to_dict` returns them."""
    kept = {name: value for name, value in given.items() if not name.startswith("_") or name in SIZE}
    depth = next((value for name, value in kept.items() if name in _LAYERS and isinstance(value, int)), 0)
    chosen = _one_of_each_kind(kept, depth)
    heads = next((given[name] for name in SIZE if SIZE[name] == HEADS and isinstance(given.get(name), int)), 0)
    new: dict[str, Any] = {}
    token = 3
    for name, value in kept.items():
        if value is None and name in _UNSAID:
            new[name] = _UNSAID[name]
        elif isinstance(value, dict):
            if name == "per_layer_config":
                value = {place: _shrink(value[layer]) for place, layer in enumerate(chosen) if layer in value}
            elif "rope" in name:
                value = _rope(value)
            elif (name.endswith("config") and name != "quantization_config") or "model_type" in value:
                value = _shrink(value)
            new[name] = value
        elif isinstance(value, bool) or value is None or isinstance(value, str):
            new[name] = value
        elif isinstance(value, float):
            new[name] = 0.0 if "drop" in name else value
        elif name in _SPECIAL:
            new[name] = _SPECIAL[name]
        elif name.endswith(("_token_id", "_token_index", "_id", "_index")) and isinstance(value, int):
            new[name], token = min(value, token), token + 1
        elif isinstance(value, list):
            new[name] = _per_layer(name, value, chosen, depth)
        elif name in _LAYERS:
            new[name] = len(chosen) if value == depth else min(value, max(_FEWEST_LAYERS, len(chosen)))
        elif name in _KEY_HEADS:
            new[name] = HEADS if value >= heads else KEY_HEADS if value > 1 else 1
        elif name.endswith("vocab_size") and name != "type_vocab_size":
            new[name] = min(value, VOCABULARY)
        elif name == "rotary_dim":
            new[name] = 4
        elif name in SIZE:
            new[name] = min(value, SIZE[name]) if value > 0 else value
        else:
            new[name] = value
    new.pop("quantization_config", None)
    return new


def _one_of_each_kind(given: Mapping[str, Any], depth: int) -> list[int]:
    """Return the indices of the layers to keep: the first of each kind, and at least two layers in all.

    The kind of a layer follows from the lists in the configuration that have an item for each layer, or hold indices.
    """
    fewest = min(depth, _FEWEST_LAYERS)
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(depth):
        kind: list[Any] = []
        for name, value in given.items():
            if not isinstance(value, list) or not value:
                continue
            if len(value) == depth and not _is_index_list(name, value):
                kind.append(str(value[layer]))
            elif _is_index_list(name, value):
                kind.append(layer in value)
        kinds.setdefault(tuple(kind), layer)
    chosen = sorted(kinds.values())
    rest = [layer for layer in range(depth) if layer not in chosen]
    return sorted(chosen + rest[: max(0, fewest - len(chosen))])


def _is_index_list(name: str, value: list[Any]) -> bool:
    """Return whether a list holds the indices of layers."""
    named = name.endswith(("_idxs", "_layers", "_ids", "_indices", "layer_ids")) and not name.startswith("no_rope")
    return named and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _per_layer(name: str, value: list[Any], chosen: list[int], depth: int) -> list[Any]:
    if _is_index_list(name, value):
        return [place for place, layer in enumerate(chosen) if layer in value]
    if depth and len(value) == depth:
        return [_small_item(name, value[layer]) for layer in chosen]
    return value


def _small_item(name: str, item: Any) -> Any:
    name = name.removesuffix("_per_layer")
    return SIZE[name] if isinstance(item, int) and not isinstance(item, bool) and name in SIZE else item


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions for short texts and small heads, without scaling to long texts."""
    new: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            new[name] = _rope(value)
        elif name in ("rope_type", "type") and value in _ROPE_LENGTHENED:
            new[name] = "default"
        elif name == "mrope_section":
            new[name] = [2, 1, 1]
        elif name in ("short_factor", "long_factor", "factor"):
            continue
        elif name == "original_max_position_embeddings":
            new[name] = SIZE[name]
        else:
            new[name] = value
    return new


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, silence all warnings, since Transformers warns about values of small configurations."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
