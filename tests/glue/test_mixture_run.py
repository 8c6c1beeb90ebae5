"""Runs of methods with mixtures: alone, in a pack, and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_quick, quick

import unipelt
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.report import kinds

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]


def quiet(line: str) -> None:
    """No line."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv, dev.tsv and a model without dropout."""
    return make_quick(tmp_path_factory.mktemp("home"), dropout=False)


def settings(home: Path, out: Path, kind: str, **mixture: Any) -> RunSettings:
    method = {"preset": kind, kind: {"mixture": {"experts": 3, **mixture}}}
    return RunSettings(**quick(home, output_dir=str(out), method=method, epochs=1))


def test_a_run_with_a_load_balancing_loss(home: Path, tmp_path: Path) -> None:
    plain = run(settings(home, tmp_path / "plain", "lora", top_k=2), quiet)
    found = run(settings(home, tmp_path / "balanced", "lora", top_k=2, balance=0.5), quiet)
    assert kinds(found["method"]["config"]) == ["lora-mixture"]
    assert 'lora.mixture.router="token"' in found["method"]["name"]
    assert found["evaluations"][0]["train_loss"] > plain["evaluations"][0]["train_loss"] + 0.4
    assert abs(found["dev"]["loss"] - plain["dev"]["loss"]) < 0.3, "evaluation has no such loss"
    model = unipelt.from_pretrained(tmp_path / "balanced" / "model")
    assert unipelt.parameter_counts(model).trained == found["parameters"]["trained"]


@pytest.mark.parametrize(("kind", "router"), [("lora", "token"), ("adapter", "example"), ("adapter", "random")])
def test_a_run_in_a_pack(home: Path, tmp_path: Path, kind: str, router: str) -> None:
    packed = settings(home, tmp_path / "packed", kind, router=router)
    found = run_packed([packed], places=1, log=quiet)[str(tmp_path / "packed")]
    assert isinstance(found, dict), found
    alone = run(settings(home, tmp_path / "alone", kind, router=router), quiet)
    assert found["digest"] == alone["digest"]
    if router != "random":  # a pack draws other random numbers, as it does for dropout
        assert found["dev"]["loss"] == pytest.approx(alone["dev"]["loss"], rel=1e-4)
    model = unipelt.from_pretrained(tmp_path / "packed" / "model")
    assert unipelt.parameter_counts(model).trained == alone["parameters"]["trained"]
