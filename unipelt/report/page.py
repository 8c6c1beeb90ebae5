"""The report as a list of blocks: what it says, whatever it is written as."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unipelt.report.blocks import NONE, Block, Entry, Grid, Heading, Items, Panels, Paragraph, percent, signed
from unipelt.report.cells import Cell, Results, Run, Table
from unipelt.report.compare import marks
from unipelt.report.paper import TASKS
from unipelt.report.pictures import Picture, k_name
from unipelt.report.sections import (
    compare_costs,
    compare_gates,
    compare_heads,
    compare_variants,
    compare_with_singles,
    compare_with_upper_bounds,
)

SECTIONS = (
    *(compare_with_upper_bounds, compare_with_singles, compare_variants, compare_heads, compare_gates),
    compare_costs,
)
_APART = {"task", "seed", "data_seed", "method", "output_dir", "learning_rate", "model", "model_sha256"}
PAPER = "https://aclanthology.org/2022.acl-long.433/"


def compose(results: Results, pictures: Sequence[Picture], name: str) -> list[Block]:
    """The whole report. `name` is what the folder is called."""
    tables = [results.table(k) for k in results.ks]
    sections: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        sections[picture.section].append(picture)
    blocks: list[Block] = [Heading(1, f"UniPELT: {name}"), *_summary(results)]
    for table in tables:
        blocks += _scores(table, results)
    for section in SECTIONS:
        blocks += section(tables)
    for pictured, title, text in (
        ("sizes", "One number of the method", "Mean over seeds; bars are one standard deviation each way."),
        ("scores", "Seeds", "Boxes are quartiles over seeds and dots the seeds; a diamond is the paper's mean."),
        (
            "learning",
            "Learning curves",
            "Dev score by epoch: mean and range over seeds, dotted from where the first of them had ended.",
        ),
        (
            "gates",
            "Gates",
            "Mean gate values on the test data, layers by submodules, averaged over seeds: 0 is closed, 1 is open.",
        ),
    ):
        if sections[pictured]:
            blocks += [Heading(2, title), Paragraph(text), Panels(sections[pictured])]
    blocks += _provenance(results)
    return blocks


def seeds_text(seeds: Iterable[tuple[int, int]]) -> str:
    """Seeds as text; the data's is named where it is another."""
    return ", ".join(str(run) if run == data else f"{run} (data {data})" for run, data in seeds)


# Sections


def _summary(results: Results) -> list[Block]:
    cells = results.cells
    models = sorted({run.record["model"]["name"] for run in results.runs})
    hours = sum(run.record["seconds"]["total"] for run in results.runs) / 3600
    text = (
        f"{_count(len(results.runs), 'finished run')} in {_count(len(cells), 'cell')} (task, K and method), "
        f"{hours:.1f} hours of computing. Model: {', '.join(models)}."
    )
    blocks: list[Block] = [
        Paragraph(text),
        Paragraph(f"The paper is Mao et al., UniPELT (ACL 2022), {PAPER}; its numbers are of bert-base-uncased."),
    ]
    if models != ["bert-base-uncased"]:
        blocks.append(
            Paragraph("The runs' model is another, so that a difference from the paper is not one of methods.", True)
        )
    gaps = [
        (len(results.absent), "planned run without a result"),
        (len(results.failures), "failure"),
        (len(results.left_out), "file left out"),
        (sum(bool(cell.missing) for cell in cells), "cell with missing seeds"),
    ]
    if any(count for count, _ in gaps):
        words = ", ".join(_count(count, noun) for count, noun in gaps if count)
        blocks.append(Paragraph(f"Not whole: {words}. Names and reasons are at the end.", True))
    return blocks


def _scores(table: Table, results: Results) -> list[Block]:
    tasks, rows = table.tasks, table.rows
    several = len(tasks) > 1
    columns = [marks([_mean(table.cells.get((row, task))) for row in rows]) for task in tasks]
    averages = {row: table.average(row) for row in rows}
    columns.append(marks([average[0] if average else None for average in averages.values()]))
    lines: list[list[Entry]] = []
    for index, row in enumerate(rows):
        entries: list[Entry] = [[(row, "")]]
        entries += [
            _score(table.cells.get((row, task)), column[index]) for task, column in zip(tasks, columns, strict=False)
        ]
        if several:
            entries.append(_average(table, row, columns[-1][index]))
        lines.append(entries)
    metrics = {task: next(c.runs[0].primary for (_, t), c in table.cells.items() if t == task) for task in tasks}
    head = ["method", *(f"{task} ({metrics[task].replace('_', ' ')})" for task in tasks)]
    notes = [f"Seeds that should be there are {'in the plan' if results.seeds else 'those of any run of this K'}."]
    if several:
        notes.append(
            "The average is over the tasks of this table, for methods that have all of them"
            + ("." if set(tasks) == set(TASKS) else "; the paper's beside it is over the same tasks.")
        )
    blocks: list[Block] = [
        Heading(2, f"Scores, {k_name(table.k)}"),
        Paragraph(
            "Percent on the test data: mean ± standard deviation of a sample (n - 1; the paper does not say which it "
            "prints) over n seeds. Bold: the best of a column; underlined: the second best. Below: the paper's number "
            "where it has one, and the difference from it. " + " ".join(notes)
        ),
        Grid([*head, *(["average"] if several else [])], lines),
    ]
    said: dict[str, set[str]] = defaultdict(set)
    for cell in table.cells.values():
        for run in cell.runs:
            for note in run.record["task"]["notes"]:
                said[str(note)].add(cell.task)
    if said:
        blocks.append(Items([f"{', '.join(sorted(names))}: {note}" for note, names in said.items()]))
    chosen = [f"{cell.task}, {cell.row}: {cell.chosen}" for cell in table.cells.values() if cell.chosen]
    if chosen:
        blocks += [Paragraph("Chosen on dev, and only the chosen is in the tables and pictures:"), Items(chosen)]
    return blocks


def _mean(cell: Cell | None) -> float | None:
    return None if cell is None else cell.mean


def _score(cell: Cell | None, mark: str) -> Entry:
    if cell is None:
        return [(NONE, "minor")]
    lines = [(percent(cell.mean, cell.std), mark)]
    printed = cell.paper
    if printed is not None:
        std = "" if printed.std is None else f" ± {printed.std:.2f}"
        lines.append((f"paper {printed.mean:.2f}{std}", "minor"))
        lines.append((f"{signed(100 * cell.mean - printed.mean)} · n = {len(cell.runs)}", "minor"))
    else:
        lines.append((f"n = {len(cell.runs)}", "minor"))
    if cell.missing:
        lines.append((f"without seed {seeds_text(cell.missing)}", "warn"))
    return lines


def _average(table: Table, row: str, mark: str) -> Entry:
    average = table.average(row)
    if average is None:
        return [(NONE, "minor")]
    lines = [(percent(*average), mark)]
    printed = table.paper_average(row)
    if printed is not None:
        lines += [(f"paper {printed:.2f}", "minor"), (signed(100 * average[0] - printed), "minor")]
    return lines


def _provenance(results: Results) -> list[Block]:
    records = [run.record for run in results.runs]
    blocks: list[Block] = [Heading(2, "Where the numbers come from")]
    items = []
    models = Counter(f"{r['model']['name']} ({r['model']['class']}, {_digest(r['model']['sha256'])})" for r in records)
    items.append(f"Models: {_counted(models)}")
    machines = Counter(_machine(record["hardware"]) for record in records)
    items.append(f"Machines: {_counted(machines)}")
    commits = Counter(_commit(record["code"]) for record in records)
    items.append(f"Commits: {_counted(commits)}")
    versions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record["packages"].items():
            versions[str(package)].add(str(version))
    items.append("Packages: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()))
    resumed = sum(record["attempts"] > 1 for record in records)
    if resumed:
        items.append(f"Resumed after a stop: {_count(resumed, 'run')}")
    total, train = (sum(record["seconds"][part] for record in records) / 3600 for part in ("total", "train"))
    items.append(f"Time: {total:.2f} hours, of which {train:.2f} of training")
    if results.plan:
        items.append(f"Plan: {results.plan}")
    items.append(f"Settings in all runs: {_common(records)}")
    items += [f"Setting {key}: {found}" for key, found in _differing(results.runs).items()]
    blocks.append(Items(items))
    if any(record["code"]["dirty"] for record in records):
        blocks.append(Paragraph("Some runs were of code with changes that no commit holds.", True))
    if several := sorted(name for name, found in versions.items() if len(found) > 1):
        blocks.append(Paragraph(f"Runs differ in their versions of {', '.join(several)}.", True))
    if len(machines) > 1:
        blocks.append(Paragraph("Runs are of several machines, so times do not compare.", True))
    missing = [
        f"{cell.task}, {k_name(cell.k)}, {cell.row}: {seeds_text(cell.missing)}"
        for cell in results.cells
        if cell.missing
    ]
    for title, entries in (
        ("Cells with missing seeds", missing),
        ("Files left out", [f"{name}: {reason}" for name, reason in results.left_out]),
        ("Failures", [f"{name}: {message}" for name, message in results.failures]),
        ("Planned runs without a result", list(results.absent)),
    ):
        if entries:
            blocks += [Heading(3, title), Items(entries)]
    return blocks


def _common(records: Sequence[Mapping[str, Any]]) -> str:
    first = records[0]["settings"]
    same = [
        f"{key}={value}"
        for key, value in first.items()
        if key not in _APART and value is not None and all(r["settings"].get(key) == value for r in records)
    ]
    return ", ".join(same) or "none"


def _differing(runs: Sequence[Run]) -> dict[str, str]:
    """What some runs have otherwise than others, by setting: the values, each with its runs and their tasks."""
    known = {key for run in runs for key in run.record["settings"] if key in run.variant} - _APART
    found: dict[str, str] = {}
    for key in sorted(known):
        values: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            values[json.dumps(run.record["settings"].get(key))].append(run)
        if len(values) > 1:
            found[key] = "; ".join(
                f"{value} ({_count(len(group), 'run')}: {', '.join(sorted({run.task for run in group}))})"
                for value, group in sorted(values.items())
            )
    return found


def _machine(hardware: Mapping[str, Any]) -> str:
    gpu, cores = hardware.get("gpu"), hardware.get("cores")
    parts = [str(hardware.get("cpu", "unknown")), f"{cores} cores" if cores else "", str(gpu) if gpu else ""]
    return ", ".join(part for part in parts if part)


def _commit(code: Mapping[str, Any]) -> str:
    commit = code["commit"]
    return (commit[:12] if commit else "unknown") + (" with changes" if code["dirty"] else "")


def _digest(sha256: str | None) -> str:
    return f"SHA-256 {sha256[:12]}…" if sha256 else "no SHA-256"


def _counted(counter: Counter[str]) -> str:
    return "; ".join(f"{name} ({_count(count, 'run')})" for name, count in counter.most_common())


def _count(count: int, noun: str) -> str:
    first, _, rest = noun.partition(" ")
    if count == 1:
        return f"{count} {noun}"
    plural = {"file": "files", "cell": "cells", "planned": "planned runs", "finished": "finished runs"}.get(first)
    return f"{count} {plural} {rest.removeprefix('run').strip()}".strip() if plural else f"{count} {noun}s"
