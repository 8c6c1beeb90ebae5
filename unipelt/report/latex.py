"""The tables of scores in LaTeX, for papers."""

from __future__ import annotations

from collections.abc import Sequence

from unipelt.report.numbers import k_name, number
from unipelt.report.results import Table
from unipelt.report.scores import CONSTANT, column_marks, metric_of

_SPECIAL = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    '"': "''",
    "\N{MINUS SIGN}": "$-$",
}


def to_latex(tables: Sequence[Table]) -> str:
    """Return a LaTeX `table` for each K: mean and deviation, the best score bold, scores at chance level grey.

    The tables need the packages `booktabs` and `xcolor`.
    """
    head = "% \\usepackage{booktabs,xcolor}\n"
    return head + "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    several = len(table.tasks) > 1
    marked = column_marks(table)
    columns = [*table.tasks, *(["average"] if several else [])]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        " & ".join(["method", *map(_escape, columns)]) + r" \\",
        "\\midrule",
    ]
    for index, row in enumerate(table.rows):
        entries = [_escape(row)]
        for column in columns:
            cell = table.cells.get((row, column))
            found = (cell.mean, cell.std) if cell is not None else None
            if column == "average" and several:
                found = table.average(row)
            entries.append("--" if found is None else _score(*found, marked[column][index]))
        lines.append(" & ".join(entries) + r" \\")
    levels = [table.chance(task) for task in table.tasks]
    constant = [None if table.majority(task).score is None else table.chance(task) for task in table.tasks]
    constant += [sum(levels) / len(levels)] if several else []
    lines += [
        "\\midrule",
        " & ".join([CONSTANT, *("--" if level is None else _escape(number(level)) for level in constant)]) + r" \\",
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{_caption(table)}}}",
        "\\end{table}",
        "",
    ]
    return "\n".join(lines)


def _caption(table: Table) -> str:
    metrics = ", ".join(f"{metric_of(table, task)} on {task}" for task in table.tasks)
    seeds = sorted({len(cell.runs) for cell in table.cells.values()})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return _escape(
        f"Test scores in percent, {k_name(table.k)}: mean and standard deviation over {count} seeds; {metrics}. Grey: "
        "not clearly above the majority class."
    )


def _score(mean: float, std: float | None, mark: str) -> str:
    before, after = {
        "best": (r"\textbf{", "}"),
        "second": (r"\underline{", "}"),
        "chance": (r"\textcolor{gray}{", "}"),
    }.get(mark, ("", ""))
    deviation = "" if std is None else f"$_{{{100 * std:.2f}}}$"
    return f"{before}{_escape(number(mean))}{after}{deviation}"


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
