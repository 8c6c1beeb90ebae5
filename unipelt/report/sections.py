"""The report's sections in which methods are compared, as blocks."""

from __future__ import annotations

from collections.abc import Sequence

from unipelt.report.blocks import NONE, Block, Entry, Grid, Heading, Paragraph, percent, signed
from unipelt.report.cells import Table
from unipelt.report.compare import (
    Difference,
    gate_agreements,
    head_effects,
    marks,
    paired_tests,
    upper_bounds,
    variant_effects,
)
from unipelt.report.costs import costs
from unipelt.report.paper import paper_costs
from unipelt.report.pictures import k_name
from unipelt.report.significance import RESAMPLES


def compare_with_upper_bounds(tables: Sequence[Table]) -> list[Block]:
    """The best submodule of each task beside the method that combines them."""
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
            "The best submodule of each task (the one with the best mean over seeds), averaged over tasks, beside the "
            "method that combines them, on the tasks that have all of these; the paper's Table 2."
        ),
        Grid(["method", "K", "best submodule (%)", "combined (%)", "difference", "best by task"], rows),
    ]


def compare_with_singles(tables: Sequence[Table]) -> list[Block]:
    """Combinations against the best single method, pair by pair."""
    rows: list[list[Entry]] = []
    for table in tables:
        for test in paired_tests(table):
            rows.append(
                [
                    [(test.row, "")],
                    [(k_name(table.k), "")],
                    [(test.single, ""), (f"of {', '.join(test.among)}", "minor")],
                    *_tested(test),
                ]
            )
    if not rows:
        return []
    head = ["method", "K", "best single method", "difference, 95 % interval", "t-test, p", "Wilcoxon, p", "pairs"]
    return [
        Heading(2, "Combination against the best single method"),
        Paragraph(
            "Pairs have the same task and the same seed. The best single method is the one with the best mean over "
            "the tasks at this K among those that add one kind of submodule: it is picked by these same scores, so "
            "the difference is rather too small than too large. The interval is a bootstrap over pairs "
            f"({RESAMPLES:,} resamples, seeded); p values are two-sided. Pairs of one task are not independent of "
            "each other, so these speak of these tasks. Of three tasks or more there is an interval where tasks are "
            "drawn too, and pairs from each, with p of the t-test over the tasks' means: they speak of other tasks "
            "like these, as far as so few can."
        ),
        Grid(head, rows),
    ]


def compare_heads(tables: Sequence[Table]) -> list[Block]:
    """Methods whose head does not train, beside the same with one that does."""
    rows: list[list[Entry]] = [
        [
            [(effect.trained, "")],
            [(k_name(table.k), "")],
            *_tested(effect)[::3],  # without p values
        ]
        for table in tables
        for effect in head_effects(table)
    ]
    if not rows:
        return []
    return [
        Heading(2, "What the head does"),
        Paragraph(
            "Points that a method gains when its head trains, against a head that stays at its random start as in the "
            "authors' program: pairs of the same task and seed, with the interval of a bootstrap over pairs."
        ),
        Grid(["method", "K", "gain, 95 % interval", "pairs"], rows),
    ]


def compare_variants(tables: Sequence[Table]) -> list[Block]:
    """Other combinations against the paper's."""
    rows: list[list[Entry]] = [
        [
            [(effect.row, ""), (f"against {effect.against}", "minor")],
            [(k_name(table.k), "")],
            *_tested(effect),
        ]
        for table in tables
        for effect in variant_effects(table)
    ]
    if not rows:
        return []
    return [
        Heading(2, "Other combinations against UniPELT(APL)"),
        Paragraph(
            "Pairs of the same task and seed, with the interval of a bootstrap over pairs and two-sided p values, for "
            "these tasks; of three tasks or more also with tasks drawn, for others like them."
        ),
        Grid(["method", "K", "difference, 95 % interval", "t-test, p", "Wilcoxon, p", "pairs"], rows),
    ]


def compare_gates(tables: Sequence[Table]) -> list[Block]:
    """The gates of combinations beside what their submodules do alone."""
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
            "Mean gates over layers, test examples and seeds (bold: the most open), and what the submodule scores "
            "alone (%). The correlation is over tasks and submodules, gates and scores each less their submodule's "
            "mean over the tasks, since gates of one kind are more open than those of another whatever the task."
        ),
        *blocks,
    ]


def _tested(found: Difference) -> list[Entry]:
    """The entries of a difference: itself, the p values, the pairs with what each of several tasks has."""
    tasks = [(f"{task} {_points(*difference)}", "minor") for task, difference in found.by_task.items()]
    drawn, over = [], []
    if found.drawn is not None:
        drawn = [(f"tasks drawn too: {_interval(*found.drawn)}", "minor")]
        over = [(f"over tasks: {_p(found.t_tasks)}", "minor")]
    return [
        [(signed(100 * found.difference), ""), (_interval(found.low, found.high), "minor"), *drawn],
        [(_p(found.t), ""), *over],
        [(_p(found.wilcoxon), "")],
        [(str(found.pairs), ""), *(tasks or [(", ".join(found.tasks), "minor")])],
    ]


def _interval(low: float, high: float) -> str:
    return f"{signed(100 * low)} to {signed(100 * high)}"


def _points(difference: float, interval: tuple[float, float] | None) -> str:
    return signed(100 * difference) + ("" if interval is None else f" ({_interval(*interval)})")


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def compare_costs(tables: Sequence[Table]) -> list[Block]:
    """Parameters and times."""
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
            if (method, "parameters") in paper_costs():
                counted[1].append((f"paper {paper_costs()[method, 'parameters']}", "minor"))
            times: list[Entry] = []
            for name, key in (("training", "train_time_percent"), ("inference", "inference_time_percent")):
                value, printed = line[name], paper_costs().get((method, key))
                entry = [(NONE if value is None else f"{100 * value:.0f} %", "")]
                times.append([*entry, (f"paper {printed} %", "minor")] if printed else entry)
            rows.append(
                [[(line["row"], "")], [(k_name(table.k), "")], *counted, [(f"{line['seconds']:.0f}", "")], *times]
            )
    head = ["method", "K", "trained", "deployed", "head", "seconds a run", "training time", "inference time"]
    return [
        Heading(2, "Parameters and time"),
        Paragraph(
            "Parameters are without the head, which has a column of its own; deployed is what remains after training, "
            "and what the paper's Table 4 counts. Times are relative to fine-tuning on the same tasks and K: training "
            "by the second a step, inference by the second an evaluated example. They compare only where all runs "
            "had the same machine to themselves."
        ),
        Grid(head, rows),
    ]


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,} to {values[-1]:,}"
