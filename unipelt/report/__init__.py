"""Write tables and pictures from finished runs, with the paper's numbers beside them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.files.messages import printable
from unipelt.report.cells import kinds
from unipelt.report.collect import collect
from unipelt.report.differences import compare_all
from unipelt.report.latex import to_latex
from unipelt.report.lines import run_lines
from unipelt.report.page import compose
from unipelt.report.pictures import check_matplotlib, draw
from unipelt.report.read import ReportError, read_results
from unipelt.report.render import to_html, to_markdown
from unipelt.report.results import Results
from unipelt.report.scores import seeds_text

__all__ = ["ReportError", "Results", "collect", "kinds", "read_results", "write_report"]

PICTURES = "pictures"


def write_report(folder: str | Path, out: str | Path, latex: bool = False) -> list[Path]:
    """Read finished runs and write a report about them.

    Args:
        folder: the folder of a sweep or of one run. `folder/result.json` and every `folder/*/result.json` are read, and
            the plan `folder/sweep.json` if it exists.
        out: the folder of the report; made if absent. The files are `index.html` (one page that needs no other file),
            `report.md`, `pictures/*.svg`, `report.csv` (a line for each cell; scores in percent) and `runs.csv` (a line
            for each run; scores are fractions).
        latex: whether to write `report.tex` too, with the tables of scores for a paper.

    Returns:
        The paths of the files. Each file is written completely or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        ReportError: the folder holds no result that can be read.
        ImportError: matplotlib is not installed.
        OSError: `out` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    check_matplotlib()
    results = read_results(folder)
    if not results.runs:
        reasons = "".join(f"; left out: {name}, as {reason}" for name, reason in results.left_out[:3])
        raise ReportError(f"{folder} holds no finished run: neither result.json nor */result.json{reasons}")
    tables = [results.table(k) for k in results.ks]
    pictures = draw(results, compare_all(tables))
    blocks = compose(results, pictures, folder.resolve().name)
    contents = {
        **{out / PICTURES / f"{picture.name}.svg": picture.svg for picture in pictures},
        out / "report.csv": _csv(_cell_line(results)),
        out / "runs.csv": _csv(run_lines(results.runs, results.cells)),
        out / "report.md": to_markdown(blocks, PICTURES).encode(),
        out / "index.html": to_html(blocks).encode(),
    }
    if latex:
        contents[out / "report.tex"] = to_latex(tables).encode()
    for path in (out, out / PICTURES):
        path.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents)


def _cell_line(results: Results) -> Iterable[Mapping[str, Any]]:
    for cell in (*results.cells, *results.picked):
        printed = cell.paper
        counts = [run.record["parameters"] for run in cell.runs]
        yield {
            "task": cell.task,
            "metric": cell.runs[0].primary,
            "k": "all" if cell.k is None else cell.k,
            "method": cell.row,
            "model": cell.runs[0].record["model"]["name"],
            "learning_rate": "" if cell.picked else cell.runs[0].record["method"]["learning_rate"],
            "seeds": len(cell.runs),
            "mean": _number(100 * cell.mean),
            "std": "" if cell.std is None else _number(100 * cell.std),
            "dev_mean": _number(100 * cell.average(lambda run: run.dev)),
            "paper_mean": "" if printed is None else printed.mean,
            "paper_std": "" if printed is None or printed.std is None else printed.std,
            "difference": "" if printed is None else _number(100 * cell.mean - printed.mean),
            "trained": max(count["trained"] for count in counts),
            "deployed": max(count["deployed"] for count in counts),
            "head": max(count["head"] for count in counts),
            "seconds": _number(cell.seconds),
            "missing_seeds": seeds_text(cell.missing),
            "chosen": cell.chosen,
            "trainings": len(cell.picked) or 1,
        }


def _number(value: float) -> str:
    return f"{value:.4f}"


def _as_cell(value: Any) -> Any:
    """Return the value so that a spreadsheet reads it as text or a number, and not as a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    formula = (
        text.startswith(("=", "+", "-", "@", "\t", "\n")) and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text) is None
    )
    return f"'{text}" if formula else text


def _csv(lines: Iterable[Mapping[str, Any]]) -> bytes:
    lines = list(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_cell(value) for name, value in line.items()} for line in lines)
    return text.getvalue().encode("utf-8", "replace")
