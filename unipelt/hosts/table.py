"""The table of families, `table.json`, which `python -m unipelt.hosts.generate` writes.

A family is stored as a dictionary of its fields, without fields at their default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipelt.hosts.description import Attention, Family, Stack

TABLE = Path(__file__).with_name("table.json")


def to_data(family: Family) -> dict[str, Any]:
    """Convert a family to data for JSON."""
    data: dict[str, Any] = {"stacks": [_fields(stack) for stack in family.stacks]}
    if family.refused:
        data["refused"] = dict(family.refused)
    return data


def from_data(data: Mapping[str, Any]) -> Family:
    """Build a family from the data that `to_data` returns."""
    stacks = []
    for given in data["stacks"]:
        cross = given.get("cross")
        stacks.append(
            Stack(
                **{
                    **given,
                    "attention": Attention(**given["attention"]),
                    "cross": None if cross is None else Attention(**cross),
                }
            )
        )
    return Family(tuple(stacks), dict(data.get("refused", {})))


def read_table() -> dict[str, Family]:
    """Read every family of the table, by `model_type`."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: from_data(family) for name, family in data["families"].items()}


def _fields(described: Any) -> dict[str, Any]:
    data = {}
    for field in dataclasses.fields(described):
        value = getattr(described, field.name)
        if value == field.default or (field.default_factory is not dataclasses.MISSING and not value):
            continue
        data[field.name] = _fields(value) if isinstance(value, Attention) else value
    return data
