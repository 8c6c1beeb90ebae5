"""The equations of every architecture, computed by plain torch from what an untouched copy of the model computes.

Where things are in each architecture is written down here a second time, from its code and not from the table in
`unipelt.hosts.families`, so that a wrong place there shows.

Shapes: B examples, H heads, T queries, S keys, d head size, L prefix length, N layers, D hidden size, W = H * d.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers import shake
from inside import added_to, parts
from tiny import DECODERS, DEPTH, ENCODER_DECODERS, FAMILIES, INSERTED, SIMPLE, WITH_PREFIX, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

import unipelt
from unipelt.submodules.lora import LoRA
from unipelt.submodules.prefix import Prefix

# Transformers 5.0 compiles parts of some models with TorchScript when it imports them


@dataclass(frozen=True)
class Heads:
    """An attention: its projections, the one that reads its heads' outputs, and what is in a fused module.

    `layout`: `qkv` and `kv` are side by side, `heads` one head after the other with q, k and v of each.
    """

    query: str
    value: str
    out: str
    layout: str = ""

    @property
    def path(self) -> str:
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class Layers:
    """A stack: `last` is the feed-forward network's last linear map.

    `norm` comes after the residual (post-LN); `after` is a norm of the network's output, before the residual.
    """

    path: str
    own: Heads
    last: str
    norm: str = ""
    after: str = ""
    causal: bool = False
    cross: Heads | None = None
    label: str = ""

    @property
    def owner(self) -> str:
        return self.path.partition(".")[0] if "." in self.path else ""


@dataclass(frozen=True)
class Case:
    """An architecture, or a variety of one; `layer` is the one that is looked at."""

    family: str
    stacks: tuple[Layers, ...]
    head: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    layer: int = 0
    crosses: bool = False


def _bert(**places: str) -> Layers:
    own = Heads("attention.self.query", "attention.self.value", "attention.output.dense")
    return Layers("encoder.layer", own, "output.dense", **places)  # type: ignore[arg-type]


def _two(attention: Heads, cross: Heads, path: str, encoder: str, decoder: str, norm: str = "") -> tuple[Layers, ...]:
    return (
        Layers(f"encoder.{path}", attention, encoder, norm),
        Layers(f"decoder.{path}", attention, decoder, norm, causal=True, cross=cross, label="decoder."),
    )


def _decoder(path: str, own: Heads, last: str, after: str = "") -> tuple[Layers, ...]:
    return (Layers(path, own, last, after=after, causal=True),)


POST_LN = (_bert(norm="output.LayerNorm"),)
PRE_LN = (_bert(),)
_BART_SELF, _BART_CROSS = (
    Heads(f"{name}.q_proj", f"{name}.v_proj", f"{name}.out_proj") for name in ("self_attn", "encoder_attn")
)
BART = _two(_BART_SELF, _BART_CROSS, "layers", "fc2", "fc2", "final_layer_norm")
MBART = _two(_BART_SELF, _BART_CROSS, "layers", "fc2", "fc2")
_T5_SELF, _T5_CROSS = (
    Heads(f"layer.{name}.q", f"layer.{name}.v", f"layer.{name}.o") for name in ("0.SelfAttention", "1.EncDecAttention")
)
T5 = _two(_T5_SELF, _T5_CROSS, "block", "layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo")
_LLAMA = Heads("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA = _decoder("layers", _LLAMA, "mlp.down_proj")
GEMMA2 = _decoder("layers", _LLAMA, "mlp.down_proj", "post_feedforward_layernorm")
GPT2 = _decoder("h", Heads("attn.c_attn", "attn.c_attn", "attn.c_proj", "qkv"), "mlp.c_proj")
NEOX = _decoder(
    "layers",
    Heads("attention.query_key_value", "attention.query_key_value", "attention.dense", "heads"),
    "mlp.dense_4h_to_h",
)

STACKS: dict[str, tuple[Layers, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"), POST_LN),
    "roberta-prelayernorm": PRE_LN,
    "xlm-roberta-xl": PRE_LN,
    "distilbert": (
        Layers(
            "transformer.layer",
            Heads("attention.q_lin", "attention.v_lin", "attention.out_lin"),
            "ffn.lin2",
            "output_layer_norm",
        ),
    ),
    "albert": (
        Layers(
            "encoder.albert_layer_groups.0.albert_layers",
            Heads("attention.query", "attention.value", "attention.dense"),
            "ffn_output",
            "full_layer_layer_norm",
        ),
    ),
    "mpnet": (
        Layers(
            "encoder.layer",
            Heads("attention.attn.q", "attention.attn.v", "attention.attn.o"),
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "deberta": (
        Layers(
            "encoder.layer",
            Heads("attention.self.in_proj", "attention.self.in_proj", "attention.output.dense", "heads"),
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "deberta-v2": (
        Layers(
            "encoder.layer",
            Heads("attention.self.query_proj", "attention.self.value_proj", "attention.output.dense"),
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "modernbert": (Layers("layers", Heads("attn.Wqkv", "attn.Wqkv", "attn.Wo", "qkv"), "mlp.Wo"),),
    **dict.fromkeys(("bart", "marian", "plbart"), BART),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "blenderbot"), MBART),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "gptj": _decoder("h", Heads("attn.q_proj", "attn.v_proj", "attn.out_proj"), "mlp.fc_out"),
    "bloom": _decoder(
        "h",
        Heads("self_attention.query_key_value", "self_attention.query_key_value", "self_attention.dense", "heads"),
        "mlp.dense_4h_to_h",
    ),
    "opt": _decoder("decoder.layers", _BART_SELF, "fc2"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "stablelm", "granite", "cohere", "smollm3", "nemotron"), LLAMA
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), GEMMA2),
    "phi": _decoder("layers", Heads("self_attn.q_proj", "self_attn.v_proj", "self_attn.dense"), "mlp.fc2"),
    "phi3": _decoder(
        "layers", Heads("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj", "qkv"), "mlp.down_proj"
    ),
    "starcoder2": _decoder("layers", _LLAMA, "mlp.c_proj"),
}

CASES: dict[str, Case] = {
    **{family: Case(family, stacks) for family, stacks in STACKS.items()},
    # the update of a feed-forward network is scaled before it joins its residual
    "granite": Case("granite", LLAMA, changes={"residual_multiplier": 0.5}),
    "modernbert, local": Case("modernbert", STACKS["modernbert"], layer=1),
    "deberta-v2, keys not shared": Case("deberta-v2", STACKS["deberta-v2"], changes={"share_att_key": False}),
    "gpt_neox, sequential": Case("gpt_neox", NEOX, changes={"use_parallel_residual": False}),
    "stablelm, parallel": Case("stablelm", LLAMA, changes={"use_parallel_residual": True}),
    "gpt2 behind an encoder": Case(
        "gpt2",
        (
            replace(
                GPT2[0], cross=Heads("crossattention.q_attn", "crossattention.c_attn", "crossattention.c_proj", "kv")
            ),
        ),
        changes={"add_cross_attention": True},
        crosses=True,
    ),
    "bert behind an encoder": Case(
        "bert",
        (
            replace(
                POST_LN[0],
                causal=True,
                cross=Heads("crossattention.self.query", "crossattention.self.value", "crossattention.output.dense"),
            ),
        ),
        head="CausalLM",
        changes={"is_decoder": True, "add_cross_attention": True},
        crosses=True,
    ),
}
PLACES = [(name, index) for name, case in CASES.items() for index in range(len(case.stacks))]
LENGTH, WIDTH, RANK, ALPHA, BOTTLENECK = 4, 6, 3, 7.0, 5
# frozen heads stay as they are in the untouched copy
LORA = {"preset": "lora", "train_head": False, "lora": {"rank": RANK, "alpha": ALPHA}}
ADAPTER = {"preset": "adapter", "train_head": False, "adapter": {"bottleneck": BOTTLENECK}}
PREFIX = {"preset": "prefix", "train_head": False, "prefix": {"length": LENGTH, "hidden": WIDTH}}


@cache
def _built(name: str, attention: str) -> Any:
    case = CASES[name]
    return tiny_model(case.family, case.head, attention, **case.changes)


def build(name: str, attention: str = "sdpa") -> Any:
    return copy.deepcopy(_built(name, attention))


def batch_of(name: str) -> dict[str, Tensor]:
    batch = tiny_batch(CASES[name].family)
    if CASES[name].crosses:
        generator = torch.Generator().manual_seed(3)
        batch["encoder_hidden_states"] = torch.randn(3, 7, 32, generator=generator)
        batch["encoder_attention_mask"] = (torch.arange(7) < torch.tensor([7, 3, 5])[:, None]).long()
    return batch


def layers_of(model: Any, stack: Layers) -> list[nn.Module]:
    return list(model.base_model.get_submodule(stack.path))


def attentions_of(stack: Layers) -> list[Heads]:
    return [stack.own, *([] if stack.cross is None else [stack.cross])]


def changed(config: dict[str, Any], part: str, layers: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    return {**config, part: {**config.get(part, {}), **changes}, **({} if layers is None else {"layers": layers})}


def injected(name: str, config: dict[str, Any], attention: str = "sdpa") -> Any:
    model = unipelt.inject(build(name, attention), config)
    shake(model)
    return model


@torch.no_grad()
def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the last layer gives."""
    return model.base_model(**batch)[0]


def test_the_places_are_written_down_for_every_architecture() -> None:
    assert list(STACKS.keys() - FAMILIES.keys()) == list(FAMILIES.keys() - STACKS.keys()) == []
    for name, stacks in STACKS.items():
        assert len(stacks) == (2 if name in ENCODER_DECODERS else 1)
        assert stacks[-1].causal == (name in (*DECODERS, *ENCODER_DECODERS))


def rows_of(layout: str, config: Any, outputs: int, is_query: bool) -> Tensor:
    """Indices of the outputs that are queries, or values."""
    heads = config.num_attention_heads
    places = torch.arange(outputs)
    if layout == "" or (layout == "kv" and is_query):
        return places
    if layout == "kv":  # GPT-2: c_attn(encoder's output).split(D)
        return places[outputs // 2 :]
    if layout == "heads":  # view(B, T, H, 3 * d) and then three parts
        parts = places.view(heads, 3, -1)
        return parts[:, 0 if is_query else 2].flatten()
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = outputs // (heads + 2 * groups)
    return places[: heads * size] if is_query else places[(heads + groups) * size :]


def merge(projection: Any, rows: Tensor, update: Tensor) -> None:
    """Add to the weight, (out, in) of a Linear and (in, out) of a Conv1D."""
    if isinstance(projection, nn.Linear):
        projection.weight[rows] += update
    else:
        projection.weight[:, rows] += update.T


def set_gates(model: Any, seed: int = 5) -> None:
    """Gates that are the same number for every text, another for every gate."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in parts(model, "gate").items():
        if name.endswith(".weight"):
            part.zero_()
        else:
            part.copy_(3 * torch.randn(part.shape, generator=generator))


def added_at(layer: nn.Module, stack: Layers, heads: Heads) -> tuple[Any, str, str]:
    """What was added to an attention, where its parts are among the layer's, and what its gates are called."""
    added = added_to(layer)
    return (added, "", stack.label) if heads is stack.own else (added.cross, "cross.", "cross.")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_low_rank_updates_are_the_model_whose_weights_were_merged(name: str, gated: bool) -> None:
    model, merged, batch = injected(name, changed(LORA, "lora", gate=gated)), build(name), batch_of(name)
    if gated:
        set_gates(model)
    touched = set()
    for stack in CASES[name].stacks:
        for layer, plain in zip(layers_of(model, stack), layers_of(merged, stack), strict=True):
            for heads in attentions_of(stack):
                added, where, label = added_at(layer, stack, heads)
                own = parts(layer)
                for path, term_name in ((heads.query, "lora_query"), (heads.value, "lora_value")):
                    touched.add(getattr(added, term_name))
                    bias = own.get(f"{where}gate.{label}{term_name}.bias")
                    assert (bias is not None) == gated
                    scale = ALPHA / RANK if bias is None else bias.sigmoid()
                    update = scale * own[f"{where}{term_name}.B"] @ own[f"{where}{term_name}.A"]
                    leaf: Any = plain.get_submodule(path)
                    outputs = leaf.bias.shape[0] if leaf.bias is not None else leaf.weight.shape[0]
                    rows = rows_of(heads.layout, model.config, outputs, term_name == "lora_query")
                    if gated and CASES[name].family == "deberta-v2" and term_name == "lora_query":
                        # a gate belongs to a text, and relative positions belong to none
                        leaf.register_forward_hook(
                            lambda _, args, out, update=update: (
                                out + args[0] @ update.T if args[0].shape[0] == 3 else out
                            )
                        )
                    else:
                        merge(leaf, rows, update)
    assert touched == {module for module in model.modules() if isinstance(module, LoRA)}
    want = states(merged, batch)
    torch.testing.assert_close(states(model, batch), want, atol=2e-5, rtol=1e-4)
    assert (want - states(build(name), batch)).abs().max() > 1e-2


@torch.no_grad()
def test_ungated_low_rank_updates_reach_the_relative_positions_of_deberta_too() -> None:
    model = injected("deberta-v2", LORA)
    seen: list[tuple[int, ...]] = []
    term = added_to(model.base_model.encoder.layer[0]).lora_query
    term.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    states(model, batch_of("deberta-v2"))
    assert seen == [(3, 9, 32), (1, 8, 32)]


def first_call(module: nn.Module, record: list[Any], of: str) -> None:
    """Remember the first input or output of a module; layers may be shared and run again."""

    def keep(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        value = args[0] if of == "input" and args else out
        if not record:
            record.append(value[0] if isinstance(value, tuple) else value)

    module.register_forward_hook(keep)


def adapt(own: dict[str, Tensor], x: Tensor) -> Tensor:
    low = (x @ own["adapter.down.weight"].T + own["adapter.down.bias"]).clamp_min(0)
    return low @ own["adapter.up.weight"].T + own["adapter.up.bias"]


def gate_of(own: dict[str, Tensor], gate: str, x: Tensor, real: Tensor | None) -> Tensor:
    """(B, 1) where `real` tokens are averaged over, (B, T) where None are."""
    open_ = 1 / (1 + (-(x @ own[f"{gate}.weight"][0] + own[f"{gate}.bias"])).exp())
    if real is None:
        return open_
    return torch.stack([row[mask.bool()].mean() for row, mask in zip(open_, real, strict=True)])[:, None]


def only(stack: Layers) -> dict[str, bool]:
    """Submodules in one stack alone, so that nothing before its first layer differs from the untouched model's."""
    return {"encoder": not stack.causal, "decoder": stack.causal, "cross": False}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("name", "place"), PLACES)
@torch.no_grad()
def test_an_adapter_after_the_feed_forward_network(name: str, place: int, gated: bool) -> None:
    stack, at, batch = CASES[name].stacks[place], CASES[name].layer, batch_of(name)
    model = injected(name, {**changed(ADAPTER, "adapter", [at], gate=gated), **only(stack)})
    base = build(name)
    layer, plain = layers_of(model, stack)[at], layers_of(base, stack)[at]
    inner: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    tail = stack.norm or stack.after or stack.last
    first_call(plain.get_submodule(tail), inner, "input" if stack.norm else "output")
    first_call(plain, before, "output")
    first_call(layer, after, "output")
    states(base, batch)
    states(model, batch)
    inner[0] = inner[0].view_as(before[0])  # OPT puts the tokens of all texts in one row there
    own = parts(layer)
    real = None if stack.causal else batch["attention_mask"]

    def update(x: Tensor) -> Tensor:
        gate = gate_of(own, f"gate.{stack.label}adapter", x, real)[..., None] if gated else 1.0
        return gate * adapt(own, x)

    if stack.norm:
        norm: Any = plain.get_submodule(stack.norm)
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps

        def normed(x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, epsilon)

        torch.testing.assert_close(before[0], normed(inner[0]), atol=1e-5, rtol=1e-4)
        want = normed(update(normed(inner[0])) + inner[0])
    else:
        residual = without_feed_forward(name, stack, at, batch)
        factor = getattr(model.config, "residual_multiplier", 1.0)
        torch.testing.assert_close(before[0], residual + factor * inner[0], atol=1e-5, rtol=1e-4)
        want = residual + factor * (inner[0] + update(inner[0]))
    torch.testing.assert_close(after[0], want, atol=1e-5, rtol=1e-4)
    assert (want - before[0]).abs().max() > 1e-2


def without_feed_forward(name: str, stack: Layers, at: int, batch: dict[str, Tensor]) -> Tensor:
    """A layer's output when its feed-forward network gives zero: what the network is added to."""
    base, record = build(name), []  # type: ignore[var-annotated]
    layer = layers_of(base, stack)[at]
    layer.get_submodule(stack.last).register_forward_hook(lambda _, args, out: torch.zeros_like(out))
    first_call(layer, record, "output")
    states(base, batch)
    return record[0]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_gates_of_attention_read_its_input(name: str) -> None:
    gated = (
        ("prefix", "lora_query", "lora_value") if CASES[name].family in WITH_PREFIX else ("lora_query", "lora_value")
    )
    config = {"preset": "unipelt-pl" if "prefix" in gated else "unipelt-al", "train_head": False}
    model, batch = injected(name, config), batch_of(name)
    inputs: dict[tuple[str, str], list[list[Tensor]]] = {}
    owners: dict[tuple[str, str], list[nn.Module]] = {}

    def watch(leaf: nn.Module, calls: list[Tensor], tokens: int | None) -> None:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].shape[0] == 3:  # DeBERTa projects relative positions too
                calls.append(args[0] if tokens is None else args[0][:, -tokens:])

        leaf.register_forward_pre_hook(keep)

    for stack in CASES[name].stacks:
        for heads in attentions_of(stack):
            label = stack.label if heads is stack.own else "cross."
            for layer in layers_of(model, stack):
                for part in gated:
                    leaf: Any = layer.get_submodule(heads.query)
                    if label == "cross." and part == "lora_value":  # it reads what the encoder gave
                        leaf = layer.get_submodule(heads.value)
                    calls: list[Tensor] = []
                    # MPNet's text is longer by the prefix while its attention runs
                    watch(leaf, calls, 9 if name == "mpnet" else None)
                    inputs.setdefault((label, part), []).append(calls)
                    owners.setdefault((label, part), []).append(layer)
    with unipelt.record_gates(model) as record:
        model(**batch)
    wanted = {f"{label}{part}" for label, part in inputs}
    assert {key for key in record if not key.endswith("adapter")} == wanted
    causal = {"": CASES[name].stacks[0].causal, "decoder.": True, "cross.": True}
    passes = DEPTH if CASES[name].family == "albert" else 1
    for (label, part), layers in inputs.items():
        columns = []
        gate = f"{'cross.' if label == 'cross.' else ''}gate.{label}{part}"
        for calls, layer in zip(layers, owners[label, part], strict=True):
            assert len(calls) == passes
            real = None if causal[label] else batch["attention_mask"]
            columns += [gate_of(parts(layer), gate, x, real).mean(dim=1) for x in calls]
        got = record[f"{label}{part}"]
        assert got.shape == (3, DEPTH)
        torch.testing.assert_close(got, torch.stack(columns, dim=1), atol=1e-6, rtol=1e-4)
        assert got.std() > 1e-3


def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """An attention that remembers what it was given first, and gives nothing."""
    if not hasattr(module, "captured"):
        module.captured = (query, key, value, kwargs)
    return torch.zeros_like(query.transpose(1, 2)), None


AttentionInterface.register("capture", capture)


@dataclass(frozen=True)
class Captured:
    """Queries, keys and values, (B, H, T or S, d), as the logits use them; and what scales and shifts those."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    bias: Tensor | None
    states: Tensor


@cache
@torch.no_grad()
def captured(name: str, stack: Layers, heads: Heads, at: int) -> Captured:
    """From the untouched model."""
    base, batch = build(name), batch_of(name)
    layer = layers_of(base, stack)[at]
    attention: Any = layer.get_submodule(heads.path)
    inputs: list[Tensor] = []
    first_call(layer.get_submodule(heads.query), inputs, "input")
    if name == "mpnet":  # which does not go through the interface
        parts: list[list[Tensor]] = [[], [], []]
        for part, record in zip("qkv", parts, strict=True):
            first_call(getattr(attention, part), record, "output")
        states(base, batch)
        query, key, value = (record[0].view(3, 9, 4, 8).transpose(1, 2) for record in parts)
        bias = base.base_model.encoder.compute_position_bias(inputs[0])
        return Captured(query, key, value, 8**-0.5, bias, inputs[0])
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "capture"
    states(base, batch)
    query, key, value, kwargs = attention.captured
    bias, scaling = kwargs.get("position_bias"), kwargs.get("scaling")
    return Captured(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, bias, inputs[0])


def seen(name: str, stack: Layers, heads: Heads, at: int, batch: dict[str, Tensor], config: Any) -> Tensor:
    """Which query sees which key: (B or 1, T, S)."""
    if heads is stack.cross:
        mask = batch["encoder_attention_mask"] if CASES[name].crosses else batch["attention_mask"]
        return mask.bool()[:, None]
    behind = len(CASES[name].stacks) == 2 and stack.causal
    mask = torch.ones(3, 6) if behind else batch["attention_mask"]
    places = torch.arange(mask.shape[1])
    distance = places[:, None] - places
    allowed = mask.bool()[:, None].expand(-1, mask.shape[1], -1)
    if stack.causal:
        allowed = allowed & (distance >= 0)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or kinds[at] == "sliding_attention"):
        # looking back, a token counts itself; looking both ways it does not
        allowed = allowed & ((distance < window) if stack.causal else (distance.abs() <= window))
    return allowed


def plain_attention(
    given: Captured, allowed: Tensor, softcap: float | None, prefix: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, W) and weights (B, H, T, L + S); `prefix` is keys, values (B, H, L, d) and a shift (B, T, 1)."""
    repeats = given.query.shape[1] // given.key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (given.key, given.value))

    def logits_of(keys: Tensor) -> Tensor:
        logits = torch.einsum("bhtd,bhsd->bhts", given.query, keys) * given.scaling
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    logits = logits_of(key)
    if given.bias is not None:
        logits = logits + given.bias
    logits = logits.masked_fill(~allowed[:, None], -torch.inf)
    if prefix is not None:
        more_keys, more_values = (part.repeat_interleave(repeats, dim=1) for part in prefix[:2])
        logits = torch.cat([logits_of(more_keys) + prefix[2][:, None], logits], dim=-1)
        value = torch.cat([more_values, value], dim=2)
    weights = logits.softmax(dim=-1)
    return torch.einsum("bhts,bhsd->bthd", weights, value).flatten(2), weights


def from_network(network: Any, index: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one attention, (L, W) each, by P' = W2 tanh(W1 P)."""
    low = (network.embedding @ network.w1.weight.T + network.w1.bias).tanh()
    both = (low @ network.w2.weight.T + network.w2.bias)[:, index * 2 * width : (index + 1) * 2 * width]
    return both[:, :width], both[:, width:]


ATTENTIONS = [
    (name, place, which)
    for name, case in CASES.items()
    if case.family not in SIMPLE
    for place, stack in enumerate(case.stacks)
    for which in range(len(attentions_of(stack)))
]


@pytest.mark.parametrize("gating", ["scale", "mass", "ungated", "eager", "own", "own ungated", "own eager"])
@pytest.mark.parametrize(("name", "place", "which"), ATTENTIONS)
@torch.no_grad()
def test_attention_with_a_prefix(name: str, place: int, which: int, gating: str) -> None:
    stack, at, batch = CASES[name].stacks[place], CASES[name].layer, batch_of(name)
    back_end = "eager" if "eager" in gating else "sdpa"
    base = build(name, back_end)
    own = gating.startswith("own")
    kind: dict[str, Any] = {"gate": "ungated" not in gating, "gating": "mass" if gating == "mass" else "scale"}
    kind |= {"softmax": "own"} if own else {}
    heads = attentions_of(stack)[which]
    crosses = heads is stack.cross
    where = {"encoder": False, "decoder": False, "cross": True} if crosses else only(stack)
    config = {**changed(PREFIX, "prefix", [at, 2], **kind), **where}
    if CASES[name].family not in WITH_PREFIX:
        with pytest.raises(unipelt.InjectionError, match="does not go through the attention interface"):
            unipelt.inject(base, config)
        return
    if own and CASES[name].family in INSERTED:
        with pytest.raises(
            unipelt.InjectionError, match=r"outside .* interface.*take the preset unipelt-apl, .* or unipelt-al, which"
        ):
            unipelt.inject(base, config)
        return
    given = captured(name, stack, heads, at)
    allowed = seen(name, stack, heads, at, batch, base.config)
    softcap = getattr(base.config, "attn_logit_softcapping", None)
    softcap = softcap if base.config.model_type == "gemma2" else None
    outputs: list[Tensor] = []
    first_call(layers_of(base, stack)[at].get_submodule(heads.out), outputs, "input")
    states(base, batch)
    # first that the test knows this attention; padding may see nothing, where a window is narrow
    looking = allowed.any(dim=-1).expand(outputs[0].shape[:2])
    untouched = plain_attention(given, allowed, softcap, None)[0]
    torch.testing.assert_close(untouched[looking], outputs[0][looking], atol=1e-5, rtol=1e-4)

    if CASES[name].family == "albert":
        config["layers"] = [0]
    model = injected(name, config, back_end)
    shared = added_to(model.base_model.get_submodule(stack.owner))
    groups, size = given.key.shape[1], given.key.shape[3]
    network = shared.cross_prefix_network if crosses else shared.prefix_network
    rows = [
        part.view(1, LENGTH, groups, size).transpose(1, 2).expand(3, -1, -1, -1)
        for part in from_network(network, 0, groups * size)
    ]
    shift = torch.zeros(3, given.query.shape[2], 1)
    gate = torch.ones(3, 1)
    if kind["gate"]:
        real = None if stack.causal else batch["attention_mask"]
        layer = layers_of(model, stack)[at]
        _, inside, label = added_at(layer, stack, heads)
        gate = gate_of(parts(layer), f"{inside}gate.{label}prefix", given.states, real)
        if stack.causal or gating == "mass":
            shift = shift + gate.log()[..., None]
        elif not own:
            rows = [gate[:, :, None, None] * part for part in rows]
    if own:
        beside = replace(given, key=rows[0], value=rows[1], bias=None)
        want, weights = plain_attention(given, allowed, softcap, None)
        want = want + gate[..., None] * plain_attention(beside, torch.ones(1, 1, LENGTH).bool(), None, None)[0]
    else:
        want, weights = plain_attention(given, allowed, softcap, (rows[0], rows[1], shift))
    got: list[Tensor] = []
    first_call(layers_of(model, stack)[at].get_submodule(heads.out), got, "input")
    asks = {"output_attentions": True} if back_end == "eager" else {}
    out = model.base_model(**batch, **asks)
    # MPNet's text is longer by the prefix until its attention ends
    compared = looking if own else slice(None)  # with a prefix before its keys every query sees something
    torch.testing.assert_close(got[0][:, -want.shape[1] :][compared], want[compared], atol=1e-5, rtol=1e-4)
    assert (want - outputs[0])[compared].abs().max() > 1e-2
    if back_end == "eager":
        key = "attentions"
        if len(CASES[name].stacks) == 2:
            key = "decoder_attentions" if stack.causal else "encoder_attentions"
        shown = out["cross_attentions" if crosses else key][at].transpose(1, 2)
        torch.testing.assert_close(shown[compared], weights.transpose(1, 2)[compared], atol=1e-5, rtol=1e-4)
        assert weights.shape[-1] == (0 if own else LENGTH) + given.key.shape[2]


@pytest.mark.parametrize("name", ["bert", "bart", "llama", "gpt2 behind an encoder"])
@torch.no_grad()
def test_each_layer_has_its_own_part_of_the_prefix_network(name: str) -> None:
    model = injected(name, changed(PREFIX, "prefix", [0, 2]))
    for stack in CASES[name].stacks:
        shared = added_to(model.base_model.get_submodule(stack.owner))
        for heads in attentions_of(stack):
            network = shared.prefix_network if heads is stack.own else shared.cross_prefix_network
            found = []
            for index, at in enumerate([0, 2]):
                prefix = added_at(layers_of(model, stack)[at], stack, heads)[0].prefix
                assert isinstance(prefix, Prefix)
                found.append(prefix())
                assert found[-1].shape[:2] == (2, LENGTH)
                torch.testing.assert_close(
                    found[-1], torch.stack(from_network(network, index, found[-1].shape[-1])), atol=1e-6, rtol=1e-5
                )
            assert (found[0] - found[1]).abs().max() > 1e-2


@dataclass(frozen=True)
class Sizes:
    """What the numbers follow from: a stack's layers, and widths of states, queries and values."""

    layers: int
    hidden: int
    queries: int
    values: int


def sizes_of(config: Any, layers: int) -> Sizes:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(layers, config.hidden_size, heads * size, groups * size)


def adapter_count(sizes: Sizes, bottleneck: int) -> int:
    return sizes.layers * (2 * sizes.hidden * bottleneck + bottleneck + sizes.hidden)


def lora_count(sizes: Sizes, rank: int) -> int:
    return sizes.layers * rank * (2 * sizes.hidden + sizes.queries + sizes.values)


def deployed_prefix_count(sizes: Sizes, length: int) -> int:
    return sizes.layers * 2 * length * sizes.values


def network_count(sizes: Sizes, length: int, width: int) -> int:
    out = sizes.layers * 2 * sizes.values
    return length * sizes.hidden + (sizes.hidden + 1) * width + (width + 1) * out


@dataclass(frozen=True)
class Wanted:
    trained: dict[str, int]
    deployed: dict[str, int]
    gates: dict[str, int]


def wanted_counts(config: unipelt.UniPELTConfig, stacks: tuple[Layers, ...], sizes: list[Sizes]) -> Wanted:
    """An adapter a layer; a prefix, two low-rank terms and a gate for each of them an attention."""
    trained: dict[str, int] = {}
    deployed: dict[str, int] = {}
    gates: dict[str, int] = {}

    def add(counts: dict[str, int], name: str, count: int) -> None:
        counts[name] = counts.get(name, 0) + count

    for stack, size in zip(stacks, sizes, strict=True):
        one = size.layers * (size.hidden + 1)
        if config.adapter is not None:
            for counts in (trained, deployed):
                add(counts, "adapter", adapter_count(size, config.adapter.bottleneck))
            add(gates, f"{stack.label}adapter", one)
        for heads in attentions_of(stack):
            label = stack.label if heads is stack.own else "cross."
            if config.prefix is not None:
                add(trained, "prefix", network_count(size, config.prefix.length, config.prefix.hidden))
                add(deployed, "prefix", deployed_prefix_count(size, config.prefix.length))
                add(gates, f"{label}prefix", one)
            if config.lora is not None:
                for counts in (trained, deployed):
                    add(counts, "lora", lora_count(size, config.lora.rank))
                add(gates, f"{label}lora_query", one)
                add(gates, f"{label}lora_value", one)
    return Wanted(trained, deployed, gates)


def assert_counts(model: Any, config: unipelt.UniPELTConfig, wanted: Wanted, base: int) -> unipelt.ParameterCounts:
    counts = unipelt.parameter_counts(model)
    assert counts.submodules == wanted.trained
    assert counts.deployed_submodules == wanted.deployed
    assert counts.gates == wanted.gates
    assert counts.trained == sum(wanted.trained.values()) + sum(wanted.gates.values())
    assert counts.deployed == sum(wanted.deployed.values()) + sum(wanted.gates.values())
    assert counts.base == base
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == counts.trained + counts.head
    return counts


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_parameters_follow_from_the_sizes(name: str) -> None:
    case, model = CASES[name], build(name)
    preset = "unipelt-apl" if case.family in WITH_PREFIX else "unipelt-al"
    config = unipelt.resolve(
        {"preset": preset, "adapter": {"bottleneck": BOTTLENECK}, "lora": {"rank": RANK}}
        | ({"prefix": {"length": LENGTH, "hidden": WIDTH}} if preset == "unipelt-apl" else {})
    )
    layers = 1 if case.family == "albert" else DEPTH  # ALBERT's layers are one
    sizes = [sizes_of(model.config, layers)] * len(case.stacks)
    whole = sum(parameter.numel() for parameter in model.parameters())
    unipelt.inject(model, config)
    head = unipelt.parameter_counts(model).head
    # a language model's head was pretrained with it
    assert (head > 0) == (case.head != "CausalLM" and case.family not in (*DECODERS, *ENCODER_DECODERS))
    assert_counts(model, config, wanted_counts(config, case.stacks, sizes), whole - head)


FULL_SIZE: dict[str, tuple[Callable[[], Any], Any, int]] = {
    "gpt2": (GPT2Config, AutoModelForCausalLM, 124_439_808),
    "bart": (
        lambda: BartConfig(
            d_model=768,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=12,
            decoder_attention_heads=12,
            encoder_ffn_dim=3072,
            decoder_ffn_dim=3072,
        ),
        AutoModelForSeq2SeqLM,
        139_420_416,
    ),
    "t5": (T5Config, AutoModelForSeq2SeqLM, 60_506_624),
    "llama": (
        lambda: LlamaConfig(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        AutoModelForCausalLM,
        1_235_814_400,
    ),
}
"""GPT-2, BART-base, T5-small and a Llama of 1.2 billion parameters, whose sizes are public."""


@pytest.mark.parametrize("preset", ["unipelt-ap", "unipelt-apl"])
@pytest.mark.parametrize("family", FULL_SIZE)
def test_numbers_of_parameters_of_full_size_models(family: str, preset: str) -> None:
    make, auto, base = FULL_SIZE[family]
    with torch.device("meta"):  # shapes alone, no memory
        model = auto.from_config(make())
    model.tie_weights()  # which some versions leave out there
    if family not in WITH_PREFIX:
        preset = "unipelt-al"
    config = unipelt.resolve(preset)
    with torch.device("meta"):
        unipelt.inject(model, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    depth = {"gpt2": 12, "bart": 6, "t5": 6, "llama": 16}[family]
    sizes = [sizes_of(model.config, depth)] * len(STACKS[family])
    counts = assert_counts(model, config, wanted_counts(config, STACKS[family], sizes), base)
    assert counts.head == 0
    assert counts.deployed < 0.05 * base
