"""The manifest's entry on the base, and the first difference between tensors and their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained

import unipelt
from unipelt.checkpoint.load import mismatch
from unipelt.checkpoint.manifest import MANIFEST


@pytest.mark.parametrize(
    ("place", "given", "name", "revision"),
    [
        ("", {}, "", None),
        ("/gone/base", {}, "/gone/base", None),  # a folder that is no longer there is not looked for in a cache
        ("google/tiny", {"base_revision": "v2"}, "google/tiny", "v2"),
        ("/gone/base", {"base": "google/tiny"}, "google/tiny", None),
        ("/gone/base", {"base": "google/tiny", "base_revision": "v2"}, "google/tiny", "v2"),
    ],
)
def test_where_the_base_is(tmp_path: Path, place: str, given: dict[str, Any], name: str, revision: str | None) -> None:
    model = trained("lora")
    model.config._name_or_path = place
    unipelt.save(model, tmp_path / "new" / "folder", **given)
    base = json.loads((tmp_path / "new" / "folder" / MANIFEST).read_text())["base"]
    assert (base["name_or_path"], base["revision"]) == (name, revision)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, None),
        ({"a": None}, "it lacks 'a'"),
        ({"a": None, "b": None}, "it lacks 'a' and 1 more"),
        ({"x": torch.zeros(1)}, "the model has no 'x'"),
        ({"x": torch.zeros(1), "y": torch.zeros(1), "z": torch.zeros(1)}, "the model has no 'x' and 2 more"),
        ({"a": torch.zeros(3)}, "a is (3,) there and (2, 3) here"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, "a holds torch.int32, not floating-point numbers"),
        ({"b": torch.zeros(4)}, "b holds torch.float32, not whole numbers"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "b is (1,) there and (4,) here"),  # the model's order
    ],
)
def test_the_first_difference_is_told(tensors: dict[str, Any], message: str | None) -> None:
    places = {"b": torch.zeros(4, dtype=torch.int64), "a": torch.zeros(2, 3)}
    given = {name: tensor for name, tensor in {**places, **tensors}.items() if tensor is not None}
    assert mismatch(places, given) == message
    if message is None or message.startswith("the model has no"):
        assert mismatch(places, given, also=False) is None
