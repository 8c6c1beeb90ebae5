"""Copy the records of a folder of runs for publication, without models and without paths of the machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.records.record import write_result
from unipelt.report.read import ReportError, read_results
from unipelt.sweep import FAILURE, REQUEST, read_failure, read_request


def collect(folder: str | Path, out: str | Path) -> tuple[list[Path], tuple[tuple[str, str], ...]]:
    """Copy the records of finished and failed runs, and the sweep's plan. A report of the copy shows the same.

    An absolute path, for example of data or of a model, becomes its last part. All other values stay as they are. The
    digests also stay: they belong to the settings with the whole paths.

    Args:
        folder: a folder that `read_results` can read.
        out: the folder of the copy; made if absent. Files from an earlier call are overwritten, records of other runs
            stay, and the plans are merged.

    Returns:
        The paths of the written files, and the name and reason of each file in `folder` that is not a record.

    Raises:
        FileNotFoundError: the folder does not exist.
        ReportError: the folder holds no finished run, or one of `folder` and `out` lies in the other.
        SweepError: a plan is damaged.
        OSError: `out` cannot be written. Each file is written completely or not at all.
    """
    folder, out = Path(folder), Path(out)
    results = read_results(folder)
    if not results.runs:
        raise ReportError(f"{folder} holds no finished run to collect")
    one, other = folder.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ReportError(f"the records of {folder} cannot be collected in {out}: one lies in the other")
    plan = read_request(folder)
    earlier = read_request(out) if out.is_dir() else None
    written = []
    for run in results.runs:
        place = out / ("run" if run.name == "." else run.name)
        place.mkdir(parents=True, exist_ok=True)
        written.append(write_result(_without_paths(run.record), place))
    for name, _ in results.failures:
        error = (read_failure(folder / name) or {"error": ""})["error"]
        (out / name).mkdir(parents=True, exist_ok=True)
        written.append(_write(out / name / FAILURE, {"error": _LEADING.sub("", error)}))
    if plan is not None:
        if earlier is not None:
            runs = {run["digest"]: run for run in [*earlier["runs"], *plan["runs"]]}
            plan = plan | {"runs": list(runs.values())}
        names = ("folder", "digest", "method", "settings")
        plan["runs"] = [{name: run[name] for name in names} for run in plan["runs"]]
        written.append(_write(out / REQUEST, plan))
    return written, results.left_out


_LEADING = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")  # an absolute path in a sentence, without its last part


def _write(path: Path, value: Any) -> Path:
    write_whole(path, f"{json.dumps(_without_paths(value), indent=1)}\n".encode())
    return path


def _without_paths(value: Any) -> Any:
    """Return the same plain types, with every absolute path replaced by its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
