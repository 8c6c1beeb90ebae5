"""A folder of runs, read: the records that can be averaged, and by name and reason everything that cannot."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unipelt.glue.result import RESULT, ResultError, read_result
from unipelt.report.cells import Results, Run

PLAN = "sweep.json"
FAILURE = "failure.json"


class ReportError(ValueError):
    """There is nothing to report on; the message says why."""


def read_results(folder: str | Path) -> Results:
    """Read `folder/result.json` and every `folder/*/result.json`, and the sweep's plan where there is one.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder at {folder}")
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
            # the second: the same run on another machine, where the data lie elsewhere
            same = (run.task, run.k, run.method, run.seed, json.dumps(run.variant, sort_keys=True))
            other = first.setdefault(record["digest"], name), first.setdefault(same, name)
            problem = next((f"it is the same run as {seen}" for seen in other if seen != name), None)
        if problem is not None:
            left_out.append((name, problem))
            continue
        runs.append(run)

    done = {path.parent for path in paths}
    failures = []
    for path in sorted(folder.glob(f"*/{FAILURE}")):
        if path.parent not in done:
            failures.append((path.parent.name, _failure(path)))
    plan = _read_plan(folder, left_out)
    absent = _absent(plan, runs, {name for name, _ in failures})
    seeds: dict[tuple[str, int | None, str], set[tuple[int, int]]] = defaultdict(set)
    for item in plan.get("runs", ()):
        if key := _planned(item):
            seeds[key[0]].add(key[1])
    chosen = plan.get("chosen", ())
    if isinstance(chosen, Mapping):
        chosen = list(chosen)
    return Results(
        runs=tuple(runs),
        left_out=tuple(left_out),
        failures=tuple(failures),
        absent=tuple(absent),
        seeds={key: frozenset(value) for key, value in seeds.items()},
        choose=tuple(item for item in chosen if isinstance(item, str)) if isinstance(chosen, list) else (),
        plan=str(plan.get("sweep", PLAN)) if plan else None,
    )


def _problem(record: Mapping[str, Any]) -> str | None:
    """Why a whole record is still not to be averaged, or None."""
    if record["status"] != "finished":
        return f"its status is {record['status']!r}"
    k = record["settings"].get("train_samples")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        return f"settings.train_samples is {k!r:.60}"
    primary = record["task"]["primary"]
    scores = [(part, record[part]["metrics"].get(primary)) for part in ("dev", "test")]
    scores += [(f"evaluations[{i}]", item["metrics"].get(primary)) for i, item in enumerate(record["evaluations"])]
    for where, score in scores:
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not -1 <= score <= 1:  # NaN is not between them either
            return f"{where}.metrics.{primary} is {score!r:.60}, not a fraction"
    times = [record["seconds"][name] for name in ("train", "evaluation", "total")]
    if not all(math.isfinite(value) and value >= 0 for value in times):
        return f"its seconds are {times}"
    gates = record["gates"]
    if gates is not None and not _are_gates(gates):
        return "its gates are not layers by submodules"
    return None


def _are_gates(gates: Mapping[str, Any]) -> bool:
    values = gates.get("values")
    if not isinstance(values, Mapping) or not values or not isinstance(gates.get("layers"), list):
        return False
    means = [item.get("mean") if isinstance(item, Mapping) else None for item in values.values()]
    return all(
        isinstance(mean, list) and mean and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in mean)
        for mean in means
    )


def _failure(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["error"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {FAILURE} cannot be read"


def _read_plan(folder: Path, left_out: list[tuple[str, str]]) -> dict[str, Any]:
    """The sweep's plan; empty where there is none. One that cannot be read is named in `left_out`."""
    path = folder / PLAN
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        left_out.append((PLAN, f"it is not valid JSON: {error}"))
        return {}
    if not isinstance(plan, dict) or not isinstance(plan.get("runs", []), list):
        left_out.append((PLAN, "it is not the plan of a sweep"))
        return {}
    return plan


def _planned(item: Any) -> tuple[tuple[str, int | None, str], tuple[int, int]] | None:
    """Task, K and method's name, and the seeds, of a planned run; None where the plan does not say them."""
    if not isinstance(item, Mapping):
        return None
    inner = item.get("settings")
    settings = {**(inner if isinstance(inner, Mapping) else {}), **item}
    task, k, seed = (settings.get(name) for name in ("task", "train_samples", "seed"))
    method = settings.get("method_name", settings.get("method"))
    if isinstance(method, Mapping):
        method = _method_name(method)
    data_seed = settings.get("data_seed")
    data_seed = seed if data_seed is None else data_seed
    if not isinstance(task, str) or not isinstance(method, str) or not isinstance(seed, int):
        return None
    if not isinstance(data_seed, int) or not isinstance(k, (int, type(None))):
        return None
    return (task, k, method), (seed, data_seed)


def _method_name(method: Mapping[str, Any]) -> str | None:
    from unipelt.glue.settings import RunSettings

    try:
        return RunSettings(task="rte", method=method).method_name
    except (ValueError, OSError):
        return None


def _absent(plan: Mapping[str, Any], runs: Sequence[Run], failed: set[str]) -> list[str]:
    """Planned runs that left neither result nor failure."""
    digests, names = {run.record["digest"] for run in runs}, {run.name for run in runs}
    absent = []
    for item in plan.get("runs", ()):
        about = {"folder": item} if isinstance(item, str) else item
        if not isinstance(about, Mapping):
            continue
        name = next((str(about[key]) for key in ("folder", "name", "digest") if about.get(key)), None)
        if name is None or about.get("digest") in digests or name in names or name in failed:
            continue
        absent.append(name)
    return absent
