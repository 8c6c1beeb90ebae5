"""Strategies for tests of properties: models of every family, methods, and texts with their masks.

The drawn values are short, frozen descriptions, so that a failing example can be read and typed in again. Functions
make models and batches from them, the same for the same description. With `UNIPELT_EXAMPLES=N`, every property draws N
random examples. Without this variable, a property draws few examples, and always the same.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from helpers import shake
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tiny import (
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    FAMILIES,
    GATED,
    INSERTED,
    PAD,
    VOCABULARY,
    WITH_PREFIX,
    tiny_config,
    tiny_model,
)
from torch import Tensor

import unipelt
from unipelt.config.parts import LINEAR, PROJECTIONS, Place

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
AS_DECODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie")
"""Encoders that Transformers can also build as causal language models."""
COMMON = ("bert", "llama", "bart", "t5", "gpt2", "albert", "deberta-v2", "modernbert", "mpnet", "gpt_neox", "bloom")
"""One family of each kind. These are drawn more often."""


WINDOWED = ("modernbert", "mistral", "gemma2", "gemma3_text")
"""Families with windows in the attention. Padding between a prompt and a text takes places of a window."""
TURN = 10
"""The number of examples in one run of Hypothesis. In longer runs, most examples are the previous one with a part of it
copied to another place.
"""


def holds(default: int, *drawn: st.SearchStrategy[Any], shrink: bool = True) -> Callable[[Callable[..., None]], Any]:
    """Make a test of a property.

    Args:
        default: the number of examples in a usual run.
        drawn: the strategies for the property's arguments.
        shrink: whether a failing example is made small.
    """
    count = int(os.environ.get("UNIPELT_EXAMPLES", "0"))
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        names = inspect.signature(check).parameters

        @functools.wraps(check)
        def test() -> None:
            tried = 0

            def counted(**values: Any) -> None:
                nonlocal tried
                check(**values)
                tried += 1

            counted.__name__ = check.__name__
            for start in range(0, count or default, TURN):
                turn = settings(
                    max_examples=min(TURN, (count or default) - start),
                    database=None,
                    deadline=None,
                    phases=phases,
                    suppress_health_check=list(HealthCheck),
                )(given(**dict(zip(names, drawn, strict=True)))(counted))
                number = random.getrandbits(32) if count else zlib.crc32(f"{check.__name__} {start}".encode())
                seed(number)(turn)()
            print(f"{check.__name__} held for {tried} examples")

        del test.__wrapped__  # otherwise pytest looks for fixtures with the names of its arguments
        return test

    return decorate


# Models with a method


@dataclass(frozen=True)
class Sizes:
    """The sizes of a tiny model. Its hidden size is `heads * head`.

    Attributes:
        heads, head: the number of query heads, and their size in units.
        key_heads: the number of heads of keys and values, if a family lets queries share them.
        layers, decoder_layers: the layers of the model or its encoder, and of the decoder after the encoder.
        groups: the number of layers with their own weights, if a family shares weights.
        inner: the width of the feed-forward network, in units.
    """

    heads: int = 2
    head: int = 8
    key_heads: int = 1
    layers: int = 2
    decoder_layers: int = 2
    groups: int = 1
    inner: int = 20

    def changes(self, family: str) -> dict[str, Any]:
        """Return these sizes under the names of the family's configuration."""
        there = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
        there |= tiny_config(family).to_dict().keys()
        named = (
            (self.heads * self.head, "hidden_size d_model n_embd dim"),
            (self.layers, "num_hidden_layers num_layers n_layer n_layers encoder_layers"),
            (self.decoder_layers, "decoder_layers num_decoder_layers"),
            (self.heads, "num_attention_heads num_heads n_head n_heads encoder_attention_heads"),
            (self.heads, "decoder_attention_heads"),
            (self.key_heads, "num_key_value_heads"),
            (self.groups, "num_hidden_groups"),
            (self.inner, "intermediate_size d_ff n_inner hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim"),
        )
        return {name: value for value, names in named for name in names.split() if name in there}


@dataclass(frozen=True)
class Case:
    """A model of a family, and the method for the model.

    Attributes:
        family: the `model_type`.
        method: the method to inject.
        sizes: the sizes of the model.
        attention: the attention back-end, if Transformers has a choice.
        head: the part of the class name after `AutoModelFor`; the default is that of `tiny_model`.
        as_decoder: whether an encoder is built as a causal language model.
        seed: the seed of all weights.
    """

    family: str
    method: unipelt.UniPELTConfig
    sizes: Sizes = Sizes()
    attention: str = "sdpa"
    head: str = ""
    as_decoder: bool = False
    seed: int = 0

    @property
    def causal(self) -> bool:
        """Whether a token of the model's output sees only earlier tokens."""
        return self.as_decoder or self.family not in ENCODERS

    @property
    def behind_encoder(self) -> bool:
        """Whether the output is that of a decoder after an encoder."""
        return self.family in ENCODER_DECODERS and not self.head

    def bare(self, dropout: float = 0.0, **changes: Any) -> Any:
        """Return the base model without the method, in evaluation mode."""
        changes = {**self.sizes.changes(self.family), **({"is_decoder": True} if self.as_decoder else {}), **changes}
        head = "CausalLM" if self.as_decoder else self.head
        return tiny_model(self.family, head, self.attention, dropout, self.seed, **changes)

    def build(self, dropout: float = 0.0, moved: bool = True, **changes: Any) -> Any:
        """Return the model with the method.

        If `moved`, the trainable parameters are moved away from their start, so that no term is zero.
        """
        model = unipelt.inject(self.bare(dropout, **changes), self.method)
        if moved:
            shake(model, self.seed + 1)
        return model


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    heads, layers = draw(st.sampled_from((2, 1, 4))), draw(st.integers(1, 3))
    return Sizes(
        heads=heads,
        head=draw(st.sampled_from((8, 16))),
        key_heads=draw(st.sampled_from([count for count in (1, 2, 4) if heads % count == 0])),
        layers=layers,
        decoder_layers=draw(st.integers(1, 3)),
        groups=draw(st.sampled_from([count for count in (1, 2, 3) if layers % count == 0])),
        inner=draw(st.integers(4, 40)),
    )


@st.composite
def methods(
    draw: st.DrawFn,
    family: str,
    sizes: Sizes,
    *,
    parts: Sequence[str] = ("adapter", "prefix", "lora"),
    gated: Sequence[bool] = (True, False),
    gating: Sequence[str] = ("scale", "mass"),
    pooling: Sequence[str] = ("masked_mean", "mean"),
    further: bool = True,
    other_gates: bool = True,
    base_trains: bool = True,
    least: int = 1,
) -> unipelt.UniPELTConfig:
    """Draw a method that the family can take, with at least `least` of the parts.

    A method without any part trains something else: the base model or its biases.
    """
    possible = [part for part in parts if part != "prefix" or family in WITH_PREFIX]
    # all parts are drawn often, because errors are likely where parts meet
    chosen = possible if draw(st.booleans()) else draw(st.lists(st.sampled_from(possible), min_size=least, unique=True))
    gate = st.sampled_from(gated)
    fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "adapter": {"bottleneck": st.integers(1, 9), "gate": gate},
        "prefix": {
            "length": st.integers(1, 6),
            "hidden": st.integers(1, 12),
            "gate": gate,
            "gating": st.sampled_from(gating),
        },
        "lora": {
            "rank": st.integers(1, 6),
            "alpha": st.floats(0.5, 16.0, width=16),
            "gate": gate,
            **(
                {
                    "places": st.just(["query", "value"])
                    | st.just("all-linear")
                    | st.sets(st.sampled_from(LINEAR if family in GATED else PROJECTIONS), min_size=1).map(sorted),
                    "scaling": st.sampled_from(["standard", "rank_stabilised"]),
                    "decomposed": st.sampled_from([False, False, True]),
                }
                if further
                else {}
            ),
        },
    }
    values: dict[str, Any] = dict.fromkeys(fields)
    for part in chosen:
        values[part] = {name: draw(strategy) for name, strategy in fields[part].items()}
    lora = values["lora"]
    if further and lora is not None and not lora["decomposed"] and lora["rank"] <= 4:
        lora["start"] = draw(st.sampled_from(["zero", "zero", "pissa"]))  # a place may have a width of 4
        lora["gating"] = draw(st.sampled_from(["replace", "replace", "multiply"]))
    if further and chosen:
        values |= _further(draw, sizes, gate, ungated=False in gated)
    if further and chosen and False in gated and family not in (*ENCODER_DECODERS, *WINDOWED):
        values["prompt"] = draw(st.sampled_from([None, None, None, {"length": 3}]))
    gates = {"pooling": draw(st.sampled_from(pooling))}
    if other_gates and draw(st.booleans()):
        gates = draw(st.sampled_from(_gates(family, "prefix" in chosen)))
    if gates.get("shared") and values.pop("reft", None) and False in gated:
        values["reft"] = {"gate": False}  # its gate comes after the layer
    if further and values["prefix"] and values["prefix"]["gating"] == "scale" and family not in INSERTED:
        values["prefix"]["softmax"] = draw(st.sampled_from(["shared", "own"]))
    if further and values["prefix"] and values["prefix"]["gate"] and gates.get("activation") != "softmax":
        values["prefix"]["gate_start"] = draw(st.sampled_from([None, None, 0.1]))
    if values.get("prompt") and True in gated and _suits_prompt(gates, family):
        values["prompt"] |= {"gate": draw(gate)}
    depth = sizes.groups if family == "albert" else sizes.layers
    sides = {"encoder": True, "decoder": True, "cross": True}
    if family in ENCODER_DECODERS:
        depth = min(depth, sizes.decoder_layers)
        which = draw(st.sets(st.sampled_from(sorted(sides)), max_size=2))
        if chosen == ["adapter"] and which == {"encoder", "decoder"}:
            which = set()  # an adapter has no place in cross-attention
        sides |= dict.fromkeys(which, False)
    trains = st.booleans() if base_trains else st.just(False)
    bitfit = draw(trains) if family in WITH_BIASES else False
    layers = draw(st.none() | st.sets(st.integers(0, depth - 1), min_size=1).map(sorted))
    return unipelt.UniPELTConfig.from_dict(
        {
            **values,
            **sides,
            "layers": layers,
            "gate": gates,
            "dtype": draw(st.sampled_from(["float32", "float32", "base"])),
            "train_head": draw(st.booleans()),
            "train_base": draw(trains) or (not chosen and not bitfit),
            "bitfit": bitfit,
        }
    )


def _further(draw: st.DrawFn, sizes: Sizes, gate: st.SearchStrategy[bool], *, ungated: bool) -> dict[str, Any]:
    """Draw some of the further submodules, at some of their places, with a small width."""
    width = st.integers(1, 6)
    inner = {"bottleneck": width, "activation": st.just("gelu")}  # so narrow a ReLU may give zero for every token
    terms = draw(st.sampled_from([1, 2])) if sizes.heads * sizes.head % 2 == 0 else 1
    fields: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "ia3": {"places": st.sets(st.sampled_from(PLACES), min_size=1).map(sorted)},
        "red": {"places": st.sampled_from([["down"], ["query", "activation"], ["attention", "feed_forward"]])},
        "houlsby": {"places": st.sampled_from([["attention", "down"], ["query", "up"], ["down"]]), **inner},
        "parallel": {"scale": st.sampled_from([1.0, 4.0]), **inner},
        "compacter": {**inner, "bottleneck": width.map(lambda size: size * terms), "terms": st.just(terms)},
        "reft": {
            "rank": st.integers(1, min(3, sizes.heads * sizes.head)),
            "variant": st.sampled_from(["loreft", "direft"]),
            "positions": st.sampled_from(["ends", "all"]),
            "first": st.integers(1, 3),
        },
    }
    if ungated:
        fields["ln_tuning"] = {"gate": st.just(False)}  # some layers refuse some gates of their norms
    chosen = draw(st.sets(st.sampled_from(sorted(fields)), max_size=2))
    return {
        name: {"gate": draw(gate), **{field: draw(strategy) for field, strategy in fields[name].items()}}
        for name in sorted(chosen)
    }


def _gates(family: str, prefix: bool) -> list[dict[str, Any]]:
    """Return gates other than the paper's that the family can have, both as an encoder and as a decoder."""
    found: list[dict[str, Any]] = [
        {"pooling": "token"},
        {"pooling": "static"},
        {"network": "mlp", "hidden": 3},
        {"shared": True},
        {"shared": True, "pooling": "token"},
        {"temperature": 2.0, "start": 0.7},
    ]
    if family in ENCODERS and family not in AS_DECODERS:
        found += [{"network": name, "hidden": 4} for name in ("recurrent", "transformer")]
        found += [{"network": "transformer", "hidden": 3, "shared": True}]
    return found + ([] if prefix else [{"activation": "tanh", "start": 0.3}])


def _suits_prompt(gates: dict[str, Any], family: str) -> bool:
    """Return whether a prompt can have this gate, both in an encoder and in a decoder."""
    looks_both_ways = family in ENCODERS and family not in AS_DECODERS
    pooling = gates.get("pooling")
    return not gates.get("shared") and pooling != "token" and (pooling == "static" or looks_both_ways)


def _has_biases(family: str) -> bool:
    return any(name.endswith("bias") for name, _ in tiny_model(family, "Model").named_parameters())


PLACES = [place for place in get_args(Place) if place != "gate"]
"""The places that every family has."""
WITH_BIASES = [family for family in FAMILIES if _has_biases(family)]


@st.composite
def cases(
    draw: st.DrawFn,
    families: Sequence[str] = tuple(FAMILIES),
    *,
    attention: Sequence[str] = ("sdpa", "eager"),
    heads: bool = False,
    decoders_too: bool = False,
    **restricted: Any,
) -> Case:
    """Draw a case of one of the families.

    Args:
        draw: the function of Hypothesis that draws.
        families: the families. Those in `COMMON` are drawn more often.
        attention: the attention back-ends.
        heads: whether heads of tasks are drawn too.
        decoders_too: whether encoders are built as decoders too.
        restricted: the keyword arguments of `methods`.
    """
    often = [family for family in COMMON if family in families]
    family = draw(st.sampled_from([*often, *families]))
    size = draw(sizes())
    as_decoder = decoders_too and family in AS_DECODERS and draw(st.booleans())
    possible = [head for head in TASKS if has_head(family, head)] if heads and not as_decoder else []
    if family in ENCODER_DECODERS and "TokenClassification" in possible:
        possible.remove("TokenClassification")  # T5's has no decoder, and the method may need one
    return Case(
        family,
        draw(methods(family, size, **restricted)),
        size,
        attention=draw(st.sampled_from(attention)),
        head=draw(st.sampled_from(["", *possible])),
        as_decoder=as_decoder,
        seed=draw(st.integers(0, 1000)),
    )


def has_head(family: str, head: str) -> bool:
    return type(tiny_config(family)) in getattr(transformers, f"AutoModelFor{head}")._model_mapping


# Texts


@dataclass(frozen=True)
class Texts:
    """Random texts.

    Attributes:
        lengths: the length of each text, in tokens.
        targets: the length of each input of a decoder after an encoder, in tokens; as many as `lengths`.
        padding: the side of the padding; "none" means no mask, and all texts are as long as the longest.
        wider: the tokens of padding beside the longest text.
        hidden: for each text, the masked positions inside the text; never the first and the last two.
        seed: the seed of the tokens.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    padding: Literal["right", "left", "none"] = "right"
    wider: int = 0
    hidden: tuple[frozenset[int], ...] = ()
    seed: int = 0


@st.composite
def texts(
    draw: st.DrawFn,
    paddings: Sequence[str] = ("right", "left", "none"),
    *,
    rows: tuple[int, int] = (1, 4),
    longest: int = 11,
    holes: bool = False,
) -> Texts:
    count = draw(st.integers(*rows))
    lengths = draw(st.lists(st.integers(2, longest), min_size=count, max_size=count))
    targets = draw(st.lists(st.integers(2, 7), min_size=count, max_size=count))
    hidden = [draw(st.frozensets(st.integers(1, max(1, length - 3)))) if holes else frozenset() for length in lengths]
    return Texts(
        tuple(lengths),
        tuple(targets),
        draw(st.sampled_from(paddings)),
        draw(st.integers(0, 4)),
        tuple(frozenset(place for place in places if place < n - 2) for places, n in zip(hidden, lengths, strict=True)),
        draw(st.integers(0, 1000)),
    )


def batch(model: Any, case: Case, described: Texts) -> dict[str, Tensor]:
    """Return the model's inputs: tokens (B, T), the mask, if any, and the input of a decoder after an encoder."""
    generator = torch.Generator().manual_seed(described.seed)
    tokens = max(described.lengths) + (0 if described.padding == "none" else described.wider)
    rows = len(described.lengths)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    if described.padding == "none":
        ids[:, -1] = EOS
        inputs = {"input_ids": ids}
    else:
        mask = torch.zeros(rows, tokens, dtype=torch.long)
        for row, (length, hidden) in enumerate(zip(described.lengths, described.hidden, strict=True)):
            start = tokens - length if described.padding == "left" else 0
            ids[row, :start] = ids[row, start + length :] = PAD
            ids[row, start + length - 1] = EOS
            mask[row, start : start + length] = 1
            mask[row, [start + place for place in hidden]] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if case.causal and "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if case.behind_encoder:
        wanted = max(described.targets)
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (rows, wanted), generator=generator)
        if described.padding != "none":
            inputs["decoder_attention_mask"] = (torch.arange(wanted) < torch.tensor(described.targets)[:, None]).long()
    return inputs


def real(case: Case, inputs: dict[str, Tensor], out: Tensor) -> Tensor:
    """Return which outputs the properties cover, (B,) or (B, T): those of tokens that are not masked."""
    if not (case.head in ("TokenClassification", "QuestionAnswering") or (case.causal and not case.head)):
        return torch.ones(len(out), dtype=torch.bool)
    mask = inputs.get("decoder_attention_mask" if case.behind_encoder else "attention_mask")
    return torch.ones(out.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


# Training


def loss_of(model: Any, case: Case, inputs: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
    """Return a random sum of the first output over real tokens, as a mean over texts.

    `rows` selects texts of the batch.
    """
    given = {name: tensor[rows] for name, tensor in inputs.items()}
    out: Tensor = model(**given)[0]
    generator = torch.Generator().manual_seed(case.seed)
    weights = torch.randn(len(inputs["input_ids"]), *out.shape[1:], generator=generator)[rows].to(out.dtype)
    return (out * weights)[real(case, given, out)].sum() / len(out)


def gradients(model: Any, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradients of `loss_of` by name, or None for a parameter without one.

    Dropout is the same in every call.
    """
    model.zero_grad()
    torch.manual_seed(0)
    loss_of(model, case, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
