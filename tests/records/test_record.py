"""The record of a run: written whole, read with care."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unipelt
from unipelt.records import record as result
from unipelt.records.record import Floor, ResultError, read_result, summary, write_result
from unipelt.runs import machine


def make_record() -> dict[str, Any]:
    evaluation = {"epoch": 1.0, "step": 7, "loss": 0.7, "train_loss": 0.71, "metrics": {"accuracy": 0.5}}
    better = {"epoch": 2.0, "step": 14, "loss": 0.6, "train_loss": 0.6, "metrics": {"accuracy": 0.571}}
    return {
        "format": 1,
        "status": "finished",
        "settings": {"train_samples": 100, "seed": 1, "data_seed": 1},
        "digest": "d" * 64,
        "method": {"name": "unipelt-apl", "config": {}, "learning_rate": 5e-4},
        "task": {
            "name": "rte",
            "columns": ["sentence1", "sentence2"],
            "labels": ["entailment", "not_entailment"],
            "metrics": ["accuracy"],
            "primary": "accuracy",
            "notes": [],
        },
        "evaluations": [evaluation, better, {**evaluation, "epoch": 3.0, "step": 21}],
        "best": {"epoch": 2.0, "step": 14},
        "dev": {"loss": 0.6, "metrics": {"accuracy": 0.571}},
        "test": {"loss": 0.65, "metrics": {"accuracy": 0.56}},
        "majority": 0.527,
        "seeds": {"run": 1, "data": 1},
        "data": {"train": {"rows": 100, "sha256": "a" * 64}},
        "model": {
            "name": "bert-base-uncased",
            "class": "BertForSequenceClassification",
            "sha256": None,
            "fingerprint": {},
        },
        "parameters": {"trained": 391000, "deployed": 180000, "head": 770, "base": 22713216},
        "gates": None,
        "seconds": {"train": 60.0, "evaluation": 15.0, "total": 81.2},
        "memory": {"rss_bytes": 10**9, "cuda_bytes": None},
        "hardware": {"cpu": "a processor"},
        "packages": {"torch": "2.6.0"},
        "code": {"commit": None, "dirty": None},
        "attempts": 1,
        "files": {"model": "model", "gates": None, "predictions": []},
    }


def test_written_and_read(tmp_path: Path) -> None:
    record = make_record()
    path = write_result(record, tmp_path)
    assert path == tmp_path / "result.json"
    assert read_result(tmp_path) == read_result(path) == record
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]


def test_only_what_may_be_true_or_false_is(tmp_path: Path) -> None:
    record = {**make_record(), "code": {"commit": "c" * 40, "dirty": True}}
    write_result(record, tmp_path)
    assert read_result(tmp_path)["code"]["dirty"] is True
    record["code"] = {"commit": True, "dirty": True}
    with pytest.raises(ResultError, match=r"is not a whole result: code\.commit is True$"):
        write_result(record, tmp_path)


def test_summary_is_one_line() -> None:
    assert summary(make_record(), "runs/rte-apl/result.json") == (
        "rte · unipelt-apl · K=100 · seed 1: accuracy 0.560 (majority 0.527) · dev 0.571 at epoch 2 of 3 · 81 s · "
        "trained 391,000 (deployed 180,000) + head 770 -> runs/rte-apl/result.json"
    )
    record = make_record()
    record["settings"] = {"train_samples": None, "seed": 1, "data_seed": 2}
    assert "rte · unipelt-apl · all data · seed 1, data seed 2: " in summary(record, "x")


@pytest.mark.parametrize(
    ("task", "majority", "floor"),
    [
        ({}, 0.473, Floor(0.527)),
        ({}, 0.527, Floor(0.527)),
        ({"labels": ["a", "b", "c"]}, 0.6, Floor(0.6)),
        ({"labels": ["a", "b", "c"]}, 0.4, Floor(0.4, "train set's majority", of_test=False)),
        ({"primary": "matthews_correlation"}, 0.0, Floor(0.0)),
        ({"primary": "f1"}, 0.8, Floor(0.8)),  # a share of 2/3
        ({"primary": "f1"}, 0.5, Floor(0.0)),  # a share of 1/3, so that the other class is more frequent
        ({"primary": "f1"}, 0.0, Floor(0.0, "train set's majority", of_test=False)),
        ({"primary": "spearman", "labels": []}, 0.0, Floor(None)),
    ],
)
def test_of_an_older_record_the_test_sets_majority_is_computed_where_it_can_be(
    task: dict[str, Any], majority: float, floor: Floor
) -> None:
    record = make_record()
    record |= {"majority": majority, "task": record["task"] | task}
    found = result.floor(record)
    assert (found.score, found.name, found.of_test) == (
        None if floor.score is None else pytest.approx(floor.score),
        floor.name,
        floor.of_test,
    )


def test_the_majority_of_a_record_in_its_summary() -> None:
    record = make_record() | {"majority": 0.4, "majority_of": "test"}
    assert "accuracy 0.560 (majority 0.400) ·" in summary(record, "x"), "as it is written"
    record = make_record() | {"majority": 0.1, "floor": "copying the text"}
    assert "accuracy 0.560 (copying the text 0.100) ·" in summary(record, "x")
    record = make_record()
    record |= {"majority": None, "task": record["task"] | {"labels": []}}
    assert "accuracy 0.560 · dev" in summary(record, "x"), "a regression has none"


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"average": {"taken": True}, "selected": {"removed": []}}, "with averaged weights of 3"),
        ({"average": {"taken": False}, "selected": None}, "at epoch 2 of 3"),
        ({"average": None, "selected": {"removed": ["lora", "prefix"]}}, "at epoch 2, without lora, prefix, of 3"),
        ({"average": {"taken": True}, "selected": {"removed": ["ia3"]}}, "with averaged weights, without ia3, of 3"),
    ],
)
def test_the_summary_says_which_weights_were_tested(further: dict[str, Any], words: str) -> None:
    assert f" · dev 0.571 {words} · 81 s · " in summary(make_record() | further, "x")


def parts(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every part that a record must have."""
    found = []
    for key, inner in value.items():
        found += [(*path, key), *(parts(inner, (*path, key)) if isinstance(inner, dict) else [])]
    return found


@pytest.mark.parametrize("path", parts(result._SHAPE), ids=".".join)
def test_every_part_is_needed_and_of_its_type(tmp_path: Path, path: tuple[str, ...]) -> None:
    for change in ("missing", "wrong"):
        record = copy.deepcopy(make_record())
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        if change == "missing":
            del inner[path[-1]]
        else:
            inner[path[-1]] = {1, 2}
        with pytest.raises(ResultError, match=r"result.json (is not|has the format)"):
            write_result(record, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": 5}, "result.json is not a whole result: digest is 5$"),
        ({"evaluations": []}, "evaluations is empty"),
        ({"evaluations": [{"epoch": 1.0, "step": 7, "loss": 0.7}]}, r"evaluations\[0\].metrics is missing"),
        ({"test": {"loss": 0.6, "metrics": {"f1": 0.5}}}, "test.metrics lacks accuracy"),
        ({"attempts": True}, "attempts is True"),
        ({"majority": float("nan")}, "majority is nan"),
        ({"majority": None}, "majority is None, which is for tasks without classes"),
        ({"attempts": 10**400}, "attempts is 1000"),
        ({"hardware": {"cores": float("nan")}}, "cannot be written as JSON"),
        ({"hardware": {"cpu": object()}}, "cannot be written as JSON"),
    ],
)
def test_what_makes_no_record(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ResultError, match=words):
        write_result({**make_record(), **change}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        (json.dumps(make_record())[:500], "is not valid JSON"),
        ("[1]", "is not the result of a run"),
        ('{"accuracy": 0.5}', "is not the result of a run"),
        (json.dumps({**make_record(), "format": 2}), "has the format 2, and this version reads 1; a newer one may"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_foreign_and_damaged_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ResultError, match=words) as caught:
        read_result(tmp_path)
    assert str(tmp_path / "result.json") in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="is not valid JSON"):
        read_result(tmp_path)


def test_no_result(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no result at"):
        read_result(tmp_path)


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_code_is_described_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = tmp_path / "unipelt" / "__init__.py"
    init.parent.mkdir()
    init.write_text("")
    monkeypatch.setattr(machine, "_HOME", init.parent)
    assert machine.describe_code() == {"commit": None, "dirty": None}, "outside git"
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "one")
    assert machine.describe_code() == {"commit": None, "dirty": None}, "installed into somebody else's repository"
    git(tmp_path, "add", "unipelt")
    git(tmp_path, "commit", "-q", "-m", "two")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert machine.describe_code() == {"commit": commit, "dirty": False}
    init.write_text("changed")
    assert machine.describe_code() == {"commit": commit, "dirty": True}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.describe_code() == {"commit": None, "dirty": None}


def test_packages_by_version() -> None:
    others = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "numpy")}
    assert machine.describe_packages() == {
        "python": platform.python_version(),
        "unipelt": unipelt.__version__,
        **others,
    }


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    packages = machine.describe_packages()
    assert packages["torch"]
    assert packages["no-such-package"] is None


def test_surroundings() -> None:
    hardware = machine.describe_hardware("cpu")
    assert set(hardware) == {"device", "cpu", "cores", "threads", "memory_bytes", "gpu", "system"}
    assert hardware["device"] == "cpu"
    assert hardware["cpu"]
    assert hardware["threads"] == torch.get_num_threads()
    assert hardware["memory_bytes"] > 2**28
    assert hardware["gpu"] is None
    assert hardware["system"].startswith(platform.system())
    memory = machine.peak_memory("cpu")
    assert memory["rss_bytes"] is not None
    assert 2**26 < memory["rss_bytes"] < hardware["memory_bytes"]
    assert memory["cuda_bytes"] is None


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5} if process == 0 else set(), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.describe_hardware("cpu")["cores"] == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.describe_hardware("cpu")["cores"] == 7


def test_a_gpu_has_a_name_and_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert machine.describe_hardware("cuda")["gpu"] == "a GPU"
    assert machine.peak_memory("cuda")["cuda_bytes"] == 7


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("linux", 1024)])
def test_systems_count_memory_in_their_own_unit(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert machine.peak_memory("cpu")["rss_bytes"] == 5 * unit


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    assert machine.peak_memory("cpu") == {"rss_bytes": None, "cuda_bytes": None}
    monkeypatch.setattr(os, "sysconf", _unknown, raising=False)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "nothing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    hardware = machine.describe_hardware("cpu")
    assert hardware["memory_bytes"] is None
    assert hardware["cpu"] == platform.machine()


def test_the_name_of_a_processor_need_not_be_utf8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"processor : 0\nmodel name\t: One\xae: 2 GHz \nmodel name\t: Two\n")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "cpuinfo")
    assert machine.describe_hardware("cpu")["cpu"] == "One\ufffd: 2 GHz"


def _unknown(name: str) -> int:
    raise ValueError(f"unrecognized configuration name {name}")
