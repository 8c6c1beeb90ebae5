"""A context in which an injected model computes as its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from unipelt.injection.state import injection_inside
from unipelt.submodules.room import rooms


@contextmanager
def disable(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Make a model compute as its base did before `inject`, inside the block: bit for bit, heads included.

        with unipelt.disable(model), torch.no_grad():
            reference = model(**batch).logits

    No set computes inside the block. Every pretrained parameter that trained, or that low-rank terms were merged into,
    has its former value. After the block, also after an exception, the model is as it was before the block. Only one
    thread may use the model, because the block changes the model itself and not a copy. Gradients of trained parameters
    must not be computed inside.

    Args:
        model: an injected model.

    Yields:
        The same model.

    Raises:
        ValueError: the model has no injection, or a parameter of its base has another shape now.
    """
    switch: Any = getattr(model, "disable_adapter", None)
    if switch is not None:  # a PeftModel has copies of its head, and this method switches them
        with switch():
            yield model
        return
    injection = injection_inside(model)
    parameters = dict(model.named_parameters())
    before = injection.before
    for name, value in before.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(
                f"the parameter {name!r} was {tuple(value.shape)} when submodules were added, and has another shape now"
            )
    active = [(room, room.active) for _, room in rooms(model)]
    values = {name: parameters[name].data for name in before}
    chunked: list[Any] = [module for module in model.modules() if "unipelt_chunk_size" in vars(module)]
    try:
        for room, _ in active:
            room.active = None
        for module in chunked:
            module.chunk_size_feed_forward = module.unipelt_chunk_size
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].data = value.to(parameters[name].device, copy=True)
        yield model
    finally:
        for name, data in values.items():
            parameters[name].data = data
        for room, before_name in active:
            room.active = before_name
        for module in chunked:
            module.chunk_size_feed_forward = 0
