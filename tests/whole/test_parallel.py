"""Every architecture in two processes: DistributedDataParallel and FSDP2 against one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from scripts.families_parallel import CHECKPOINTED, PROCESSES
from tiny import FAMILIES, WITH_PREFIX

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found, of the families whose tests were chosen: one start for all of them."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = dict.fromkeys(spec.params["family"] for spec in chosen if spec is not None)
    folder = tmp_path_factory.mktemp("parallel")
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(TESTS / "scripts" / "families_parallel.py"), str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False
    )
    files = [folder / f"results-{rank}.json" for rank in range(PROCESSES)]
    print(process.stdout)
    return [json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for file in files]


def check(results: list[dict[str, Any]], family: str, way: str) -> None:
    for rank, found in enumerate(results):
        assert f"{family} {way}" in found, f"process {rank} did not come so far"
        one = found[f"{family} {way}"]
        assert "error" not in one, one["error"]
        assert {name: value for name, value in one.items() if isinstance(value, list) and value} == {}
        assert one["sharded"] == (0 if way == "ddp" else one["parameters"])
        assert one["prefix"] == (family in WITH_PREFIX)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_make_the_step_of_one(results: list[dict[str, Any]], family: str, way: str) -> None:
    """The same gradients and parameters, none for what is frozen, and both processes end with the same."""
    check(results, family, way)


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_fsdp2_with_gradient_checkpointing_makes_the_step_of_one(results: list[dict[str, Any]], family: str) -> None:
    check(results, family, "fsdp2 checkpointed")


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_a_sharded_model_is_saved_from_its_gathered_state(results: list[dict[str, Any]], family: str) -> None:
    """By one process, whole and deployed; without a gathered state it is refused."""
    assert all("error" not in found[f"{family} save"] for found in results), results[0][f"{family} save"]["error"]
    found = results[0][f"{family} save"]
    assert found["other parameters"] == []
    assert found["logits apart when deployed"] < 1e-5
    assert hasattr(transformers, found["class"]), "from_pretrained finds the class by this name"
    assert "each process holds only a part of" in found["refusal"]


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_fsdp2_shards_a_peft_model_and_saves_it(results: list[dict[str, Any]], family: str) -> None:
    pytest.importorskip("peft", minversion="0.21")
    check(results, family, "fsdp2 of peft")
    assert "error" not in results[0][f"{family} save of peft"], results[0][f"{family} save of peft"]["error"]
    assert results[0][f"{family} save of peft"]["other parameters"] == []
