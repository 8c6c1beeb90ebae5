"""The sections of a report that compare methods, as blocks."""

from __future__ import annotations

from collections.abc import Sequence

from unipelt.report.blocks import Block, Entry, Fold, Grid, Heading, Items, Line, Panels, Paragraph
from unipelt.report.compare import gate_agreements, marks, upper_bounds
from unipelt.report.costs import costs
from unipelt.report.differences import Difference
from unipelt.report.numbers import NONE, interval, k_name, percent, signed
from unipelt.report.paper import paper_costs
from unipelt.report.pictures import Picture
from unipelt.report.results import Table
from unipelt.report.significance import MeanEffect


def compare_with_upper_bounds(tables: Sequence[Table]) -> list[Block]:
    """Return the section with the best submodule of each task beside the method that combines the submodules."""
    rows: list[list[Entry]] = []
    for table in tables:
        for bound in upper_bounds(table):
            best, combined = 100 * bound.best, 100 * bound.combined
            lines = [[(f"{best:.2f}", "")], [(f"{combined:.2f}", "")], [(signed(combined - best), "")]]
            if bound.paper:
                others = (*(f"paper {value:.2f}" for value in bound.paper), signed(bound.paper[1] - bound.paper[0]))
                for entry, other in zip(lines, others, strict=True):
                    entry.append((other, "minor"))
            chosen = ", ".join(f"{task}: {part}" for task, part in bound.chosen.items())
            rows.append([[(bound.row, "")], [(k_name(table.k), "")], *lines, [(chosen, "minor")]])
    if not rows:
        return []
    return [
        Heading(2, "Upper bound"),
        Paragraph(
            "The best submodule of each task is the one with the best mean over seeds. Its average over tasks stands "
            "beside that of the method that combines them, on the tasks that have all of these."
            + (" The paper's Table 2 does the same." if any(table.has_paper for table in tables) else "")
        ),
        Grid(["method", "K", "best submodule (%)", "combined (%)", "difference", "best by task"], rows),
    ]


_AGAINST = {
    "single": (
        "Every method against the best single method",
        "The best single method is the best by its mean over the same tasks.",
    ),
    "picked": (
        "Combinations against the single method that is picked on dev",
        "It is picked for each task and seed by its dev score, which takes one training for each candidate.",
    ),
    "paper": ("Other combinations against UniPELT(APL)", "The same tasks and seeds."),
    "head": (
        "Heads that train against heads that do not",
        "All else is equal, the learning rate too. A head that does not train stays at its random start.",
    ),
    "average": (
        "Averages of weights against the weights of the best epoch",
        "Both are of the same runs. The average is tested in every run, whether dev takes it or not.",
    ),
    "tested": (
        "Last choices against the weights of the best epoch",
        "Both are of the same runs. Dev has chosen the average or the best epoch, and then the submodules.",
    ),
}


def compare_rows(differences: Sequence[Difference], charts: Sequence[Picture] = ()) -> list[Block]:
    """Return the sections with all comparisons of rows, and the charts that are not at the top of the page."""
    blocks: list[Block] = []
    for kind, (title, text) in _AGAINST.items():
        found = [difference for difference in differences if difference.kind == kind]
        if not found:
            continue
        blocks += [
            Heading(2, title),
            Paragraph(text),
            *([Panels(charts)] if charts and kind == "single" else []),
            Grid(
                ["method", "K", "against", "difference\n95 % interval", "p\ncorrected", "other tasks\n95 % interval"],
                [_compared(difference) for difference in found],
            ),
        ]
        tasks = list(dict.fromkeys(task for difference in found for task in difference.by_task))
        if tasks:
            rows = [_by_task(difference, tasks) for difference in found if difference.by_task]
            note = Paragraph(
                "Each difference has its own 95 % t interval over seeds, without a correction for the number of tasks."
            )
            blocks.append(Fold("By task", [note, Grid(["method", *tasks], rows)]))
    if blocks:
        blocks.append(Fold("How the intervals and p values are made", [Items(_METHOD)]))
    return blocks


_METHOD = (
    "Pairs have the same task and the same seed. A difference is the mean over all pairs.",
    "Its interval, for these tasks and other seeds, is a t interval: each seed gives one number, its mean difference "
    "over the tasks. Where tasks have different seeds, or one seed each, it is over pairs instead.",
    "The p value is that of the same t-test, two-sided. It is corrected by Holm's method for all comparisons of this "
    "page that have one.",
    "The interval for other tasks is a t interval over the tasks' means, given for three tasks or more. Its p values "
    "are corrected in the same way, as a family of their own.",
)


def _compared(found: Difference) -> list[Entry]:
    effect, other = found.effect, found.over_tasks
    more = [(f"of {', '.join(found.among)}", "hover")] if found.among else []
    return [
        [(found.row, "")],
        [(k_name(found.k), "")],
        [(found.against, ""), *more],
        [
            (signed(100 * effect.mean), "clear" if found.clear else ""),
            (_interval(effect), "minor"),
            (f"{found.pairs} pairs, {effect.count} {found.unit}", "hover"),
        ],
        [(_p(found.holm), ""), (f"without correction {_p(effect.p)}", "hover")],
        [(NONE, "minor")]
        if other is None
        else [(_interval(other), ""), (f"p {_p(found.holm_tasks)}, corrected", "hover")],
    ]


def _by_task(found: Difference, tasks: Sequence[str]) -> list[Entry]:
    row: list[Entry] = [[(found.row, ""), (f"{k_name(found.k)}, against {found.against}", "minor")]]
    for task in tasks:
        effect = found.by_task.get(task)
        if effect is None:
            row.append([(NONE, "minor")])
        else:
            row.append([(signed(100 * effect.mean), "clear" if effect.differs else ""), (_interval(effect), "minor")])
    return row


def _interval(effect: MeanEffect) -> str:
    return NONE if effect.low is None or effect.high is None else interval(effect.low, effect.high)


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def compare_gates(tables: Sequence[Table]) -> list[Block]:
    """Return the section with the gates of combinations beside the scores of their submodules alone."""
    blocks: list[Block] = []
    for table in tables:
        for found in gate_agreements(table):
            parts = list(next(iter(found.tasks.values())))
            rows: list[list[Entry]] = []
            for task, values in found.tasks.items():
                gates, scores = ([values[part][which] for part in parts] for which in (0, 1))
                marked = zip(values.values(), marks(gates), marks(scores), strict=True)
                rows.append([[(task, "")]])
                for (gate, score), open_most, best in marked:
                    rows[-1].append(
                        [
                            (f"{gate:.3f}", "best" if open_most == "best" else ""),
                            (f"alone {percent(score)}{', the best' if best == 'best' else ''}", "minor"),
                        ]
                    )
            relation = "" if found.correlation is None else f" Spearman's correlation: {signed(found.correlation)}."
            blocks += [
                Heading(3, f"{found.row}, {k_name(table.k)}"),
                Paragraph(
                    f"The most open gate is that of the submodule that does best alone in {len(found.agreeing)} of "
                    f"{len(found.tasks)} tasks; by chance it would be in one of {len(parts)}.{relation}"
                ),
                Grid(["task", *parts], rows),
            ]
    if not blocks:
        return []
    return [
        Heading(2, "Gates and the better submodule"),
        Paragraph(
            "Mean gates over layers, test examples and seeds. Below each is the score (%) of its submodule alone. Bold "
            "is the most open gate."
        ),
        *blocks,
        Fold(
            "How gates and scores are correlated",
            [
                Paragraph(
                    "Gates of one kind are more open than those of another on every task. So gates and scores are "
                    "each taken less their submodule's mean over the tasks, and Spearman's correlation is over all "
                    "tasks and submodules."
                )
            ],
        ),
    ]


def compare_costs(tables: Sequence[Table]) -> list[Block]:
    """Return the section on parameters and times."""
    rows: list[list[Entry]] = []
    for table in tables:
        for line in costs(table):
            method = line["method"]
            counted = [
                [(f"{n:,}", "") for n in line[name]] if len(line[name]) < 4 else [(_range(line[name]), "")]
                for name in ("trained", "deployed", "head")
            ]
            if line["base"]:
                counted[0].append((f"{100 * line['trained'][-1] / line['base']:.2f} % of the base", "minor"))
            if table.has_paper and (method, "parameters") in paper_costs():
                counted[1].append((f"paper {paper_costs()[method, 'parameters']}", "minor"))
            times: list[Entry] = []
            for name, key in (("training", "train_time_percent"), ("inference", "inference_time_percent")):
                value, printed = line[name], paper_costs().get((method, key)) if table.has_paper else None
                entry = [(NONE if value is None else f"{100 * value:.0f} %", "")]
                times.append([*entry, (f"paper {printed} %", "minor")] if printed else entry)
            seconds: list[Line] = [(f"{line['seconds']:.0f}", "")]
            if line["trainings"] > 1:
                seconds.append((f"{line['trainings']} trainings", "minor"))
            rows.append([[(line["row"], "")], [(k_name(table.k), "")], *counted, seconds, *times])
    head = ["method", "K", "trained", "deployed", "head", "seconds", "training time", "inference time"]
    counts = " That is the number in the paper's Table 4." if any(table.has_paper for table in tables) else ""
    return [
        Heading(2, "Parameters and time"),
        Grid(head, rows),
        Fold(
            "What is counted",
            [
                Items(
                    [
                        "trained, deployed: parameters without the head. Deployed are those that remain after "
                        f"training.{counts}",
                        "seconds: of one score, evaluation included. A method that is picked takes all its candidates.",
                        "training time, inference time: relative to fine-tuning on the same tasks and K, by the second "
                        "a step and by the second an evaluated example. They compare only where all runs had the "
                        "same machine to themselves.",
                    ]
                )
            ],
        ),
    ]


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,} to {values[-1]:,}"
