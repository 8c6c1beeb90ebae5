"""Read a folder of runs: the records that can be averaged, and the name and reason of all files that cannot."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipelt.files.messages import show_path
from unipelt.records.record import RESULT, ResultError, read_result
from unipelt.report.cells import Run
from unipelt.report.chosen import without_chosen
from unipelt.report.results import Results
from unipelt.sweep import FAILURE, REQUEST, SweepError, read_failure, read_request


class ReportError(ValueError):
    """A folder has no results for a report. The message says why."""


def read_results(folder: str | Path) -> Results:
    """Read `folder/result.json`, every `folder/*/result.json`, and the sweep's plan if there is one.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # a name that is too long gives False here, and an error from `Path.is_dir`
        raise FileNotFoundError(f"there is no folder at {show_path(folder)}")
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    paths = [path for path in (folder / RESULT, *sorted(folder.glob(f"*/{RESULT}"))) if path.exists()]
    first: dict[Any, str] = {}
    for path in paths:
        name = str(path.relative_to(folder))
        try:
            record = read_result(path)
        except (ResultError, OSError) as error:
            left_out.append((name, str(error).replace(str(path), "it", 1)))
            continue
        run = Run(path.parent.name if path.parent != folder else ".", record)
        problem = _problem(record)
        if problem is None:
            # `same` finds the same run from another machine, where the data have another path
            same = (run.task, run.k, run.method, run.seed, json.dumps(run.variant, sort_keys=True))
            other = first.setdefault(record["digest"], name), first.setdefault(same, name)
            problem = next((f"it is the same run as {seen}" for seen in other if seen != name), None)
        if problem is not None:
            left_out.append((name, problem))
            continue
        runs.append(run)

    done = {path.parent for path in paths}
    failed = sorted({path.parent for path in folder.glob(f"*/{FAILURE}")} - done)
    failures = tuple((path.name, _error(path)) for path in failed)
    try:
        request = read_request(folder)
    except SweepError as error:
        left_out.append((REQUEST, str(error).replace(str(folder / REQUEST), "it", 1)))
        request = None
    if request is None:
        return Results(tuple(runs), tuple(left_out), failures)
    digests = {run.record["digest"] for run in runs}
    known = {run.name for run in runs} | {name for name, _ in failures}
    seeds: dict[tuple[str, int | None, str], set[tuple[int, int]]] = defaultdict(set)
    for planned in request["runs"]:
        settings = planned["settings"]
        if settings["task"] is not None:
            key = settings["task"], settings["train_samples"], without_chosen(planned["method"], request["chosen"])
            seeds[key].add((settings["seed"], settings["data_seed"]))
    return Results(
        runs=tuple(runs),
        left_out=tuple(left_out),
        failures=failures,
        absent=tuple(
            planned["folder"]
            for planned in request["runs"]
            if planned["digest"] not in digests and planned["folder"] not in known
        ),
        seeds={key: frozenset(value) for key, value in seeds.items()},
        choose=tuple(request["chosen"]),
        plan=request["sweep"],
    )


def _problem(record: Mapping[str, Any]) -> str | None:
    """Return why a complete record cannot be averaged, or None."""
    if record["status"] != "finished":
        return f"its status is {record['status']!r}"
    k = record["settings"].get("train_samples")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        return f"settings.train_samples is {k!r:.60}"
    primary = record["task"]["primary"]
    scores = [(part, record[part]["metrics"].get(primary)) for part in ("dev", "test")]
    scores += [(f"evaluations[{i}]", item["metrics"].get(primary)) for i, item in enumerate(record["evaluations"])]
    tests = record.get("tests", {})
    if not isinstance(tests, Mapping) or not all(_has_metrics(found) for found in tests.values()):
        return "its tests are not losses and metrics by name"
    scores += [(f"tests.{name}", found["metrics"].get(primary)) for name, found in tests.items()]
    for where, score in scores:
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not -1 <= score <= 1:  # NaN fails this test too
            return f"{where}.metrics.{primary} is {score!r:.60}, not a fraction"
    times = [record["seconds"][name] for name in ("train", "evaluation", "total")]
    if min(times) < 0:
        return f"its seconds are {times}"
    gates = record["gates"]
    if gates is not None and not _are_gates(gates):
        return "its gates are not layers by submodules"
    return None


def _has_metrics(found: Any) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get("metrics"), Mapping)


def _are_gates(gates: Mapping[str, Any]) -> bool:
    values = gates.get("values")
    if not isinstance(values, Mapping) or not values or not isinstance(gates.get("layers"), list):
        return False
    means = [item.get("mean") if isinstance(item, Mapping) else None for item in values.values()]
    return all(
        isinstance(mean, list) and mean and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in mean)
        for mean in means
    )


def _error(folder: Path) -> str:
    """Return why the run in a folder failed, or why the reason cannot be read."""
    try:
        failure = read_failure(folder)
        error = failure["error"] if failure else f"{folder / FAILURE} has just gone"
    except SweepError as unread:
        error = str(unread)
    return error.replace(str(folder / FAILURE), FAILURE, 1)
