"""The load-balancing loss of mixtures: the hooks of a model that add the loss of its routers to its own loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from unipelt.config.methods import UniPELTConfig
from unipelt.injection.hooks import hook, put
from unipelt.submodules.room import rooms


def balances(config: UniPELTConfig) -> bool:
    """Return whether a mixture of the configuration has a load-balancing loss."""
    parts = (config.adapter, config.lora, *config.more)
    return any(part is not None and part.mixture is not None and part.mixture.balance for part in parts)


def add_balance(model: PreTrainedModel) -> None:
    """Put the hooks on a model that add the load-balancing loss to its loss."""
    put(model, collect_losses)
    put(model, add_losses)


@hook("enter")
def collect_losses(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin the collection of the losses of a pass, in each stack."""
    if model.training:
        for passes in {room.passes for _, room in rooms(model)}:
            passes.collect_losses()


@hook("leave")
def add_losses(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Add the mean of the collected losses to the loss of the output, in training mode; after a failure, drop them.

    Raises:
        RuntimeError: the output is a tuple, or the losses have no gradient.
    """
    if not model.training:
        return
    found = [loss for passes in {room.passes for _, room in rooms(model)} for loss in passes.take_losses()]
    if isinstance(output, tuple):
        raise RuntimeError("a mixture with balance adds to the loss of a model's output; leave return_dict=False out")
    if not found or getattr(output, "loss", None) is None:
        return
    if output.loss.requires_grad and not all(loss.requires_grad for loss in found):
        raise RuntimeError(
            "the load-balancing loss has no gradient under gradient checkpointing with use_reentrant=True; switch that "
            "on with use_reentrant=False"
        )
    output.loss = output.loss + torch.stack(found).mean().to(output.loss)
