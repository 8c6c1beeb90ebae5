"""The origin of the numbers of a report: models, machines, commits, settings, and missing runs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unipelt.report.blocks import Block, Fold, Heading, Items, Paragraph
from unipelt.report.cells import Run, flat_settings
from unipelt.report.numbers import k_name
from unipelt.report.results import Results
from unipelt.report.scores import seeds_text

_APART = {"task", "seed", "data_seed", "method", "output_dir", "learning_rate", "model", "model_sha256"}


def describe_provenance(results: Results) -> list[Block]:
    """Return the blocks of the section. Warnings are visible, and lists are in folds."""
    records = [run.record for run in results.runs]
    versions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for package, version in record["packages"].items():
            versions[str(package)].add(str(version))
    machines = Counter(_machine(record["hardware"]) for record in records)
    blocks: list[Block] = [Heading(2, "Where the numbers come from")]
    if dirty := [run.name for run in results.runs if run.record["code"]["dirty"]]:
        blocks.append(
            Paragraph(
                f"The code of {count(len(dirty), 'run')} had changes that no commit holds: {', '.join(dirty)}.", True
            )
        )
    if several := sorted(name for name, found in versions.items() if len(found) > 1):
        blocks.append(Paragraph(f"Runs differ in their versions of {', '.join(several)}.", True))
    if len(machines) > 1:
        blocks.append(Paragraph("Runs are of several machines, so times do not compare.", True))
    blocks.append(Fold("Models, machines, commits, settings", [Items(_facts(results, versions, machines))]))
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


def count(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural if the number is not 1."""
    first, _, rest = noun.partition(" ")
    if number == 1:
        return f"{number} {noun}"
    plural = {"file": "files", "cell": "cells", "planned": "planned runs", "finished": "finished runs"}.get(first)
    return f"{number} {plural} {rest.removeprefix('run').strip()}".strip() if plural else f"{number} {noun}s"


def _facts(results: Results, versions: Mapping[str, set[str]], machines: Counter[str]) -> list[str]:
    records = [run.record for run in results.runs]
    models = Counter(f"{r['model']['name']} ({r['model']['class']}, {_digest(r['model']['sha256'])})" for r in records)
    commits = Counter(_commit(record["code"]) for record in records)
    items = [
        f"Models: {_counted(models)}",
        f"Machines: {_counted(machines)}",
        f"Commits: {_counted(commits)}",
        "Packages: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()),
    ]
    resumed = sum(record["attempts"] > 1 for record in records)
    if resumed:
        items.append(f"Resumed after a stop: {count(resumed, 'run')}")
    total, train = (sum(record["seconds"][part] for record in records) / 3600 for part in ("total", "train"))
    items.append(f"Time: {total:.2f} hours, of which {train:.2f} of training")
    if results.plan:
        items.append(f"Plan: {results.plan}")
    items.append(f"Settings in all runs: {_common(records)}")
    return [*items, *(f"Setting {key}: {found}" for key, found in _differing(results.runs).items())]


def _common(records: Sequence[Mapping[str, Any]]) -> str:
    first = records[0]["settings"]
    same = [
        f"{key}={value}"
        for key, value in first.items()
        if key not in _APART and value is not None and all(r["settings"].get(key) == value for r in records)
    ]
    return ", ".join(same) or "none"


def _differing(runs: Sequence[Run]) -> dict[str, str]:
    """Return the settings that differ between runs: by setting, the values, each with its runs and their tasks."""
    known = {key for run in runs for key in flat_settings(run.record["settings"]) if key in run.variant} - _APART
    found: dict[str, str] = {}
    for key in sorted(known):
        values: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            values[json.dumps(flat_settings(run.record["settings"]).get(key))].append(run)
        if len(values) > 1:
            found[key] = "; ".join(
                f"{value} ({count(len(group), 'run')}: {', '.join(sorted({run.task for run in group}))})"
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
    return "; ".join(f"{name} ({count(runs, 'run')})" for name, runs in counter.most_common())
