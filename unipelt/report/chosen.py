"""Names and values of runs whose method has fields that a sweep chooses, such as `method.lora.rank`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unipelt.config.schema import flatten
from unipelt.report.cells import Run

_HEAD = "method."


def without_chosen(method: str, choose: Sequence[str]) -> str:
    """Return a method's name without the fields that are chosen: `lora, lora.rank=4` becomes `lora`.

    Args:
        method: the name of the method.
        choose: the settings whose values are candidates.
    """
    chosen = tuple(f"{name.removeprefix(_HEAD)}=" for name in choose if name.startswith(_HEAD))
    preset, *changes = re.split(r", (?=[\w.]+=)", method)
    return ", ".join([preset, *(change for change in changes if not change.startswith(chosen))])


def variant_of(run: Run, choose: Sequence[str]) -> Mapping[str, Any]:
    """Return the variant of a run (`Run.variant`) in which each chosen field of the method is a value of its own."""
    inside = [name.removeprefix(_HEAD) for name in choose if name.startswith(_HEAD)]
    if not inside:
        return run.variant
    flat = flatten(run.config)
    rest = json.dumps({name: value for name, value in flat.items() if name not in inside}, sort_keys=True)
    chosen = {f"{_HEAD}{name}": flat.get(name) for name in inside}
    return {**run.variant, **chosen, "method_config": hashlib.sha256(rest.encode()).hexdigest()[:8]}
