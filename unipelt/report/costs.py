"""The costs of methods: parameters, and time relative to fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from unipelt.report.cells import Cell, Run
from unipelt.report.results import Table


def costs(table: Table) -> list[dict[str, Any]]:
    """Return a line for each row: parameters, seconds, and times relative to fine-tuning on the same tasks.

    Runs stop at different epochs, so training times are compared in seconds per step. Inference times are compared in
    seconds per evaluated example, over dev and test data.
    """
    lines = []
    for row in table.rows:
        cells = table.row(row)
        runs = [run for cell in cells.values() for run in cell.runs]
        base = table.named("fine-tuning", table.first(row).setting)
        lines.append(
            {
                "row": row,
                "method": table.first(row).method,
                "trainings": max(len(cell.picked) for cell in cells.values()) or 1,
                **{
                    name: sorted({run.record["parameters"][name] for run in runs})
                    for name in ("trained", "deployed", "head")
                },
                "base": max(run.record["parameters"]["base"] for run in runs),
                "seconds": statistics.fmean(cell.seconds for cell in cells.values() for _ in cell.runs),
                "training": _relative(_seconds_a_step, cells, base),
                "inference": _relative(_seconds_an_example, cells, base),
            }
        )
    return lines


def _relative(
    value: Callable[[Run], float | None], cells: Mapping[str, Cell], base: Mapping[str, Cell]
) -> float | None:
    """Return the mean over common tasks of the ratio of two rows' mean values, or None without such a ratio."""
    ratios = []
    for task in cells.keys() & base.keys():
        ours, theirs = ([found for run in row[task].runs if (found := value(run))] for row in (cells, base))
        if ours and theirs:
            ratios.append(statistics.fmean(ours) / statistics.fmean(theirs))
    return statistics.fmean(ratios) if ratios else None


def _seconds_a_step(run: Run) -> float | None:
    steps = run.record["evaluations"][-1]["step"]
    return run.record["seconds"]["train"] / steps if steps > 0 else None


def _seconds_an_example(run: Run) -> float | None:
    parts = [run.record["data"].get(name) for name in ("dev", "test")]
    dev, test = (part.get("rows") if isinstance(part, Mapping) else None for part in parts)
    if not isinstance(dev, int) or not isinstance(test, int) or dev + test <= 0:
        return None
    passes = len(run.record["evaluations"]) + ("average" in run.record)
    passes += len(run.record.get("selected", {}).get("subsets", ()))
    tests = 1 + len(run.record.get("tests", ()))
    return run.record["seconds"]["evaluation"] / (passes * dev + tests * test)
