"""Where things live in each architecture: data only, and the only file that knows architecture names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """An attention module, and where it keeps its projections.

    It is called with the states that its query projection reads, as the first argument or by the name `hidden`, and,
    where a prefix is to enter, hands queries, keys and values to Transformers' attention interface
    (`ALL_ATTENTION_FUNCTIONS`), by the name that its own `config._attn_implementation` gives.

    Attributes:
        path: from a layer.
        query, value: paths of the projections, from the attention; equal where one module holds both.
        key: likewise; where it is not given, the name of `value` where that is fused, and else nothing that reads
            keys can be added.
        output: path of the projection that ends the attention, from the layer; where it is not given, nothing can be
            added there.
        fused: what the module at `value` computes, if more than values. `qkv`: queries, keys and values side by side;
            `kv`: keys and values; `heads`: queries, keys and values of one head, then of the next.
        bias: for an attention that does not use the interface and whose logits know positions only by what it is
            given: the argument that is added to them besides the mask. A prefix then makes its text longer.
        hidden: name of the argument with the states.
        mask: name of the argument with the mask.
        query_serves_positions: the projections of queries and keys are called again in a pass, on relative positions;
            what is gated, which belongs to a text, keeps out of that.
    """

    path: str
    query: str
    value: str
    fused: Literal["", "qkv", "kv", "heads"] = ""
    key: str = ""
    output: str = ""
    bias: str = ""
    hidden: str = "hidden_states"
    mask: str = "attention_mask"
    query_serves_positions: bool = False


@dataclass(frozen=True)
class Stack:
    """A stack of Transformer layers, and where each layer keeps what submodules attach to.

    Attributes:
        layers: path of the list of layers, from the base model; `*` stands for every item of a list.
        attention: the self-attention.
        norm: path of the normalisation whose input is the feed-forward network's output plus its residual, from a
            layer (post-LN); or
        output: path of the module whose output the feed-forward network adds to its residual (pre-LN).
        up, down: paths of the first and last projection of the feed-forward network, from a layer; `|` stands between
            names of which a model has one. Where they are not given, nothing can be added there.
        causal: whether a token sees only those before it.
        cross: the attention to another stack's output, if there is one.
    """

    layers: str
    attention: Attention
    norm: str = ""
    output: str = ""
    up: str = ""
    down: str = ""
    causal: bool = False
    cross: Attention | None = None

    def __post_init__(self) -> None:
        if bool(self.norm) == bool(self.output):
            raise ValueError("a Stack has either norm (post-LN) or output (pre-LN), not both and not neither")


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        stacks: one, or an encoder and then a decoder.
        refused: submodule (`adapter`, `prefix`, `lora`) -> why this architecture cannot take it.
    """

    stacks: tuple[Stack, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


def register_family(model_type: str, *stacks: Stack, refused: Mapping[str, str] | None = None) -> Family:
    """Describe an architecture, so that `unipelt.inject` takes models whose `config.model_type` is `model_type`.

    A model of your own, not in Transformers: a `PreTrainedModel` whose attention calls Transformers' attention
    interface (`examples/own_model.py` is a whole one).

        unipelt.register_family(
            "mine", unipelt.Stack("blocks", unipelt.Attention("attn", "q", "v"), output="mlp", causal=True)
        )

    Args:
        model_type: of the configuration.
        stacks: one, or an encoder and then a decoder.
        refused: submodule (`adapter`, `prefix`, `lora`) -> why this architecture cannot take it.

    Returns:
        The description. Paths are checked when a model is injected.

    Raises:
        ValueError: the name is taken by another description, or the description cannot be meant.
    """
    if not stacks or len(stacks) > 2:
        raise ValueError(f"an architecture has one stack, or an encoder and a decoder; {len(stacks)} were given")
    family = Family(tuple(stacks), dict(refused or {}))
    if unknown := family.refused.keys() - {"adapter", "prefix", "lora"}:
        raise ValueError(f"refused names submodules (adapter, prefix, lora), not {sorted(unknown)[0]!r}")
    if FAMILIES.get(model_type, family) != family:
        raise ValueError(f"{model_type!r} is described already, and otherwise")
    FAMILIES[model_type] = family
    return family


def describe_unknown(model_type: str) -> str:
    """What to tell the owner of a model that has no description."""
    return (
        f"there is no description of {model_type!r} models; supported are {', '.join(FAMILIES)}. "
        "Describe a new one by where its parts are: "
        f'unipelt.register_family("{model_type}", unipelt.Stack("layers", unipelt.Attention("self_attn", "q_proj", '
        '"v_proj"), output="mlp", causal=True)); help(unipelt.register_family) says more'
    )


OWN_ATTENTION = (
    "this attention computes its own softmax rather than through Transformers' attention interface, so there is no "
    "place at which a prefix could enter"
)
TWO_WIDTHS = (
    "the heads of its keys and of its values are not as wide, and a prefix has one width for both"
)
KEYS_REPEATED = (
    "its attention is given other keys and values than the projection of the values has, and a prefix as wide as that "
    "projection does not fit them"
)
DISENTANGLED = (
    "disentangled attention scores every key by its relative position to the query, and a prefix has no position"
)


def _bert_like(attention: Attention, *, norm: str = "", output: str = "") -> Family:
    cross = replace(attention, path="crossattention.self", output="crossattention.output.dense")
    return Family(
        (Stack("encoder.layer", attention, norm, output, up="intermediate.dense", down="output.dense", cross=cross),)
    )


def _bart_like(*, norm: str = "", output: str = "") -> Family:
    own = Attention("self_attn", "q_proj", "v_proj", key="k_proj", output="self_attn.out_proj")
    cross = replace(own, path="encoder_attn", output="encoder_attn.out_proj")
    encoder = Stack("encoder.layers", own, norm, output, up="fc1", down="fc2")
    return Family((encoder, replace(encoder, layers="decoder.layers", causal=True, cross=cross)))


def _t5_like(mask: str) -> Family:
    own = Attention("layer.0.SelfAttention", "q", "v", key="k", output="layer.0.SelfAttention.o", mask=mask)
    cross = replace(own, path="layer.1.EncDecAttention", output="layer.1.EncDecAttention.o")

    def stack(layers: str, feed_forward: str, causal: bool, cross: Attention | None) -> Stack:
        ends = {"up": f"{feed_forward}.wi|{feed_forward}.wi_0", "down": f"{feed_forward}.wo"}
        return Stack(layers, own, output=feed_forward, causal=causal, cross=cross, **ends)

    return Family(
        (
            stack("encoder.block", "layer.1.DenseReluDense", False, None),
            stack("decoder.block", "layer.2.DenseReluDense", True, cross),
        )
    )


def _decoder(
    layers: str, attention: Attention, output: str, up: str, down: str, cross: Attention | None = None
) -> Family:
    return Family((Stack(layers, attention, output=output, up=up, down=down, causal=True, cross=cross),))


def _llama_like(output: str = "mlp", *, end: str = "o_proj", up: str = "up_proj", down: str = "down_proj") -> Family:
    attention = Attention("self_attn", "q_proj", "v_proj", key="k_proj", output=f"self_attn.{end}")
    return _decoder("layers", attention, output, f"mlp.{up}", f"mlp.{down}")


_SELF = Attention("attention.self", "query", "value", key="key", output="attention.output.dense")

_BERT = _bert_like(_SELF, norm="output.LayerNorm")
_BERT_PRE_LN = _bert_like(_SELF, output="output.dense")
_BART = _bart_like(norm="final_layer_norm")
_BART_PRE_LN = _bart_like(output="fc2")
_LLAMA = _llama_like()
_GEMMA = _llama_like("post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    # encoders
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "data2vec-text": _BERT,
    "ernie": _BERT,
    "roberta-prelayernorm": _BERT_PRE_LN,
    "xlm-roberta-xl": _BERT_PRE_LN,
    "distilbert": Family(
        (
            Stack(
                "transformer.layer",
                Attention("attention", "q_lin", "v_lin", key="k_lin", output="attention.out_lin"),
                norm="output_layer_norm",
                up="ffn.lin1",
                down="ffn.lin2",
            ),
        )
    ),
    "albert": Family(
        (
            Stack(
                "encoder.albert_layer_groups.*.albert_layers",
                Attention("attention", "query", "value", key="key", output="attention.dense"),
                norm="full_layer_layer_norm",
                up="ffn",
                down="ffn_output",
            ),
        )
    ),
    "mpnet": Family(
        (
            Stack(
                "encoder.layer",
                Attention("attention.attn", "q", "v", key="k", output="attention.attn.o", bias="position_bias"),
                norm="output.LayerNorm",
                up="intermediate.dense",
                down="output.dense",
            ),
        )
    ),
    "deberta": Family(
        (
            Stack(
                "encoder.layer",
                Attention("attention.self", "in_proj", "in_proj", fused="heads", output="attention.output.dense"),
                norm="output.LayerNorm",
                up="intermediate.dense",
                down="output.dense",
            ),
        ),
        {"prefix": DISENTANGLED},
    ),
    "deberta-v2": Family(
        (
            Stack(
                "encoder.layer",
                Attention(
                    "attention.self",
                    "query_proj",
                    "value_proj",
                    key="key_proj",
                    output="attention.output.dense",
                    query_serves_positions=True,
                ),
                norm="output.LayerNorm",
                up="intermediate.dense",
                down="output.dense",
            ),
        ),
        {"prefix": DISENTANGLED},
    ),
    "modernbert": Family(
        (
            Stack(
                "layers",
                Attention("attn", "Wqkv", "Wqkv", fused="qkv", output="attn.Wo"),
                output="mlp",
                up="mlp.Wi",
                down="mlp.Wo",
            ),
        )
    ),
    # encoder and decoder
    "bart": _BART,
    "marian": _BART,
    "plbart": _BART,
    "mbart": _BART_PRE_LN,
    "pegasus": _BART_PRE_LN,
    "m2m_100": _BART_PRE_LN,
    "blenderbot": _BART_PRE_LN,
    "t5": _t5_like(mask="mask"),
    "mt5": _t5_like(mask="mask"),
    "umt5": _t5_like(mask="attention_mask"),
    # decoders
    "gpt2": _decoder(
        "h",
        Attention("attn", "c_attn", "c_attn", fused="qkv", output="attn.c_proj"),
        "mlp",
        "mlp.c_fc",
        "mlp.c_proj",
        cross=Attention(
            "crossattention",
            "q_attn",
            "c_attn",
            fused="kv",
            output="crossattention.c_proj",
            mask="encoder_attention_mask",
        ),
    ),
    "gpt_neox": _decoder(
        "layers",
        Attention("attention", "query_key_value", "query_key_value", fused="heads", output="attention.dense"),
        "mlp",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    "gptj": replace(
        _decoder(
            "h",
            Attention("attn", "q_proj", "v_proj", key="k_proj", output="attn.out_proj"),
            "mlp",
            "mlp.fc_in",
            "mlp.fc_out",
        ),
        refused={"prefix": OWN_ATTENTION},
    ),
    "bloom": replace(
        _decoder(
            "h",
            Attention(
                "self_attention", "query_key_value", "query_key_value", fused="heads", output="self_attention.dense"
            ),
            "mlp.dense_4h_to_h",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        refused={"prefix": OWN_ATTENTION},
    ),
    "opt": _decoder(
        "decoder.layers",
        Attention("self_attn", "q_proj", "v_proj", key="k_proj", output="self_attn.out_proj"),
        "fc2",
        "fc1",
        "fc2",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _GEMMA,
    "phi": _llama_like(end="dense", up="fc1", down="fc2"),
    "phi3": _decoder(
        "layers",
        Attention("self_attn", "qkv_proj", "qkv_proj", fused="qkv", output="self_attn.o_proj"),
        "mlp",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ),
    "starcoder2": _llama_like(up="c_fc", down="c_proj"),
    "stablelm": _LLAMA,
    "granite": _LLAMA,
    "cohere": _LLAMA,
    "smollm3": _LLAMA,
    "nemotron": _LLAMA,
}
"""By `config.model_type`."""
