"""The tables of docs/evidence.md, and the differences in its prose and in README, are those of docs/results."""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from unipelt.report import read_results
from unipelt.report.cells import Cell, Table
from unipelt.report.compare import Difference, gate_agreements, head_effects, paired_tests, variant_effects
from unipelt.report.paper import paper
from unipelt.report.significance import paired_test

HOME = Path(__file__).parent.parent
RESULTS = HOME / "docs" / "results"
OWN = 'unipelt-apl, prefix.softmax="own"'
MASS = 'unipelt-apl, prefix.gating="mass", prefix.gate_start={}, lora.gating="multiply"'
METHODS = {
    "fine-tuning": "fine-tuning",
    "BitFit": "bitfit",
    "adapter": "adapter",
    "prefix, 10 tokens": "prefix",
    "prefix, 50 tokens": "prefix, prefix.length=50",
    "LoRA": "lora",
    "UniPELT (AP)": "unipelt-ap",
    "UniPELT (APL)": "unipelt-apl",
    "APL, `prefix.softmax: own`": OWN,
    "UniPELT (AL)": "unipelt-al",
}
TASKS = {
    "SST-2": "sst2",
    "STS-B": "stsb",
    "QQP": "qqp",
    "CoLA": "cola",
    "QNLI": "qnli",
    "MRPC": "mrpc",
    "MNLI": "mnli",
    "RTE": "rte",
}
NAMES = {task: name for name, task in TASKS.items()}
HEADS = ("bitfit", "prefix", "lora")
EPOCHS = "gte-small-epochs"
WORDS = {5: "five", 6: "six", 7: "seven", 8: "eight"}
VARIANTS = {
    "APL": "unipelt-apl",
    "its prefix under `mass`, its gate beginning at 0.02; LoRA's gate multiplies": MASS.format("0.02"),
    "the same, beginning at 1e-6": MASS.format("1e-06"),
    "its prefix with a softmax of its own": OWN,
    "no prefix (AL)": "unipelt-al",
    "no prefix; LoRA's gate multiplies": 'unipelt-al, lora.gating="multiply"',
}


@cache
def table(folder: str, k: int = 100) -> Table:
    return read_results(RESULTS / folder / "records").table(k)


@cache
def page(name: str = "docs/evidence.md") -> str:
    """A page's text, its lines joined."""
    return re.sub(r"\s+", " ", (HOME / name).read_text(encoding="utf-8"))


def rows(head: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of the page's table that begins with `head`, and its rows by their first entry."""
    text = (HOME / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert text.count(f"\n{head}") == 1, head
    lines = text[text.index(f"\n{head}") + 1 :].partition("\n\n")[0].splitlines()
    (_, *columns), _, *found = ([entry.strip() for entry in line.strip("|").split("|")] for line in lines)
    return columns, {name: entries for name, *entries in found}


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")  # noqa: RUF001 - as the pages write it


def signed(fraction: float) -> str:
    """Points, with one digit."""
    return ("" if fraction < 0 else "+") + number(100 * fraction, 1)


def span(low: float, high: float) -> str:
    return f"{number(100 * low, 1)} to {number(100 * high, 1)}"


def shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    assert len(cell.runs) == 5
    assert cell.std is not None
    return f"{number(100 * cell.mean)} ± {100 * cell.std:.2f}"


def cells(folder: str, method: str, k: int = 100) -> dict[str, Cell]:
    return table(folder, k).row(method) if method in table(folder, k).rows else {}


def effect(found: list[Any], row: str) -> Difference:
    [one] = [difference for difference in found if difference.row == row]
    return one


def test_scores() -> None:
    columns, found = rows("| method | SST-2, 6 layers | SST-2 |")
    assert [*found] == [*METHODS]
    assert (columns[0], columns[-1]) == ("SST-2, 6 layers", "average")
    tasks = [TASKS[name] for name in columns[1:-1]]
    for label, entries in found.items():
        here = cells("gte-small", METHODS[label])
        wanted = [shown(cells("minilm", METHODS[label]).get("sst2")), *(shown(here.get(task)) for task in tasks)]
        assert [entry.replace("not run", "") for entry in entries[:-1]] == wanted, label
        whole = all(task in here for task in tasks)
        assert entries[-1] == (number(100 * statistics.fmean(here[task].mean for task in tasks)) if whole else "")
    assert {task for row in table("gte-small").rows for task in table("gte-small").row(row)} == {*tasks}, "all are told"


def test_the_papers_scores() -> None:
    columns, found = rows("| method | SST-2 | STS-B |")
    tasks = [TASKS[name] for name in columns[:-1]]
    assert tasks == [TASKS[name] for name in rows("| method | SST-2, 6 layers | SST-2 |")[0][1:-1]]
    for label, entries in found.items():
        printed = [paper()[100, METHODS[label], task] for task in tasks]
        assert entries[:-1] == [f"{one.mean:.2f} ± {one.std:.2f}" for one in printed], label
        assert entries[-1] == number(statistics.fmean(one.mean for one in printed)), label


def test_variants_on_stsb() -> None:
    columns, found = rows("| STS-B, 12 layers |")
    assert columns == ["score", "against APL, 95 % interval", "parameters deployed"]
    assert [*found] == [*VARIANTS]
    for label, (score, against, deployed) in found.items():
        cell = cells("gte-small", VARIANTS[label])["stsb"]
        assert score == shown(cell), label
        assert {deployed} == {f"{run.record['parameters']['deployed']:,}" for run in cell.runs}, label
        if VARIANTS[label] == "unipelt-apl":
            assert against == ""
            continue
        difference = effect(variant_effects(table("gte-small")), VARIANTS[label])
        mean, interval = difference.by_task.get("stsb", (difference.difference, (difference.low, difference.high)))
        assert interval is not None
        assert against == f"{signed(mean)} ({span(*interval)})", label


def test_more_examples_and_longer_training() -> None:
    columns, found = rows("| 12 layers, STS-B |")
    assert columns == ["K = 100", "K = 500", "K = 100, 50 epochs"]
    assert [METHODS[label] for label in found] == ["lora", "unipelt-apl", OWN]
    for label, entries in found.items():
        method = METHODS[label]
        there = (("gte-small", 100), ("gte-small", 500), (EPOCHS, 100))
        wanted = [shown(cells(folder, method, k).get("stsb")) for folder, k in there]
        assert [entry.replace("not run", "") for entry in entries] == wanted, label


def test_runs_and_hours() -> None:
    _, found = rows("| | 6 layers | 12 layers |")
    told = []
    for folder in ("minilm/records", "gte-small/records", f"{EPOCHS}/records", "gte-small/rates"):
        records = [json.loads(path.read_text()) for path in (RESULTS / folder).glob("*/result.json")]
        told.append((len(records), number(sum(record["seconds"]["total"] for record in records) / 3600, 1)))
    (small, small_hours), (large, hours), (longer, longer_hours), (rates, rate_hours) = told
    assert found["runs, hours of computing"] == [
        f"{small}, {small_hours}",
        f"{large}, {hours}; {longer} of 50 epochs, {longer_hours}; and {rates} for the rates, {rate_hours}",
    ]


def against_single() -> list[str]:
    """The combination against the best single method, in the page's words."""
    found = effect(paired_tests(table("gte-small")), "unipelt-apl")
    assert found.single == "lora"  # type: ignore[attr-defined]
    assert found.drawn is not None
    assert found.t_tasks is not None
    assert found.t is not None
    assert found.wilcoxon is not None
    below = sorted(((-100 * mean, task) for task, (mean, _) in found.by_task.items()), reverse=True)
    side = ["below ", *[""] * (len(below) - 1)]
    if above := [index for index, (mean, _) in enumerate(below) if mean < 0]:
        side[above[0]] = "above "
    parts = [f"{abs(mean):.1f} {words}on {NAMES[task]}" for (mean, task), words in zip(below, side, strict=True)]
    alone = {task: f"{signed(mean)} ({span(*both)})" for task, (mean, both) in found.by_task.items() if both}
    return [
        f"it is {number(-100 * found.difference, 1)} below (95 % interval over the {found.pairs} pairs of task and "
        f"seed {span(found.low, found.high)}, t-test p = {found.t:.3f}, Wilcoxon {found.wilcoxon:.3f})",
        f"with tasks drawn too the interval is {span(*found.drawn)}, and a t-test over the tasks has p = "
        f"{found.t_tasks:.2f}",
        f": {', '.join(parts)}.",
        f"LoRA {alone['qnli']}, that variant",
        f"APL is below LoRA on each seed, {alone['mnli']};",
    ]


def against_apl() -> list[str]:
    """A softmax of the prefix's own against the paper's, in the page's words."""
    found = effect(variant_effects(table("gte-small")), OWN)
    assert found.drawn is not None
    assert found.t_tasks is not None
    assert found.t is not None
    assert found.wilcoxon is not None
    by_task = {task: f"{signed(mean)} on {NAMES[task]}" for task, (mean, _) in found.by_task.items()}
    spans = {task: f" ({span(*both)})" for task, (_, both) in found.by_task.items() if both}
    mean, (low, high) = found.by_task["mnli"]  # type: ignore[misc]
    return [
        f"**{signed(found.difference)} on average over the {WORDS[len(found.tasks)]} tasks of 12 layers "
        f"({span(found.low, found.high)}; {found.pairs} pairs, t-test p = {found.t:.3f}, Wilcoxon "
        f"{found.wilcoxon:.3f})**",
        f"with tasks drawn as well the interval is {span(*found.drawn)}, and over tasks p = {found.t_tasks:.2f}",
        by_task["stsb"],
        *(f"{by_task[task]}{spans[task]}" for task in by_task if task != "stsb"),
        f"by as little as chance makes: {signed(-mean)} ({span(-high, -low)})",
    ]


def own_beside_lora() -> list[str]:
    """The same against the best single method, and its prefix's gate by task."""
    found = effect(paired_tests(table("gte-small")), OWN)
    assert found.single == "lora"  # type: ignore[attr-defined]
    [gates] = [one.tasks for one in gate_agreements(table("gte-small")) if one.row == OWN]
    open_least = sorted((parts["prefix"][0], task) for task, parts in gates.items())
    by_task = {name: found.by_task[task] for name, task in TASKS.items() if task in ("sst2", "qqp")}
    return [
        f"LoRA {signed(found.difference)} ({span(found.low, found.high)})",
        *(f"{name} {signed(mean)} ({span(*interval)})" for name, (mean, interval) in by_task.items() if interval),
        ", ".join(f"{gate:.2f} on {NAMES[task]}" for gate, task in open_least),
    ]


def with_6_layers() -> list[str]:
    """What the smaller model says, of SST-2 alone."""
    variants = {found.row: found for found in variant_effects(table("minilm"))}
    heads = {found.trained: found for found in head_effects(table("minilm"))}
    lora = statistics.fmean(cells("minilm", "lora")["sst2"].scores.values())
    apl = statistics.fmean(cells("minilm", "unipelt-apl")["sst2"].scores.values())
    single = effect(paired_tests(table("minilm")), "unipelt-apl")
    assert single.t is not None
    mean, mass = (variants[f"unipelt-apl, {change}"] for change in ('gate.pooling="mean"', 'prefix.gating="mass"'))
    bare, own = variants["unipelt-apl-nogate"], variants[OWN]
    gains = [(number(100 * heads[name].difference, 1), span(heads[name].low, heads[name].high)) for name in HEADS]
    assert mean.t is not None
    return [
        f"With 6 layers it is {number(100 * (lora - apl), 1)} below LoRA, and {number(-100 * single.difference, 1)} "
        f"below the best there, LoRA with a frozen head ({span(single.low, single.high)}; 5 pairs, p = {single.t:.3f})",
        "gains {} points for BitFit ({}; 5 pairs), {} for the prefix ({}) and {} for LoRA ({})".format(
            *(words for gain in gains for words in gain)
        ),
        f"APL without gates is {number(-100 * bare.difference, 1)} below it ({span(bare.low, bare.high)}; 5 pairs)",
        f"it is {number(100 * mean.difference, 1)} above ({span(mean.low, mean.high)})",
        f"(`mass`) {number(100 * mass.difference, 1)} above ({span(mass.low, mass.high)})",
        f"its t-test does not say so (p = {mean.t:.3f})",
        f"On SST-2 with 6 layers: {signed(own.difference)} ({span(own.low, own.high)})",
    ]


def heads_with_12_layers() -> list[str]:
    """What a head that does not train costs LoRA on STS-B."""
    heads = {found.trained: found for found in head_effects(table("gte-small"))}
    lora = heads["lora"]
    return [
        f"training it gains {number(100 * lora.difference, 1)} for LoRA ({span(lora.low, lora.high)}; 5 pairs)",
        f"without it scores {shown(cells('gte-small', lora.frozen)['stsb'])}",
    ]


def with_500() -> list[str]:
    """What K = 500 says, of STS-B alone."""
    singles = {found.row: found for found in paired_tests(table("gte-small", 500))}
    assert {found.single for found in singles.values()} == {"lora"}
    apl, own = singles["unipelt-apl"], singles[OWN]
    better = effect(variant_effects(table("gte-small", 500)), OWN)
    assert better.t is not None
    assert own.t is not None
    return [
        f"it is {signed(apl.difference)} against LoRA ({span(apl.low, apl.high)}; 5 pairs)",
        f"{signed(better.difference)} against APL ({span(better.low, better.high)}; t-test p = {better.t:.3f})",
        f"{signed(own.difference)} against LoRA ({span(own.low, own.high)}; p = {own.t:.3f})",
    ]


def with_50_epochs() -> list[str]:
    """What training for longer gives APL, on the same examples, and what the variant has without."""
    longer = cells(EPOCHS, "unipelt-apl")["stsb"].scores
    words = []
    for method in ("unipelt-apl", OWN):
        before = cells("gte-small", method)["stsb"].scores
        assert [*before] == [*longer]
        mean, low, high, _, _ = paired_test([longer[seed] - before[seed] for seed in longer])
        words.append(f"{signed(mean)} ({span(low, high)})")
    runs = cells(EPOCHS, "unipelt-apl")["stsb"].runs
    first, second, third, fourth, fifth = (f"{run.record['best']['epoch']:g}" for run in runs)
    gates = [
        statistics.fmean(gate for run in cell["stsb"].runs for gate in run.record["gates"]["values"]["prefix"]["mean"])
        for cell in (
            cells("gte-small", "unipelt-apl"),
            cells(EPOCHS, "unipelt-apl"),
            cells("gte-small", "unipelt-apl", 500),
        )
    ]
    return [
        f"scores {words[0]} against 15",
        f"{words[1]} against that variant's 15",
        f"its best epochs are the {first}th, {second}st, {third}th, {fourth}th and {fifth}st",
        "from {:.2f} to {:.2f} on average, as it does with 500 examples ({:.2f})".format(*gates),
    ]


SAID = [
    *(*against_single(), *against_apl(), *own_beside_lora()),
    *(*with_6_layers(), *heads_with_12_layers(), *with_500(), *with_50_epochs()),
]


@pytest.mark.parametrize("words", SAID)
def test_differences(words: str) -> None:
    assert words in page()


def test_readme() -> None:
    found = effect(variant_effects(table("gte-small")), OWN)
    assert found.drawn is not None
    sentence = (
        f"it gains {number(100 * found.difference, 1)} points on average over {WORDS[len(found.tasks)]} tasks (95 % "
        f"interval {span(found.low, found.high)}; {span(*found.drawn)} with tasks drawn too)"
    )
    assert sentence in page("README.md")
    apl, own = (effect(paired_tests(table("gte-small", 500)), row).difference for row in ("unipelt-apl", OWN))
    assert f"LoRA by {number(-100 * apl, 1)} and above it by {number(100 * own, 1)}" in page("README.md")
