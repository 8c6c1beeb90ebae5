"""The line of each run in `runs.csv`, and the same lines as a table of pandas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unipelt.records.record import floor
from unipelt.report.cells import Cell, Run


def run_lines(runs: Sequence[Run], cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Yield a line of `runs.csv` for each run. Scores are fractions, and an absent value is an empty text.

    Args:
        runs: the runs.
        cells: the cells of the report, which give each run its row.
    """
    kept = {id(run): cell.row for cell in cells for run in cell.runs}
    for run in runs:
        record = run.record
        yield {
            "run": run.name,
            "task": run.task,
            "metric": run.primary,
            "k": "all" if run.k is None else run.k,
            "method": run.method,
            "row": kept.get(id(run), ""),  # empty for a candidate that was not chosen
            "model": record["model"]["name"],
            "learning_rate": record["method"]["learning_rate"],
            "seed": run.seed[0],
            "data_seed": run.seed[1],
            "test": run.score,
            "dev": run.dev,
            "majority": "" if (found := floor(record)).score is None else found.score,
            "majority_of": "" if found.score is None else "test" if found.of_test else found.name,
            "best_epoch": record["best"]["epoch"],
            "epochs": record["evaluations"][-1]["epoch"],
            **{name: record["parameters"][name] for name in ("trained", "deployed", "head", "base")},
            **{f"seconds_{name}": record["seconds"][name] for name in ("train", "evaluation", "total")},
            "attempts": record["attempts"],
            "commit": record["code"]["commit"] or "",
            "dirty": "" if record["code"]["dirty"] is None else record["code"]["dirty"],
            "digest": record["digest"],
        }


def frame_of(runs: Sequence[Run], cells: Sequence[Cell]) -> Any:
    """Return the lines of `runs.csv` as a `pandas.DataFrame`. An absent value is None.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("a table of pandas needs pandas; install it (pip install pandas)") from error
    lines = [{name: None if value == "" else value for name, value in line.items()} for line in run_lines(runs, cells)]
    return pd.DataFrame(lines)
