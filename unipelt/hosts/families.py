"""Descriptions of architectures: the generated table, exceptions to it, and descriptions that a caller registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.hosts.describe import DescribeError, describe
from unipelt.hosts.description import DISENTANGLED, OWN_ATTENTION, WITHOUT_ATTENTION, Attention, Family, Stack
from unipelt.hosts.table import read_table

__all__ = ["FAMILIES", "Attention", "Family", "Stack", "family_of", "register_family"]

logger = logging.get_logger(__name__)


def register_family(model_type: str, *stacks: Stack, refused: Mapping[str, str] | None = None) -> Family:
    """Register the description of an architecture, so that `unipelt.inject` takes its models.

    A registered description comes first, also for a type that the table has. An architecture without a description is
    described by inspection (`unipelt.describe`) when a model is injected.

        unipelt.register_family(
            "mine", unipelt.Stack("blocks", unipelt.Attention("attn", "q", "v"), output="mlp", causal=True)
        )

    Args:
        model_type: `config.model_type` of the models.
        stacks: one stack, or an encoder and then a decoder.
        refused: submodule (`adapter`, `prefix`, `lora`) -> the reason why this architecture cannot take the submodule.

    Returns:
        The description. Paths are checked when a model is injected.

    Raises:
        ValueError: the type was registered with another description, the number of stacks is not 1 or 2, or `refused`
            names an unknown submodule.
    """
    if not stacks or len(stacks) > 2:
        raise ValueError(f"an architecture has one stack, or an encoder and a decoder; {len(stacks)} were given")
    family = Family(tuple(stacks), dict(refused or {}))
    if unknown := family.refused.keys() - {"adapter", "prefix", "lora"}:
        raise ValueError(f"refused names submodules (adapter, prefix, lora), not {sorted(unknown)[0]!r}")
    if is_registered(model_type) and FAMILIES[model_type] != family:
        raise ValueError(f"{model_type!r} is described already, and otherwise")
    FAMILIES[model_type] = _registered[model_type] = family
    return family


def family_of(model: PreTrainedModel) -> Family:
    """Return the description of a model: a registered one, one of the table, or one found by inspection.

    Inspection logs a warning. Its description is kept for the model's type if that type had none.

    Raises:
        DescribeError: the type has no description, and inspection found none; the message names the missing part.
    """
    kind = model.config.model_type
    known = FAMILIES.get(kind)
    if known is not None and (is_registered(kind) or _fits(model, known)):
        return known
    try:
        found = describe(model)
    except DescribeError as error:
        if known is not None:
            return known  # the check of its paths then reports the missing module
        raise DescribeError(describe_unknown(kind, str(error))) from error
    logger.warning(
        f"there is no description of {kind!r} models in the table; {type(model).__name__} was described by inspection "
        f"(layers at {', '.join(stack.layers for stack in found.stacks)})"
    )
    if known is None:
        FAMILIES[kind] = found
    return found


def is_registered(model_type: str) -> bool:
    """Return whether a caller registered the description of a model type."""
    return model_type in FAMILIES and FAMILIES[model_type] is _registered.get(model_type)


SWITCHES = ("use_bidirectional_attention",)
"""Settings that are off in every default configuration; the table's description is not valid if one of them is on."""


def _fits(model: PreTrainedModel, family: Family) -> bool:
    """Return whether a model has a stack of the family, and a layer as described in each stack that it has."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) in (True, "all") for name in SWITCHES):
        return False
    found = []
    for stack in family.stacks:
        layers = list(layers_at(model.base_model, stack.layers))
        if layers:
            found.append(any(is_complete(layer, stack) for layer in layers))
    return bool(found) and all(found)


def layers_at(base: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the layers at `path`, where `*` stands for every item of a list; yield none if the path does not exist."""
    first, starred, rest = path.partition(".*")
    try:
        items = base.get_submodule(first)
    except AttributeError:
        return
    for item in items._modules.values():  # children() would yield a repeated layer only once
        assert item is not None
        if starred:
            yield from layers_at(item, rest.removeprefix("."))
        else:
            yield item


def is_complete(layer: nn.Module, stack: Stack) -> bool:
    """Return whether a layer has the modules of its stack's description; in a hybrid model some layers lack them."""
    attention = stack.attention
    if attention == WITHOUT_ATTENTION:
        return has(layer, stack.output)
    start = f"{attention.path}." if attention.path else ""
    paths = [f"{start}{attention.query}", f"{start}{attention.value}", stack.norm or stack.output]
    return all(has(layer, path) for path in paths)


def has(module: nn.Module, path: str) -> bool:
    """Return whether a module has a submodule at a path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def describe_unknown(model_type: str, reason: str) -> str:
    """Return the message for a model type without a description, if inspection found none."""
    return (
        f"there is no description of {model_type!r} models, and inspection did not find one: {reason}. "
        "Describe them by where their parts are: "
        f'unipelt.register_family("{model_type}", unipelt.Stack("layers", unipelt.Attention("self_attn", "q_proj", '
        '"v_proj"), output="mlp", causal=True)); help(unipelt.register_family) says more'
    )


def _changed(
    family: Family,
    *,
    refused: Mapping[str, str] | None = None,
    attention: Mapping[str, Any] | None = None,
    **stack: Any,
) -> Family:
    """Return a family with other attributes of its stacks and self-attentions and, if given, of `refused`."""
    stacks = tuple(
        replace(one, attention=replace(one.attention, **(attention or {})), **stack) for one in family.stacks
    )
    return Family(stacks, family.refused if refused is None else refused)


def _t5_like(family: Family) -> Family:
    """Return a family with the paths of the first projections for feed-forward networks with and without a gate."""
    stacks = []
    for stack in family.stacks:
        network = stack.up.rpartition(".")[0]
        stacks.append(replace(stack, up=f"{network}.wi|{network}.wi_0", gate=f"{network}.wi_1"))
    return Family(tuple(stacks), family.refused)


EXCEPTIONS: dict[str, Callable[[Family], Family]] = {
    "deberta": partial(_changed, attention={"mask_is_truth_values": True}, refused={"prefix": DISENTANGLED}),
    "deberta-v2": partial(
        _changed,
        attention={"query_serves_positions": True, "mask_is_truth_values": True},
        refused={"prefix": DISENTANGLED},
    ),
    "t5": _t5_like,
    "mt5": _t5_like,
    "umt5": _t5_like,
    # the configuration decides how many heads of queries share one head of keys
    "falcon": partial(_changed, attention={"fused": "groups"}),
    "gpt_bigcode": partial(_changed, attention={"fused": "groups"}),
    # the layer's first and last projections are those of its bottleneck, around the feed-forward network
    "mobilebert": partial(_changed, up="intermediate.dense", down="output.dense"),
    # MPNet computes its own softmax, but gets all positions as a bias, so a prefix can make its text longer
    "mpnet": partial(_changed, attention={"bias": "position_bias"}, refused={}),
}
"""Changes to the table by model type: facts that inspection misses, or that differ from the default configuration."""

BY_HAND: dict[str, Family] = {
    # normalises what it attends to, so that inspection cannot tell its keys from its values
    "yoso": Family(
        (
            Stack(
                "encoder.layer",
                Attention("attention.self", "query", "value", key="key", output="attention.output.dense"),
                norm="output.LayerNorm",
                up="intermediate.dense",
                down="output.dense",
            ),
        ),
        {"prefix": OWN_ATTENTION},
    ),
}
"""Descriptions of types that inspection cannot describe."""

FAMILIES: dict[str, Family] = BY_HAND | {
    kind: EXCEPTIONS[kind](family) if kind in EXCEPTIONS else family for kind, family in read_table().items()
}
"""Descriptions by `config.model_type`."""

_registered: dict[str, Family] = {}
