"""Bases of GGUF files: a checkpoint records the file, and comes back. The package `gguf` writes the file here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import shake
from tiny import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import unipelt
from unipelt.checkpoint.manifest import read_checkpoint

gguf = pytest.importorskip("gguf", reason="gguf is not installed; .ci/peft makes an environment with it")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(model: Any, path: Path) -> None:
    """Write a Qwen2, whose projections GGUF holds as they are."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        path_, _, kind = name.rpartition(".")
        prefix = ""
        if path_.startswith("model.layers."):
            index, path_ = path_.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{index}."
        writer.add_tensor(f"{prefix}{NAMES[path_]}.{kind}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    write(tiny_model("qwen2"), tmp_path / "base" / "tiny.gguf")
    return tmp_path / "base"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch("qwen2")).logits


def test_a_set_on_a_gguf_base_comes_back(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    torch.testing.assert_close(logits(base), logits(tiny_model("qwen2")), atol=1e-5, rtol=0)
    model = unipelt.inject(base, "unipelt-al")
    shake(model)
    want = logits(model)
    unipelt.save(model, tmp_path / "set")
    held = read_checkpoint(tmp_path / "set")
    assert held[0]["vocabulary"] == [], "the embeddings are the base's"
    # older versions of Transformers do not keep the name of the file
    recorded = "quantization_config" in base.config.to_dict()
    assert recorded or not hasattr(transformers, "GgufConfig")
    options: dict[str, Any] = {} if recorded else {"gguf_file": "tiny.gguf"}
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "set", **options)), want)
    assert torch.equal(logits(unipelt.from_pretrained(tmp_path / "set", gguf_file="tiny.gguf")), want)


def test_a_name_outside_the_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    from unipelt.checkpoint.base_model import _gguf_file

    for name, found in {"tiny.gguf": "tiny.gguf", "/etc/x.gguf": None, "../x.gguf": None, "x.bin": None}.items():
        assert _gguf_file({"quantization_config": {"gguf_file": name}}) == found
    assert _gguf_file({}) is None
