"""What writes files is killed before each of its operations on files: nothing half-written is taken for a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
# by scenario of the script, the least number of operations on files that there must be
QUICK = {"a_first_save": 12, "a_save": 60, "a_record": 6, "a_sweep": 40}
LONG = {"a_run": 60, "a_run_over_another": 40}


def report(folder: Path, names: list[str]) -> dict[str, Any]:
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "scripts" / "crashes.py"), str(folder), *names]
    subprocess.run(command, check=True, env={**environment, "TOKENIZERS_PARALLELISM": "false"}, timeout=900)
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report(tmp_path_factory.mktemp("crashes"), list(QUICK))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report(tmp_path_factory.mktemp("crashes"), list(LONG))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", QUICK)
def test_killed_at_every_operation(quick: dict[str, Any], scenario: str) -> None:
    check(quick[scenario], QUICK[scenario])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", LONG)
def test_run_killed_at_every_operation(long: dict[str, Any], scenario: str) -> None:
    check(long[scenario], LONG[scenario])


def check(found: dict[str, Any], least: int) -> None:
    print(f"{found['kills']} killed")
    assert found["problem"] is None, found["problem"]
    assert found["kills"] >= least
