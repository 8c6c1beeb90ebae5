"""The same settings give the same numbers, to the bit, on one machine, whatever surrounds the run.

The model is wide enough that another number of threads gives other bits (`docs/reproducibility.md`); narrower ones
cannot fail these tests.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_task import SMALL_BERT, make_quick, quick, write_glue
from transformers import BertConfig, BertModel

from unipelt.cli import main
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.runs.compare import compare
from unipelt.runs.folder import MODEL

pytestmark = pytest.mark.usefixtures("alone")

TESTS = Path(__file__).parents[1]
FIRST: dict[str, Any] = {"seed": 1}
SECOND: dict[str, Any] = {"seed": 2, "method": "unipelt-al", "data_seed": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model with dropout, data, and in `first` and `second` a run each."""
    folder = make_quick(tmp_path_factory.mktemp("home"))
    torch.manual_seed(0)
    wide = {"hidden_size": 128, "intermediate_size": 256, "hidden_dropout_prob": 0.1}
    BertModel(BertConfig(**{**SMALL_BERT.to_dict(), **wide})).save_pretrained(folder / "model")
    for name, changes in (("first", FIRST), ("second", SECOND)):
        run(settings(folder, folder / name, **changes), log=quiet)
    return folder


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    method = {"preset": "unipelt-apl", "prefix": {"hidden": 32}}
    return RunSettings(**quick(home, output_dir=str(out), **{"batch_size": 24, "method": method, **changes}))


def quiet(line: str) -> None:
    pass


def check_same(one: Path, other: Path) -> None:
    """Every number of the record, and every bit of the weights."""
    records = read_result(one), read_result(other)
    found = compare(*records, weights=(one / MODEL / "model.safetensors", other / MODEL / "model.safetensors"))
    assert found["differences"] == []
    assert found["weights"] is True
    assert records[0]["digest"] == records[1]["digest"]


def test_another_seed_gives_other_numbers(home: Path, tmp_path: Path) -> None:
    """Or nothing below would say anything: order, initialisation and dropout are each other ones."""
    run(settings(home, tmp_path / "run", seed=3, data_seed=1), log=quiet)
    found = compare(read_result(home / "first"), read_result(tmp_path / "run"))
    assert {"evaluations[0].loss", "evaluations[0].train_loss", "test.loss"} <= {
        item["what"] for item in found["differences"]
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_the_number_of_loader_workers(home: Path, tmp_path: Path, workers: int) -> None:
    run(settings(home, tmp_path / "run", num_workers=workers, **FIRST), log=quiet)
    check_same(home / "first", tmp_path / "run")


def test_whatever_ran_before_in_the_process(home: Path, tmp_path: Path) -> None:
    run(settings(home, tmp_path / "second", **SECOND), log=quiet)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    torch.rand(7)
    run(settings(home, tmp_path / "deep" / "er" / "first", **FIRST), log=quiet)
    check_same(home / "first", tmp_path / "deep" / "er" / "first")
    check_same(home / "second", tmp_path / "second")


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_or_not(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Interrupted right after an epoch's checkpoint; the kills are in `test_run.py`."""
    from unipelt.runs import folder as place

    mark = place.mark

    def interrupt(*args: Any, **options: Any) -> None:
        mark(*args, **options)
        if args[1] == epoch * 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, "mark", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(settings(home, tmp_path / "run", **FIRST), log=quiet)
    lines: list[str] = []
    run(settings(home, tmp_path / "run", **FIRST), log=lines.append)
    assert any(line.startswith("going on from") for line in lines)
    check_same(home / "first", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("surroundings", "changes"),
    [
        ({"PYTHONHASHSEED": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo"}, {}),
        (
            {"PYTHONHASHSEED": "4711", "LC_ALL": "C.UTF-8", "MKL_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
            {"num_workers": 1},
        ),
    ],
    ids=["one", "other"],
)
def test_whatever_the_environment(
    home: Path, tmp_path: Path, surroundings: dict[str, str], changes: dict[str, Any]
) -> None:
    """The process's hash seed, locale, time zone, current folder, thread variables, and which run comes first."""
    in_own_process(
        tmp_path,
        surroundings,
        settings(home, tmp_path / "second", **SECOND, **changes),
        settings(home, tmp_path / "first", **FIRST, **changes),
    )
    check_same(home / "first", tmp_path / "first")
    check_same(home / "second", tmp_path / "second")


@pytest.mark.slow
def test_threads_are_those_of_the_settings(home: Path, tmp_path: Path) -> None:
    """With two, too, whatever the variable says."""
    for variable in ("1", "2"):
        one = settings(home, tmp_path / variable, threads=2, **FIRST)
        in_own_process(tmp_path, {"OMP_NUM_THREADS": variable}, one)
        assert read_result(tmp_path / variable)["hardware"]["threads"] == 2
    check_same(tmp_path / "1", tmp_path / "2")


def in_own_process(folder: Path, surroundings: dict[str, str], *runs: RunSettings) -> None:
    files = [folder / f"{index}.json" for index in range(len(runs))]
    for file, one in zip(files, runs, strict=True):
        file.write_text(json.dumps(one.to_dict()))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "OMP_"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", **surroundings}
    command = [sys.executable, str(TESTS / "scripts" / "repeat.py"), *map(str, files)]
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_the_number_of_sweep_workers(home: Path, tmp_path: Path, workers: int) -> None:
    """`threads` is in the file, as it must be: otherwise each worker's share of the cores is what a run gets."""
    values = {**quick(home), "glue_dir": str(write_glue(tmp_path / "glue")), "batch_size": 24, "method": "unipelt-al"}
    for name in ("train_file", "dev_file", "output_dir"):
        del values[name]
    grid = {**values, "train_samples": 24, "grid": [{"task": ["rte"], "seed": [1, 2]}]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "grid.json"), "--out", str(out), "--workers", str(workers)]) == 0
    for seed in (1, 2):
        chosen = {**values, "train_samples": 24, "task": "rte", "seed": seed, "output_dir": str(tmp_path / str(seed))}
        run(RunSettings(**chosen), log=quiet)
        (folder,) = out.glob(f"*seed={seed}-*")
        check_same(tmp_path / str(seed), folder)


def test_batches_of_evaluation_change_roundings_only(home: Path, tmp_path: Path) -> None:
    """And nothing of what is trained."""
    expected = read_result(home / "first")
    for tokens in (0, 64):
        record = run(settings(home, tmp_path / str(tokens), eval_tokens=tokens, **FIRST), log=quiet)
        assert compare(expected, record, tolerance=1e-5)["equal"]
        assert [item["train_loss"] for item in record["evaluations"]] == [
            item["train_loss"] for item in expected["evaluations"]
        ]
        weights = (folder / MODEL / "model.safetensors" for folder in (home / "first", tmp_path / str(tokens)))
        first, second = (file.read_bytes() for file in weights)
        assert first == second
