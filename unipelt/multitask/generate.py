"""Generation for a batch whose rows belong to several tasks: one generation of the shared base, with one cache.

The cache holds keys and values of the texts alone, since a prefix enters behind it. So one cache serves the rows of all
tasks. `generate` of Transformers repeats each row for its beams, and the copies stay side by side, as `SetRows` needs.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from unipelt.hosts.locate import InjectionError
from unipelt.submodules.forward_pass import Passes, SetRows

NOT_MIXED = ("past_key_values", "cache", "encoder_outputs", "assistant_model", "prompt_lookup_num_tokens", "streamer")
"""Arguments of `generate` that hold something of the rows, in their order, or that take a single row."""


def generate(model: PreTrainedModel, **batch: Any) -> Tensor:
    """Return the tokens that one task's model generates. Raises `InjectionError` for a model that cannot generate."""
    function: Any = getattr(model, "generate", None)
    if function is None or not model.can_generate():
        raise InjectionError(f"{type(model).__name__} cannot generate text; take a class with a language model's head")
    found: Tensor = function(**batch)
    return found


def check_generation(base: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an argument of `generate` that is not possible for several tasks."""
    for name in NOT_MIXED:
        if batch.get(name) is not None:
            raise ValueError(f"a generation for several tasks takes no {name}; run one task at a time, tasks[name]")
    config = batch.get("generation_config") or getattr(base, "generation_config", None)
    for name in ("return_dict_in_generate", "cache_implementation"):
        value = batch.get(name, getattr(config, name, None))
        if value and value not in ("dynamic", "dynamic_full"):
            raise ValueError(f"a generation for several tasks takes no {name}={value!r}; leave it out")


def generate_rows(
    shared: Any, passes: Passes, counts: Mapping[str, int], batch: Mapping[str, Any], back: Tensor | None
) -> Tensor:
    """Return the tokens of a sorted batch, in the order of the batch that was given.

    Args:
        shared: the base with the sets of all tasks.
        passes: its passes.
        counts: the number of rows of each task, in the order of the sorted batch.
        batch: the arguments of `generate`, sorted by task.
        back: (B,), the index that restores the order; None if the order did not change.
    """
    with passes.rows(SetRows(tuple(counts), tuple(counts.values()))):
        found = generate(shared, **batch)
    if back is None:
        return found
    return found.unflatten(0, (sum(counts.values()), -1)).index_select(0, back.to(found.device)).flatten(0, 1)
