"""A manifest's base and constants, and the first difference between tensors and their places."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained

import unipelt
from unipelt.checkpoint.load import mismatch
from unipelt.checkpoint.manifest import MANIFEST, read_checkpoint


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


def test_constants_of_gates_are_above_0_and_at_most_1(tmp_path: Path) -> None:
    unipelt.save(trained("lora"), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())

    def read(constant: object) -> Any:
        folded = {"bert.gates": {"adapter": constant}}
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "folded": folded}))
        return read_checkpoint(tmp_path)[0]["folded"]["bert.gates"]["adapter"]

    for good in (1, 1.0, 0.001, None):
        assert read(good) == good
    refused: list[object] = [0, 1.001, 2, -0.5, True, "0.5", []]
    for bad in refused:
        said = f"folded: 'adapter' at 'bert.gates' must be above 0 and at most 1, or null, not {bad!r}"
        with pytest.raises(unipelt.CheckpointError, match=re.escape(said)):
            read(bad)
