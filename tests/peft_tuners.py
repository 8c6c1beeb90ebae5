"""PEFT's tuners on tiny models: small options for each type, and PEFT's own model with the same numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers import shake, tiny_batch, tiny_bert
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import unipelt
from unipelt.config.peft_types import DEFAULTS, REFUSED, find_tuner
from unipelt.injection.state import injection_of
from unipelt.submodules.room import placed_terms

OPTIONS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "LILY": {"r": 4},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""Options with which a type fits a tiny model, where PEFT's own defaults do not."""
PROJECTIONS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
"""The names of the projections of queries and values."""


def all_types() -> list[str]:
    """The types of the installed PEFT, in alphabetical order."""
    from peft import PeftType

    return sorted({kind.value for kind in PeftType} - {"UNIPELT"})


def working_types() -> list[str]:
    return [kind for kind in all_types() if kind not in REFUSED]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64, pad_token_id=1)).eval()


def build(family: str) -> PreTrainedModel:
    return tiny_bert() if family == "bert" else tiny_llama()


def batch_of(family: str) -> dict[str, Tensor]:
    batch = tiny_batch()
    return batch if family == "bert" else {"input_ids": batch["input_ids"].clamp_min(2)}


def method_of(kind: str, *, gated: bool = False, **more: Any) -> dict[str, Any]:
    """A method with one tuner of PEFT's and nothing else."""
    return {"preset": "lora", "lora": None, "peft": {"type": kind, "gate": gated, **OPTIONS.get(kind, {})}, **more}


def injected(
    kind: str, family: str, *, gate: float | None = None, dtype_of_base: torch.dtype = torch.float32, **more: Any
) -> PreTrainedModel:
    """A tiny model with one tuner, moved away from its start; with a number for `gate`, all gates have this value."""
    model: Any = build(family)
    model = model.to(dtype_of_base)
    if gate is not None:
        more = {"gate": {"pooling": "static"}, **more}
    unipelt.inject(model, method_of(kind, gated=gate is not None, **more))
    shake(model)
    if gate is not None:
        with torch.no_grad():
            for placed in placed_terms(model):
                placed.term.entry.bias.fill_(math.log(gate / (1 - gate)))
    return model


def peft_model(kind: str, family: str, ours: PreTrainedModel, gate: float = 1.0, **options: Any) -> Any:
    """PEFT's own model of the same type, with the numbers of an injected model.

    Args:
        kind: PEFT's type.
        family: `bert` or `llama`.
        ours: the injected model.
        gate: g; the output of each of PEFT's layers becomes `y + g (layer(x) - y)`.
        options: further options of the tuner.
    """
    import peft

    config, _ = find_tuner(kind)
    settings = {**DEFAULTS.get(kind, {}), **OPTIONS.get(kind, {}), **options}
    plain: Any = build(family)
    theirs: Any = peft.get_peft_model(plain.to(ours.dtype), config(target_modules=PROJECTIONS[family], **settings))
    base = theirs.eval().base_model.model
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in injection_of(ours).head:
                base.get_parameter(name).copy_(parameter)
        for placed in placed_terms(ours):
            layer = base.get_submodule(placed.path)
            mine = numbers_of(placed.term.layer)
            for name, tensor in numbers_of(layer).items():
                tensor.copy_(mine[name])
            if gate != 1.0:
                layer.register_forward_hook(lambda own, args, out: _gated(own.base_layer(args[0]), out, gate))
    return theirs


def _gated(y: Tensor, out: Tensor, gate: float) -> Tensor:
    return y + gate * (out - y)


def numbers_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of one of PEFT's layers, without those of its base layer."""
    both = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tensor for name, tensor in both if not name.startswith("base_layer.")}


def gap(ours: PreTrainedModel, theirs: Any, family: str) -> tuple[float, float]:
    """The largest differences of the logits and, relative to the largest, of the gradients of PEFT's parameters."""
    batch = batch_of(family)
    logits, expected = ours(**batch).logits, theirs(**batch).logits
    logits.square().sum().backward()
    expected.square().sum().backward()
    base, gradients = theirs.base_model.model, [0.0]
    for placed in placed_terms(ours):
        layer = base.get_submodule(placed.path)
        for name, parameter in placed.term.layer.named_parameters():
            other = layer.get_parameter(name)
            assert (parameter.grad is None) == (other.grad is None), name
            if parameter.grad is not None:
                scale = other.grad.abs().max().clamp_min(1e-6)
                gradients.append(((parameter.grad - other.grad).abs().max() / scale).item())
    return (logits - expected).abs().max().item(), max(gradients)
