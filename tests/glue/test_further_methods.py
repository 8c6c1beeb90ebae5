"""Whole runs of LayerNorm tuning, ReFT and flat prefixes, by themselves and in a pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import make_quick, quick

import unipelt
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.report.cells import kinds

METHOD: dict[str, Any] = {
    "preset": "reft",
    "reft": {"gate": True, "rank": 2, "first": 1, "last": 1},
    "ln_tuning": {"gate": False},
    "prefix": {"length": 2, "reparameterize": False, "softmax": "own", "start": "zero"},
}


def test_a_run_of_all_three_is_the_run_in_a_pack(tmp_path: Path) -> None:
    home = make_quick(tmp_path / "home")
    described = home / "model" / "config.json"  # with dropout a pack would draw other numbers
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    described.write_text(json.dumps({**json.loads(described.read_text()), **dropouts}))
    options = {"method": METHOD, "epochs": 1}
    alone, packed = (
        RunSettings(**quick(home, output_dir=str(tmp_path / name), **options)) for name in ("alone", "packed")
    )
    record = run(alone, lambda line: None)
    layers, width = 2, 16
    assert record["parameters"]["submodules"] == {
        "reft": layers * (2 * 2 * width + 2),
        "ln_tuning": layers * 2 * 2 * width,
        "prefix": layers * 2 * 2 * width,
    }
    assert kinds(record["method"]["config"]) == ["prefix", "ln_tuning", "reft"]
    assert set(record["gates"]["values"]) == {"reft_layer", "prefix"}
    other: Any = run_packed([packed], places=1, log=lambda line: None)[str(tmp_path / "packed")]
    assert other["test"]["loss"] == pytest.approx(record["test"]["loss"])
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("packed", "alone"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    assert unipelt.parameter_counts(unipelt.from_pretrained(tmp_path / "alone" / "model")).head > 0
