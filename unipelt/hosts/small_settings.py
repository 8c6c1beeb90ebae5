"""Changes to default configurations, by model type, for small models.

Without a change, the small model cannot be built, or it lacks optional parts. A dictionary changes only the settings
that it names.
"""

from __future__ import annotations

from typing import Any

_ZAMBA_LAYERS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}
_ROPE_OF_IMAGES = {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default"}}}

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip": {"vision_config": {"image_size": 64}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
    "dots1": {"n_shared_experts": 1, "moe_intermediate_size": 40, "first_k_dense_replace": 1},
    "glm4v": _ROPE_OF_IMAGES,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 0], "rope_type": "default"}}},
    "glm46v": _ROPE_OF_IMAGES,
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm_ocr": _ROPE_OF_IMAGES,
    "glmga": _ROPE_OF_IMAGES,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "jamba": {"use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"expand": 1},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "neomme": {"head_dim": 16},
    "paddleocr_vl": _ROPE_OF_IMAGES,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, **_ROPE_OF_IMAGES},
    "qwen2_5_vl": _ROPE_OF_IMAGES,
    "qwen2_vl": _ROPE_OF_IMAGES,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False, "attention_hidden_size": 64, "attention_head_dim": 16, **_ZAMBA_LAYERS},
    "zamba2": {"hybrid_layer_ids": [1, 3], **_ZAMBA_LAYERS},
    "zaya": {"router_hidden_size": 24},
}
