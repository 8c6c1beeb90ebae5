"""The manifest's entry on the base: its location, its revision, and what a caller says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import trained

import unipelt
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
