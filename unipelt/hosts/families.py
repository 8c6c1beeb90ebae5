"""Where things live in each architecture: the generated table, what differs from it, and what a caller registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from unipelt.hosts.describe import DescribeError, describe
from unipelt.hosts.description import DISENTANGLED, Attention, Family, Stack
from unipelt.hosts.table import read_table

__all__ = ["FAMILIES", "Attention", "Family", "Stack", "family_of", "register_family"]

logger = logging.get_logger(__name__)


def register_family(model_type: str, *stacks: Stack, refused: Mapping[str, str] | None = None) -> Family:
    """Describe an architecture, so that `unipelt.inject` takes models whose `config.model_type` is `model_type`.

    An architecture that has no description is described by inspection (`unipelt.describe`) when a model is injected;
    what is registered here comes first, also for a type of Transformers.

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
        ValueError: the name was registered with another description, or the description cannot be meant.
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
    """The description of a model: registered, of the table, or else found by inspection, which is logged.

    A description found by inspection is kept for the model's type, where that had none.

    Raises:
        DescribeError: there is none, and inspection did not find one; the message says what it did not find.
    """
    kind = model.config.model_type
    known = FAMILIES.get(kind)
    if known is not None and (is_registered(kind) or _fits(model, known)):
        return known
    try:
        found = describe(model)
    except DescribeError as error:
        if known is not None:
            return known  # whose paths then say what is missing
        raise DescribeError(describe_unknown(kind, str(error))) from error
    logger.warning(
        f"there is no description of {kind!r} models in the table; {type(model).__name__} was described by inspection "
        f"(layers at {', '.join(stack.layers for stack in found.stacks)})"
    )
    if known is None:
        FAMILIES[kind] = found
    return found


def is_registered(model_type: str) -> bool:
    """Whether the description of a type is a caller's own."""
    return model_type in FAMILIES and FAMILIES[model_type] is _registered.get(model_type)


SWITCHES = ("use_bidirectional_attention",)
"""Settings that are off in every default configuration, and that change what the table says where they are on."""


def _fits(model: PreTrainedModel, family: Family) -> bool:
    """Whether a model has a layer as described in at least one stack, and no stack that is there without one."""
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
    """The layers at `path`, whose stars stand for every item of a list; none if there is no such place."""
    first, starred, rest = path.partition(".*")
    try:
        items = base.get_submodule(first)
    except AttributeError:
        return
    for item in items._modules.values():  # children() would leave out a layer that is there twice
        assert item is not None
        if starred:
            yield from layers_at(item, rest.removeprefix("."))
        else:
            yield item


def is_complete(layer: nn.Module, stack: Stack) -> bool:
    """Whether a layer has the attention of its stack's description; in a hybrid model some layers have another."""
    attention = stack.attention
    paths = [f"{attention.path}.{attention.query}", f"{attention.path}.{attention.value}", stack.norm or stack.output]
    return all(has(layer, path) for path in paths)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a module at a path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def describe_unknown(model_type: str, reason: str) -> str:
    """What to tell the owner of a model that has no description and of which inspection found none."""
    return (
        f"there is no description of {model_type!r} models, and inspection did not find one: {reason}. "
        "Describe them by where their parts are: "
        f'unipelt.register_family("{model_type}", unipelt.Stack("layers", unipelt.Attention("self_attn", "q_proj", '
        '"v_proj"), output="mlp", causal=True)); help(unipelt.register_family) says more'
    )


def _changed(
    family: Family, *, refused: Mapping[str, str] | None = None, attention: Mapping[str, Any] | None = None
) -> Family:
    """A family whose attention, and what it refuses, are other than inspection finds."""
    stacks = tuple(replace(stack, attention=replace(stack.attention, **(attention or {}))) for stack in family.stacks)
    return Family(stacks, family.refused if refused is None else refused)


def _t5_like(family: Family) -> Family:
    """With the names of the first projections in models whose feed-forward network has a gate, and in those without."""
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
    # whether keys are shared by several heads, and by how many, is up to the configuration
    "falcon": partial(_changed, attention={"fused": "groups"}),
    "gpt_bigcode": partial(_changed, attention={"fused": "groups"}),
    # it computes its own softmax, but knows positions only from a bias that it is given: its text can be made longer
    "mpnet": partial(_changed, attention={"bias": "position_bias"}, refused={}),
}
"""What inspection does not find, or finds otherwise for the default configuration than for others."""

FAMILIES: dict[str, Family] = {
    kind: EXCEPTIONS[kind](family) if kind in EXCEPTIONS else family for kind, family in read_table().items()
}
"""By `config.model_type`."""

_registered: dict[str, Family] = {}
