"""The slow reference: UniPELT on BERT for sequence classification, written from the equations.

Plain tensor functions over a dictionary of weights: one function an equation, one example and one head at a
time. Nothing here is fast, and nothing is shared with the library, which the tests hold against it. Sections,
equation numbers and footnotes are those of Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient
Language Model Tuning" (ACL 2022, arXiv 2110.07577), with the biases that it leaves out; BERT is as in Devlin
et al. (2019), with the exact GELU. There is no dropout.

Shapes: B examples, T tokens, D hidden size, H heads, d = D / H, N layers, C labels, L prefix tokens, R hidden
size of the reparameterisation, r LoRA rank, M adapter bottleneck. Below `classify`, no tensor has a B.

Weights: BERT's own under their usual names (`bert.embeddings.LayerNorm.weight`, ...). Ours, in layer i:

    adapter.{i}.down.weight (M, D) | bias (M,)        prefix.embedding (L, D)
    adapter.{i}.up.weight   (D, M) | bias (D,)        prefix.w1.weight (R, D)         | bias (R,)
    lora.{i}.{query|value}.A (r, D) | B (D, r)        prefix.w2.weight (2 * N * D, R) | bias (2 * N * D,)
    gate.{i}.{adapter|prefix|lora_query|lora_value}.weight (D,) | bias ()
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Gates = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """What is added to BERT, and how it is composed.

    Attributes:
        adapter, prefix, lora: Whether the submodule is there.
        adapter_gate, prefix_gate, lora_gate: Whether it is gated; if not, g_A and g_P are 1.
        prefix_gating: `"scale"` multiplies the prefix's keys and values by g_P (section 3.2); `"mass"` adds
            log g_P to the prefix's attention scores instead, so that g_P = 0 is the layer without a prefix.
        pooling: What a gate averages over: `"masked_mean"` the real tokens; `"mean"` padding too, as the
            authors' released program does.
        lora_scale: alpha / r, replaced by the gate where there is one.
    """

    adapter: bool
    prefix: bool
    lora: bool
    adapter_gate: bool
    prefix_gate: bool
    lora_gate: bool
    prefix_gating: str = "scale"
    pooling: str = "masked_mean"
    lora_scale: float = 2.0

    def __post_init__(self) -> None:
        if self.prefix_gating not in ("scale", "mass"):
            raise ValueError(f'prefix_gating is {self.prefix_gating!r}; use "scale" or "mass".')
        if self.pooling not in ("masked_mean", "mean"):
            raise ValueError(f'pooling is {self.pooling!r}; use "masked_mean" or "mean".')
        for name in ("adapter", "prefix", "lora"):
            if getattr(self, f"{name}_gate") and not getattr(self, name):
                raise ValueError(f"{name}_gate is set without {name}; set {name} or leave {name}_gate out.")


@dataclass(frozen=True)
class Output:
    """What `classify` returns.

    Attributes:
        logits: (B, C).
        hidden: N + 1 tensors of (B, T, D): the embeddings, then what each layer puts out.
        gates: (B, N) for each of "adapter", "prefix", "lora_query" and "lora_value" that is there.
    """

    logits: Tensor
    hidden: list[Tensor]
    gates: Gates


def classify(
    w: Weights,
    method: Method,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    heads: int,
    eps: float = 1e-12,
) -> Output:
    """Classify a batch, one example after another.

    Args:
        w: The weights, by the names above.
        method: What is added to BERT.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for a real token and 0 for padding, at least one real token an example.
        token_type_ids: (B, T).
        heads: H.
        eps: LayerNorm's epsilon.
    """
    examples = [
        classify_one(w, method, ids, mask.bool(), types, heads, eps)
        for ids, mask, types in zip(input_ids, attention_mask, token_type_ids, strict=True)
    ]
    return Output(
        logits=torch.stack([one.logits for one in examples]),
        hidden=[torch.stack(states) for states in zip(*(one.hidden for one in examples), strict=True)],
        gates={name: torch.stack([one.gates[name] for one in examples]) for name in examples[0].gates},
    )


def classify_one(
    w: Weights, method: Method, ids: Tensor, real: Tensor, types: Tensor, heads: int, eps: float
) -> Output:
    """One example through BERT: logits = W_C tanh(W_P h_[CLS] + b_P) + b_C after N layers.

    `ids` and `types` are (T,); so is `real`, which is true where a token is not padding.
    """
    h = embed(w, ids, types, eps)
    hidden, gates = [h], []
    for i in range(count_layers(w)):
        h, layer_gates = encoder_layer(w, method, i, h, real, heads, eps)
        hidden.append(h)
        gates.append(layer_gates)
    pooled = torch.tanh(linear(w, "bert.pooler.dense", h[0]))
    by_name = {name: torch.stack([layer_gates[name] for layer_gates in gates]) for name in gates[0]}
    return Output(linear(w, "classifier", pooled), hidden, by_name)


def embed(w: Weights, ids: Tensor, types: Tensor, eps: float) -> Tensor:
    """BERT's input: LN(E_word[id] + E_position[t] + E_type[type]), (T,), (T,) -> (T, D).

    A prefix takes no positions: the first token is at 0 with or without one.
    """
    words = w["bert.embeddings.word_embeddings.weight"][ids]
    positions = w["bert.embeddings.position_embeddings.weight"][: len(ids)]
    kinds = w["bert.embeddings.token_type_embeddings.weight"][types]
    return layer_norm(w, "bert.embeddings.LayerNorm", words + positions + kinds, eps)


def encoder_layer(
    w: Weights, method: Method, i: int, h_in: Tensor, real: Tensor, heads: int, eps: float
) -> tuple[Tensor, Gates]:
    """Layer i, (T, D) -> (T, D), and the value of each of its gates.

    a = LN(W_O attention(h_in) + b_O + h_in),  h_F = feed_forward(a),  h = LN(h_F + a)

    An adapter reads that last sum normalised and adds to it, before the same LayerNorm again (section 3.2):

    h_FN = LN(h_F + a),  h_A = adapter(h_FN),  h = LN(g_A h_A + h_F + a)

    The gates of prefix and LoRA look at h_in, the adapter's at h_FN.
    """
    gates: Gates = {}
    if method.prefix_gate:
        gates["prefix"] = gate(w, f"gate.{i}.prefix", h_in, real, method.pooling)
    if method.lora_gate:
        gates["lora_query"] = gate(w, f"gate.{i}.lora_query", h_in, real, method.pooling)
        gates["lora_value"] = gate(w, f"gate.{i}.lora_value", h_in, real, method.pooling)

    layer = f"bert.encoder.layer.{i}"
    context = linear(w, f"{layer}.attention.output.dense", attention(w, method, i, h_in, real, heads, gates))
    a = layer_norm(w, f"{layer}.attention.output.LayerNorm", context + h_in, eps)
    h_f = feed_forward(w, i, a)
    h_fn = layer_norm(w, f"{layer}.output.LayerNorm", h_f + a, eps)
    if not method.adapter:
        return h_fn, gates

    if method.adapter_gate:
        gates["adapter"] = gate(w, f"gate.{i}.adapter", h_fn, real, method.pooling)
    h_a = gates.get("adapter", 1.0) * adapter(w, i, h_fn)
    return layer_norm(w, f"{layer}.output.LayerNorm", h_a + h_f + a, eps), gates


def gate(w: Weights, name: str, x: Tensor, real: Tensor, pooling: str) -> Tensor:
    """How much a submodule counts for this example (section 3.2): g = mean over t of sigmoid(w . x_t + b).

    (T, D) -> () between 0 and 1. The mean is over the real tokens, or over all T where `pooling` is `"mean"`.
    """
    per_token = torch.sigmoid(x @ w[f"{name}.weight"] + w[f"{name}.bias"])
    return per_token.mean() if pooling == "mean" else per_token[real].mean()


def attention(w: Weights, method: Method, i: int, h_in: Tensor, real: Tensor, heads: int, gates: Gates) -> Tensor:
    """Self-attention, with LoRA in queries and values and a prefix before keys and values (section 2.2).

    Q = W_Q h + b_Q + s_Q B_Q A_Q h
    K = [g_P P_K ; W_K h + b_K]
    V = [g_P P_V ; W_V h + b_V + s_V B_V A_V h]

    The scale s is alpha / r or, gated, the gate in its place (section 3.2). In this form a prefix keeps a
    share of the softmax at g_P = 0, where its keys score 0 (footnote 3). With `prefix_gating="mass"` P_K and
    P_V stay as they are, and the prefix's scores get + log g_P. Padding is never attended to; a prefix is.

    Returns:
        (T, D): the heads' results side by side.
    """
    name = f"bert.encoder.layer.{i}.attention.self"
    q, k, v = (linear(w, f"{name}.{role}", h_in) for role in ("query", "key", "value"))
    if method.lora:
        q = q + gates.get("lora_query", method.lora_scale) * low_rank(w, f"lora.{i}.query", h_in)
        v = v + gates.get("lora_value", method.lora_scale) * low_rank(w, f"lora.{i}.value", h_in)
    k, v = k[real], v[real]
    bias = k.new_zeros(len(k))

    if method.prefix:
        p_k, p_v = prefix_keys_values(w, i)
        g = gates.get("prefix", k.new_ones(()))
        prefix_bias = k.new_zeros(len(p_k))
        if method.prefix_gating == "scale":
            p_k, p_v = g * p_k, g * p_v
        else:
            prefix_bias = prefix_bias + g.log()
        k, v, bias = torch.cat([p_k, k]), torch.cat([p_v, v]), torch.cat([prefix_bias, bias])

    by_head = zip(q.chunk(heads, dim=-1), k.chunk(heads, dim=-1), v.chunk(heads, dim=-1), strict=True)
    return torch.cat([attend(*head, bias) for head in by_head], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One head, S keys: softmax(Q K^T / sqrt(d) + bias) V, (T, d), (S, d), (S, d), (S,) -> (T, d)."""
    return (q @ k.T / math.sqrt(q.shape[-1]) + bias).softmax(dim=-1) @ v


def low_rank(w: Weights, name: str, x: Tensor) -> Tensor:
    """LoRA's update before it is scaled (equation 3): B A x, (T, D) -> (T, D)."""
    return x @ w[f"{name}.A"].T @ w[f"{name}.B"].T


def prefix_keys_values(w: Weights, i: int) -> tuple[Tensor, Tensor]:
    """Layer i's P_K and P_V, (L, D) each, from P' = W_2 tanh(W_1 P + b_1) + b_2 (equation 2).

    All layers share the one network. The 2 * N * D columns of P' are (N, 2, H, d): layer by layer, the keys
    before the values, head by head.
    """
    p = linear(w, "prefix.w2", torch.tanh(linear(w, "prefix.w1", w["prefix.embedding"])))
    columns = p.chunk(2 * count_layers(w), dim=-1)
    return columns[2 * i], columns[2 * i + 1]


def feed_forward(w: Weights, i: int, a: Tensor) -> Tensor:
    """BERT's feed-forward network: h_F = W_2 GELU(W_1 a + b_1) + b_2, (T, D) -> (T, D)."""
    layer = f"bert.encoder.layer.{i}"
    return linear(w, f"{layer}.output.dense", gelu(linear(w, f"{layer}.intermediate.dense", a)))


def adapter(w: Weights, i: int, h_fn: Tensor) -> Tensor:
    """The adapter (equation 1): h_A = W_up ReLU(W_down h_FN + b_down) + b_up, (T, D) -> (T, D)."""
    return linear(w, f"adapter.{i}.up", torch.relu(linear(w, f"adapter.{i}.down", h_fn)))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b for every row of x, (..., in) -> (..., out)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """LN(x) = weight * (x - mean) / sqrt(variance + eps) + bias over the last axis, (T, D) -> (T, D)."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return w[f"{name}.weight"] * centred / torch.sqrt(variance + eps) + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """GELU(x) = x * Phi(x), Phi the normal distribution function itself and not its tanh approximation."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def count_layers(w: Weights) -> int:
    """N, the number of encoder layers that `w` holds."""
    return sum(re.fullmatch(r"bert\.encoder\.layer\.\d+\.output\.dense\.weight", name) is not None for name in w)


RELEASE_NAMES = {
    r"encoder\.prefix_enc_embed\.weight": r"prefix.embedding",
    r"encoder\.prefix_embed_MLP\.0\.(weight|bias)": r"prefix.w1.\1",
    r"encoder\.prefix_embed_MLP\.2\.(weight|bias)": r"prefix.w2.\1",
    r"encoder\.layer\.(\d+)\.attention\.self\.prefix_gate\.(weight|bias)": r"gate.\1.prefix.\2",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|value)\.lora_([AB])": r"lora.\1.\2.\3",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|value)\.lora_gate\.(weight|bias)": r"gate.\1.lora_\2.\3",
    r"encoder\.layer\.(\d+)\.output\.adapters\..+\.gate\.(weight|bias)": r"gate.\1.adapter.\2",
    r"encoder\.layer\.(\d+)\.output\.adapters\..+\.adapter_down\.0\.(weight|bias)": r"adapter.\1.down.\2",
    r"encoder\.layer\.(\d+)\.output\.adapters\..+\.adapter_up\.(weight|bias)": r"adapter.\1.up.\2",
}
"""Patterns of the authors' names below `bert.`, and the names above. All their other names are BERT's own."""


def from_release(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' parameters; an adapter's own name, a part of its keys, may be anything.

    A gate's weight (1, D) and bias (1,) lose their first axis. That is a view: gradients reach `params`.
    """
    renamed = {}
    for name, tensor in params.items():
        matches = ((re.fullmatch(rf"bert\.{theirs}", name), ours) for theirs, ours in RELEASE_NAMES.items())
        new_name = next((match.expand(ours) for match, ours in matches if match), name)
        renamed[new_name] = tensor.squeeze(0) if new_name.startswith("gate.") else tensor
    return renamed
