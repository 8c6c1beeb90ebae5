"""A run, and a pack of runs, of a method with a tuner of PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import make_quick, quick

import unipelt
from unipelt.glue.pack_runs import pack_key, run_packed
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.report import read_results
from unipelt.submodules.room import own_buffers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]
METHOD: dict[str, Any] = {"preset": "lora", "peft": {"type": "VERA", "r": 8}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model without dropout, because a pack draws other random numbers."""
    return make_quick(tmp_path_factory.mktemp("home"), dropout=False)


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, output_dir=str(out), method=METHOD, **changes))


def quiet(line: str) -> None:
    """No line."""


def test_a_run_leaves_a_record_and_a_model(home: Path, tmp_path: Path) -> None:
    record = run(settings(home, tmp_path / "run", rates={"peft_vera": 0.02}), quiet)
    assert record["method"]["config"]["peft"] == METHOD["peft"]
    assert set(record["gates"]["values"]) == {"peft_vera_query", "peft_vera_value"}
    model = unipelt.from_pretrained(tmp_path / "run" / "model")
    assert unipelt.parameter_counts(model).submodules["peft_vera"] == 2 * 2 * (16 + 8)
    assert read_results(tmp_path).cells[0].method.startswith('lora, peft.type="VERA"')


def test_runs_in_a_pack_end_as_by_themselves(home: Path, tmp_path: Path) -> None:
    alone = [run(settings(home, tmp_path / f"alone-{seed}", seed=seed), quiet) for seed in (1, 2)]
    runs = [settings(home, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    assert len({pack_key(one) for one in runs}) == 1
    packed = run_packed(runs, 2, quiet)
    for seed, record, expected in zip((1, 2), packed.values(), alone, strict=True):
        assert isinstance(record, dict), record
        assert record["test"]["metrics"] == expected["test"]["metrics"]
        ours, theirs = (unipelt.from_pretrained(tmp_path / name / "model") for name in (str(seed), f"alone-{seed}"))
        buffers = own_buffers(theirs)
        assert buffers
        assert all(torch.equal(tensor, buffers[name]) for name, tensor in own_buffers(ours).items())
        for one, other in zip(record["evaluations"], expected["evaluations"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
            assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
