"""Runs of PEFT's tuners: each is trained, and the weights of its best epoch are read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft_tuners import OPTIONS, working_types
from tiny_task import save_model, write_glue

from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings

FIT = {"ROAD": {"group_size": 4}, "FOURIERFT": {"n_frequency": 20}}
"""Options that fit the model of these tests, which is 16 wide."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft-runs")
    save_model(folder / "model")
    write_glue(folder / "glue")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # of BOFT
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # of FRoD and SHiRA
@pytest.mark.parametrize("kind", working_types())
def test_a_run_of_each_type(kind: str, home: Path, tmp_path: Path) -> None:
    method: dict[str, Any] = {"preset": "lora", "lora": None}
    method["peft"] = {"type": kind, **OPTIONS.get(kind, {}), **FIT.get(kind, {})}
    settings = RunSettings(
        task="sst2",
        glue_dir=str(home / "glue"),
        model=str(home / "model"),
        train_samples=32,
        dev_samples=16,
        method=method,
        learning_rate=1e-3,
        epochs=2,
        max_length=16,
        device="cpu",
        threads=1,
        output_dir=str(tmp_path / "out"),
    )
    record = run(settings, log=lambda line: None)
    assert record["status"] == "finished"
    assert record["method"]["config"] == json.loads(json.dumps(settings.config.to_dict()))
    assert record["parameters"]["submodules"]
