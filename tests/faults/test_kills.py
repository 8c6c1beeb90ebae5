"""Saves, runs and sweeps are killed at random moments, again and again, and end as if nobody had disturbed them.

Bit for bit, but for runs in packs, whose rounding depends on their company.

`UNIPELT_KILL_SEED` chooses the moments, as far as the machine keeps its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
LEAST = {"saves": 30, "runs": 12, "sweeps": 7, "sweeps_in_packs": 7}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, seed = tmp_path_factory.mktemp("kills"), os.environ.get("UNIPELT_KILL_SEED", "1")
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "scripts" / "kills.py"), str(folder), seed, *LEAST]
    subprocess.run(command, check=True, env={**environment, "TOKENIZERS_PARALLELISM": "false"}, timeout=1200)
    return {"seed": seed, **json.loads((folder / "report.json").read_text())}


@pytest.mark.parametrize("scenario", LEAST)
def test_killed_at_random(report: dict[str, Any], scenario: str) -> None:
    found = report[scenario]
    print(f"seed {report['seed']}: {found['kills']} killed")
    assert found["problem"] is None, f"seed {report['seed']}: {found['problem']}"
    assert found["kills"] >= LEAST[scenario]


def test_fifty_were_killed(report: dict[str, Any]) -> None:
    kills = sum(report[scenario]["kills"] for scenario in LEAST)
    print(f"seed {report['seed']}: {kills} killed in all")
    assert kills >= 50
