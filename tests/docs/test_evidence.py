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
from unipelt.report.cells import Cell
from unipelt.report.compare import gate_agreements
from unipelt.report.differences import Difference, Kind, compare_all
from unipelt.report.group import PICKED
from unipelt.report.paper import paper
from unipelt.report.results import Table
from unipelt.report.significance import MeanEffect, holm, mean_effect

HOME = Path(__file__).parents[2]
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
    "picked on dev": PICKED,
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
RECOMMENDED = "gte-small-unipelt"
HEAD_RATES = "gte-small-heads/records"
LAST_CHOICES = "gte-small-last/records"
DROPPED = "unipelt, gate.dropout=0.1"
WORDS = {5: "five", 6: "six", 7: "seven", 8: "eight"}
BESIDE = ("LoRA", "UniPELT (APL)", "APL, `prefix.softmax: own`", "picked on dev", "fine-tuning")
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
def comparisons(folder: str) -> list[Difference]:
    """All comparisons of a report, p values corrected for their number."""
    results = read_results(RESULTS / folder / "records")
    return compare_all([results.table(k) for k in results.ks])


def compared(row: str, kind: Kind, folder: str = "gte-small", k: int = 100) -> Difference:
    [found] = [one for one in comparisons(folder) if (one.row, one.kind, one.k) == (row, kind, k)]
    return found


@cache
def records_of(folder: str) -> list[dict[str, Any]]:
    """The records in a folder of docs/results, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*/result.json"))]


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


def span(effect: MeanEffect) -> str:
    """The interval."""
    assert effect.low is not None
    assert effect.high is not None
    return f"{number(100 * effect.low, 1)} to {number(100 * effect.high, 1)}"


def spanned(effect: MeanEffect) -> str:
    return f"{signed(effect.mean)} ({span(effect)})"


def shown(cell: Cell | None, folder: str = "gte-small") -> str:
    """Mean and deviation, in italics where it is at chance."""
    if cell is None:
        return ""
    assert len(cell.runs) == 5
    assert cell.std is not None
    at = cell.at_chance(table(folder, cell.k or 0).chance(cell.task))
    mean = f"*{number(100 * cell.mean)}*" if at else number(100 * cell.mean)
    return f"{mean}<br>± {100 * cell.std:.2f}"


def flat(cell: Cell) -> str:
    """The same in a line of text."""
    return f"{number(100 * cell.mean)} ± {100 * (cell.std or 0.0):.2f}"


def cells(folder: str, method: str, k: int = 100) -> dict[str, Cell]:
    return table(folder, k).row(method) if method in table(folder, k).rows else {}


def averaged(folder: str, method: str) -> str:
    average = table(folder).average(method)
    return "" if average is None else f"{number(100 * average[0])}<br>± {100 * (average[1] or 0.0):.2f}"


def test_scores() -> None:
    columns, found = rows("| method | average | SST-2 |")
    assert [*found] == [*METHODS, "majority class"]
    tasks = [TASKS[name] for name in columns[1:]]
    whole = table("gte-small")
    levels = [whole.chance(task) for task in tasks]
    shown_levels = ["–" if task == "stsb" else number(100 * whole.chance(task)) for task in tasks]  # noqa: RUF001
    assert found.pop("majority class") == [number(100 * statistics.fmean(levels)), *shown_levels]
    for label, entries in found.items():
        here = cells("gte-small", METHODS[label])
        assert [entry.replace("not run", "") for entry in entries[1:]] == [shown(here.get(task)) for task in tasks], (
            label
        )
        assert entries[0] == averaged("gte-small", METHODS[label]), label
    assert {task for row in whole.rows for task in whole.row(row)} == {*tasks}, "all are told"


def test_scores_with_6_layers() -> None:
    columns, found = rows("| 6 layers | SST-2 |")
    assert columns == ["SST-2"]
    for label, (entry,) in found.items():
        assert entry == shown(cells("minilm", METHODS[label])["sst2"], "minilm"), label
    assert {METHODS[label] for label in found} == {METHODS[label] for label in METHODS} - {"unipelt-al"}


def test_the_papers_scores() -> None:
    columns, found = rows("| the paper's | average |")
    tasks = [TASKS[name] for name in columns[1:]]
    assert tasks == [TASKS[name] for name in rows("| method | average | SST-2 |")[0][1:]]
    for label, entries in found.items():
        printed = [paper()[100, METHODS[label], task] for task in tasks]
        assert entries[1:] == [f"{one.mean:.2f}<br>± {one.std:.2f}" for one in printed], label
        assert entries[0] == number(statistics.fmean(one.mean for one in printed)), label


def test_variants_on_stsb() -> None:
    columns, found = rows("| STS-B, 12 layers |")
    assert columns == ["score", "against APL, 95 % interval", "parameters deployed"]
    assert [*found] == [*VARIANTS]
    for label, (score, against, deployed) in found.items():
        cell = cells("gte-small", VARIANTS[label])["stsb"]
        assert score == flat(cell), label
        assert {deployed} == {f"{run.record['parameters']['deployed']:,}" for run in cell.runs}, label
        if VARIANTS[label] == "unipelt-apl":
            assert against == ""
            continue
        difference = compared(VARIANTS[label], "paper")
        assert against == spanned(difference.by_task.get("stsb", difference.effect)), label


def test_more_examples_and_longer_training() -> None:
    columns, found = rows("| 12 layers, STS-B |")
    assert columns == ["K = 100", "K = 500", "K = 100, 50 epochs"]
    assert [METHODS[label] for label in found] == ["lora", "unipelt-apl", OWN]
    for label, entries in found.items():
        method = METHODS[label]
        there = (("gte-small", 100), ("gte-small", 500), (EPOCHS, 100))
        found_cells = [cells(folder, method, k).get("stsb") for folder, k in there]
        wanted = ["" if cell is None else flat(cell) for cell in found_cells]
        assert [entry.replace("not run", "") for entry in entries] == wanted, label


def test_runs_and_hours() -> None:
    _, found = rows("| | 6 layers | 12 layers |")
    told = []
    for folder in (
        "minilm/records",
        "gte-small/records",
        f"{EPOCHS}/records",
        f"{RECOMMENDED}/records",
        HEAD_RATES,
        LAST_CHOICES,
        "gte-small/rates",
    ):
        records = records_of(folder)
        told.append((len(records), number(sum(record["seconds"]["total"] for record in records) / 3600, 1)))
    (small, small_hours), (large, hours), (longer, longer_hours), (preset, preset_hours), *told = told
    (heads, head_hours), (last, last_hours), (rates, rate_hours) = told
    assert found["runs, hours of computing"] == [
        f"{small}, {small_hours}",
        f"{large}, {hours}; {longer} of 50 epochs, {longer_hours}; {preset} of `unipelt`, {preset_hours}; {heads} "
        f"for rates of the head, {head_hours}; {last} of last choices, {last_hours}; and {rates} for the rates, "
        f"{rate_hours}",
    ]
    assert f"in {small + large + longer + preset + heads + last} runs that anybody" in page()


def corrected(difference: Difference) -> str:
    """The p value, corrected."""
    assert difference.holm is not None
    return "p < 0.001" if difference.holm < 0.001 else f"p = {difference.holm:.3f}"


def over_tasks(difference: Difference) -> str:
    assert difference.over_tasks is not None
    return span(difference.over_tasks)


def against_single() -> list[str]:
    """Against the best single method, in the page's words."""
    apl, tuned, picked = (compared(row, "single") for row in ("unipelt-apl", "fine-tuning", PICKED))
    assert {found.against for found in (apl, tuned, picked)} == {"lora"}
    assert [found.clear for found in (apl, tuned, picked)] == [True, True, False]
    below = sorted(((effect.mean, task) for task, effect in apl.by_task.items()))
    parts = [f"{signed(mean)} on {NAMES[task]}" for mean, task in below]
    small = compared("unipelt-apl", "single", "minilm")
    assert small.against == "lora, train_head=false"
    assert not small.clear
    return [
        f"{spanned(apl.effect)} against LoRA, {corrected(apl)}",
        f"by task: {', '.join(parts)}",
        f"for other tasks like these the interval is {over_tasks(apl)}",
        f"With 6 layers, on SST-2 alone, it is {spanned(small.effect)} against the best there",
        f"{spanned(tuned.effect)} against LoRA, {corrected(tuned)}; for other tasks {over_tasks(tuned)}",
        f"{spanned(picked.effect)} against LoRA. After the correction that is not clear ({corrected(picked)})",
        f"all {len(comparisons('gte-small'))} comparisons on 12 layers, and all {len(comparisons('minilm'))} on 6",
    ]


def against_the_picked() -> list[str]:
    """Combinations against the single method that is picked on dev."""
    apl, own = (compared(row, "picked") for row in ("unipelt-apl", OWN))
    assert [apl.clear, own.clear] == [True, False]
    assert own.effect.differs
    score = averaged("gte-small", PICKED).replace("<br>", " ")
    return [
        f"It scores {score}",
        f"APL is {spanned(apl.effect)} against it, {corrected(apl)}",
        f"APL with a softmax of its own {spanned(own.effect)}, {corrected(own)}",
    ]


def steadiness() -> list[str]:
    """Deviations over tasks, and of averages."""
    whole = table("gte-small")
    rows = {label: whole.row(method) for label, method in METHODS.items() if method != "unipelt-al"}
    mean = {label: statistics.fmean(cell.std or 0.0 for cell in found.values()) for label, found in rows.items()}
    of_average = {label: (whole.average(METHODS[label]) or (0, 0))[1] or 0.0 for label in rows}
    assert sorted(mean, key=mean.__getitem__)[:2] == ["picked on dev", "UniPELT (APL)"]
    order = sorted(of_average, key=of_average.__getitem__)
    assert order[:3] == ["BitFit", "picked on dev", "UniPELT (APL)"]
    apl, lora = "UniPELT (APL)", "LoRA"
    return [
        f"APL has the smallest, {100 * mean[apl]:.2f}; fine-tuning has {100 * mean['fine-tuning']:.2f}, LoRA "
        f"{100 * mean[lora]:.2f}, the adapter {100 * mean['adapter']:.2f}",
        f"The method picked on dev, which trains three times, has {100 * mean['picked on dev']:.2f}",
        f"{100 * of_average['BitFit']:.2f} for BitFit, {100 * of_average['picked on dev']:.2f} for the method picked "
        f"on dev, {100 * of_average[apl]:.2f} for APL, {100 * of_average['fine-tuning']:.2f} for fine-tuning and "
        f"{100 * of_average[lora]:.2f} for LoRA",
    ]


def at_chance() -> list[str]:
    """Scores that are not clearly above the majority class."""
    whole = table("gte-small")
    low = {
        task: [cell.row for cell in whole.column(task) if cell.at_chance(whole.chance(task))] for task in whole.tasks
    }
    assert {task for task, found in low.items() if len(found) == len(whole.column(task))} == {"mrpc", "rte"}
    above = {task: {c.row for c in whole.column(task)} - {*low[task]} for task in ("cola", "qnli", "mnli")}
    assert above["cola"] == {"fine-tuning"}
    assert above["qnli"] == {"fine-tuning", OWN}
    assert above["mnli"] == {"fine-tuning", "bitfit", "lora", PICKED, OWN}
    return [f"{sum(map(len, low.values()))} of the {len(whole.cells)} scores"]


def against_apl() -> list[str]:
    """A softmax of the prefix's own against the paper's, in the page's words."""
    own, single, small = compared(OWN, "paper"), compared(OWN, "single"), compared(OWN, "paper", "minilm")
    assert [own.clear, single.clear, small.clear] == [True, False, False]
    [gates] = [one.tasks for one in gate_agreements(table("gte-small")) if one.row == OWN]
    open_least = sorted((parts["prefix"][0], task) for task, parts in gates.items())
    order = ("stsb", "qqp", "qnli", "mnli", "cola", "mrpc", "rte", "sst2")
    return [
        f"**{spanned(own.effect)} on average over the {WORDS[len(own.tasks)]} tasks of 12 layers, {corrected(own)}**",
        f"For other tasks like these the interval is {over_tasks(own)}",
        ", ".join(f"{spanned(own.by_task[task])} on {NAMES[task]}" for task in order),
        f"On SST-2 with 6 layers it is {spanned(small.effect)}",
        f"By the average it is level with LoRA: {spanned(single.effect)}",
        ", ".join(f"{gate:.2f} on {NAMES[task]}" for gate, task in open_least),
    ]


def turned(effect: MeanEffect) -> MeanEffect:
    """The same difference, the other way round."""
    return MeanEffect(-effect.mean, -(effect.high or 0.0), -(effect.low or 0.0), effect.p, effect.count)


def predicted() -> list[str]:
    """What had been said of QNLI and MNLI."""
    apl, own = compared("unipelt-apl", "single").by_task, compared(OWN, "paper").by_task
    against = {
        task: MeanEffect(-one.mean, -(one.high or 0.0), -(one.low or 0.0), one.p, one.count)
        for task, one in own.items()
    }
    return [
        f"{spanned(apl['qnli'])} against LoRA, {spanned(against['qnli'])} against that variant",
        f"{spanned(apl['mnli'])} against LoRA, {spanned(against['mnli'])} against that variant",
    ]


def with_6_layers() -> list[str]:
    """What heads and gates do on the smaller model, on SST-2 alone."""
    heads = [compared(name, "head", "minilm") for name in HEADS]
    changes = ('gate.pooling="mean"', 'prefix.gating="mass"')
    mean, mass = (compared(f"unipelt-apl, {change}", "paper", "minilm") for change in changes)
    bare = compared("unipelt-apl-nogate", "paper", "minilm")
    assert not any(found.clear or found.effect.differs for found in (mean, mass, bare))
    assert not any(found.clear for found in heads)
    return [
        "{} for BitFit, {} for the prefix and {} for LoRA".format(*(spanned(found.effect) for found in heads)),
        f"APL without gates is {spanned(bare.effect)}",
        f"with gates that average over the padding of their batch too {spanned(mean.effect)}",
        f"with gates that take away the prefix's softmax mass {spanned(mass.effect)}",
    ]


def heads_with_12_layers() -> list[str]:
    """What a head that does not train costs LoRA on STS-B."""
    lora = compared("lora", "head")
    assert lora.clear
    return [
        f"training it gains LoRA {spanned(lora.effect)}, {corrected(lora)}",
        f"without it LoRA scores {flat(cells('gte-small', lora.against)['stsb'])}",
    ]


def with_500() -> list[str]:
    """What K = 500 says, of STS-B alone."""
    apl, own = (compared(row, "single", k=500) for row in ("unipelt-apl", OWN))
    better = compared(OWN, "paper", k=500)
    assert {apl.against, own.against} == {"lora"}
    assert not any(found.clear or found.effect.differs for found in (apl, own, better))
    return [
        f"it is {spanned(apl.effect)} against LoRA",
        f"{spanned(better.effect)} against APL",
        f"{spanned(own.effect)} against LoRA",
    ]


def with_50_epochs() -> list[str]:
    """What training for longer gives APL, on the same examples, and what the variant has without."""
    longer = cells(EPOCHS, "unipelt-apl")["stsb"].scores
    words = []
    for method in ("unipelt-apl", OWN):
        before = cells("gte-small", method)["stsb"].scores
        assert [*before] == [*longer]
        words.append(spanned(mean_effect([longer[seed] - before[seed] for seed in longer])))
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


def by_seed(method: str) -> dict[tuple[int, int], list[float]]:
    """The scores of each seed on the tasks on which the recommended preset was run."""
    tasks = table(RECOMMENDED).tasks
    found = cells(RECOMMENDED if method == "unipelt" else "gte-small", method)
    seeds = [*found[tasks[0]].scores]
    assert len(seeds) == 5
    return {seed: [found[task].scores[seed] for task in tasks] for seed in seeds}


def against_the_preset() -> dict[str, tuple[MeanEffect, float]]:
    """The recommended preset against other methods: the difference by seeds, and its corrected p value."""
    ours, found = by_seed("unipelt"), {}
    for label, method in METHODS.items():
        if label in BESIDE:
            theirs = by_seed(method)
            found[label] = mean_effect([statistics.fmean(ours[s]) - statistics.fmean(theirs[s]) for s in ours])
    corrected_values = holm([effect.p for effect in found.values()])
    return {label: (effect, p or 0.0) for (label, effect), p in zip(found.items(), corrected_values, strict=True)}


def test_the_recommended_preset() -> None:
    columns, found = rows("| with the preset `unipelt` |")
    tasks = [TASKS[name] for name in columns[2:]]
    assert {*tasks} == {*table(RECOMMENDED).tasks}
    assert [*found] == ["`unipelt`", *BESIDE]
    effects = against_the_preset()
    for label, (average, difference, *entries) in found.items():
        method = METHODS.get(label, "unipelt")
        here = cells(RECOMMENDED if method == "unipelt" else "gte-small", method)
        assert entries == [flat(here[task]) for task in tasks], label
        means = [statistics.fmean(scores) for scores in by_seed(method).values()]
        assert average == f"{number(100 * statistics.fmean(means))} ± {100 * statistics.stdev(means):.2f}", label
        if label in effects:
            effect, p = effects[label]
            small = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
            assert difference == f"{spanned(effect)}, {small}", label
    assert effects["LoRA"][0].mean < 0.01, "of the first prediction only the second part came out"
    assert number(100 * effects["APL, `prefix.softmax: own`"][0].mean, 1) == "0.1"
    assert effects["picked on dev"][0].mean < -0.01
    assert {label for label, (_, p) in effects.items() if p < 0.05} == {"UniPELT (APL)", "fine-tuning"}
    ours, beside = (
        cells(RECOMMENDED, "unipelt"),
        {name: cells("gte-small", name) for name in ("unipelt-apl", "lora", OWN)},
    )
    assert ours["mnli"].mean < beside["lora"]["mnli"].mean, "the second prediction came out"
    for task in ("qnli", "mnli"):
        assert ours[task].mean > beside["unipelt-apl"][task].mean
        assert abs(ours[task].mean - beside[OWN][task].mean) < 0.02
    tuned = {
        task: ours[task].mean - cell.mean for task, cell in cells("gte-small", "fine-tuning").items() if task in ours
    }
    assert sorted(tuned, key=lambda task: tuned[task])[:2] == ["qnli", "stsb"]
    below = cells("gte-small", "lora")["sst2"].mean - cells(RECOMMENDED, "unipelt")["sst2"].mean
    assert f"the last missed by {100 * below - 2:.2f}" in page()
    devs = {}
    for method, rate in (("unipelt", "0.002"), ("lora", "0.001")):
        [path] = (RESULTS / "gte-small" / "rates").glob(f"stsb-{method}-K=100-seed=0-lr={rate}-*/result.json")
        devs[method] = 100 * json.loads(path.read_text())["dev"]["metrics"]["spearman"]
    assert f"its dev score on STS-B was {devs['unipelt']:.1f}, and LoRA's {devs['lora']:.1f}" in page()


def points(record: dict[str, Any], figures: dict[str, Any]) -> float:
    """The primary metric in points."""
    return 100 * figures["metrics"][record["task"]["primary"]]


def test_the_rates_of_the_head() -> None:
    columns, found = rows("| dev score, seed 1 |")
    tasks = [TASKS[name] for name in columns[1:]]
    devs: dict[tuple[str, float | None], dict[str, float]] = {}
    for folder in ("gte-small/records", f"{RECOMMENDED}/records", HEAD_RATES):
        for record in records_of(folder):
            settings = record["settings"]
            if (settings["seed"], settings["train_samples"]) == (1, 100):
                head = (settings.get("rates") or {}).get("head")
                task = record["task"]["name"]
                devs.setdefault((record["method"]["name"], head), {})[task] = points(record, record["dev"])
    means = {}
    for label, (mean, *entries) in found.items():
        name, _, rate = label.partition(", head at ")
        key = {"`unipelt`": "unipelt", "LoRA": "lora"}[name], float(rate) if rate else None
        assert entries == [number(devs[key][task]) for task in tasks], label
        means[key] = statistics.fmean(devs[key][task] for task in tasks)
        assert mean == number(means[key]), label
    assert len(means) == 6
    for method in ("unipelt", "lora"):
        assert means[method, None] > max(means[method, 4e-3], means[method, 1e-2]), "nothing gained"
    assert devs["lora", 4e-3]["stsb"] < devs["lora", None]["stsb"] - 5
    [low] = [record for record in records_of(HEAD_RATES) if record["settings"]["rates"]["head"] == 1e-4]
    assert (low["task"]["name"], low["method"]["name"]) == ("stsb", "unipelt")
    assert f"came to {points(low, low['dev']):.1f} on dev" in page()
    assert {f"{epoch['loss']:.1f}" for epoch in low["evaluations"][2:]} == {"2.1"}
    assert "From the third epoch on the dev loss of this run stays at 2.1" in page()


def last_choices() -> list[str]:
    """The page's sentences on the gain of an average of weights, and of the best subset of submodules."""
    records = records_of(LAST_CHOICES)
    changes = {
        id(one): points(one, one["tests"]["average"]) - points(one, one["tests"]["best_epoch"]) for one in records
    }
    taken = sum(one["average"]["taken"] for one in records)
    parts = []
    for label, method in (
        ("LoRA", "lora"),
        ("adapter", "adapter"),
        ("BitFit", "bitfit"),
        ("`unipelt` with dropout", DROPPED),
    ):
        values = [changes[id(one)] for one in records if one["method"]["name"] == method]
        parts.append(f"{signed(statistics.fmean(values) / 100)} for {label}")
    dropped = [one for one in records if one["method"]["name"] == DROPPED]
    gains = [
        (
            points(one, one["dev"]) - max(points(one, epoch) for epoch in one["evaluations"]),
            points(one, one["test"]) - points(one, one["tests"]["best_epoch"]),
        )
        for one in dropped
    ]
    dev, test = (statistics.fmean(column) for column in zip(*gains, strict=True))
    assert all(not one["average"]["taken"] for one in dropped)
    early = sum(one["best"]["epoch"] <= 10 for one in records)
    return [
        f"Dev chose the average in {taken or 'none'} of the {len(records)} runs",
        f"{signed(statistics.fmean(changes.values()) / 100)} on average over the runs: {', '.join(parts)}",
        f"In {early} of the runs the best epoch is one of the first ten of 15",
        f"in {len(dropped)} runs it gains {signed(dev / 100)} on dev and {signed(test / 100)} on the test",
    ]


def test_the_last_choices_by_task() -> None:
    columns, found = rows("| test score, seeds 6 and 7 |")
    tasks = [TASKS[name] for name in columns[1:]]
    methods = {"LoRA": "lora", "adapter": "adapter", "BitFit": "bitfit", "picked on dev": PICKED}
    runs = {
        (one["task"]["name"], one["settings"]["seed"], one["method"]["name"]): one for one in records_of(LAST_CHOICES)
    }
    assert len(runs) == 24
    averages = {}
    for label, (mean, *entries) in found.items():
        scores: dict[str, list[float]] = {task: [] for task in tasks}
        for task in tasks:
            for seed in (6, 7):
                candidates = [runs[task, seed, method] for method in ("adapter", "bitfit", "lora")]
                picked = max(candidates, key=lambda one: points(one, one["dev"]))
                method = methods.get(label, DROPPED)
                one = picked if method == PICKED else runs[task, seed, method]
                chosen = label == "the same, its best subset"
                scores[task].append(points(one, one["test"] if chosen else one["tests"]["best_epoch"]))
        means = {task: statistics.fmean(scores[task]) for task in tasks}
        assert entries == [number(means[task]) for task in tasks], label
        averages[label] = statistics.fmean(means.values())
        assert mean == number(averages[label]), label
        if label == "LoRA":
            first, second = scores["stsb"]
            assert f"LoRA's two scores on STS-B are {abs(second - first):.1f} apart" in page()
    above = {label: (averages["`unipelt` with dropout"] - averages[label]) / 100 for label in ("LoRA", "picked on dev")}
    words = (
        f"{signed(above['LoRA'])} against LoRA and {signed(above['picked on dev'])} against the method picked on dev"
    )
    assert words in page()


SAID = [
    *(*against_single(), *against_the_picked(), *steadiness(), *at_chance(), *against_apl(), *predicted()),
    *(*with_6_layers(), *heads_with_12_layers(), *with_500(), *with_50_epochs(), *last_choices()),
]


@pytest.mark.parametrize("words", SAID)
def test_differences(words: str) -> None:
    assert words in page()


def test_runs_of_code_that_no_commit_holds() -> None:
    results = read_results(RESULTS / "gte-small" / "records")
    dirty = [run for run in results.runs if run.record["code"]["dirty"]]
    assert {(run.method, run.seed) for run in dirty} == {("lora", (1, 1))}
    names = " ".join(sorted(NAMES[run.task] for run in dirty))
    assert names == "CoLA MNLI MRPC QNLI QQP"
    assert "seed 1 of LoRA on CoLA, MNLI, MRPC, QNLI and QQP" in page()


def test_the_chart_at_the_top() -> None:
    text = (HOME / "docs" / "evidence.md").read_text(encoding="utf-8")
    name = re.findall(r"\]\((results/[^)]*\.svg)\)", text)[0]
    assert (HOME / "docs" / name).is_file()
    assert text.index(name) < text.index("\n## ")
    alt = re.findall(r"!\[([^\]]*)\]", text)[0]
    assert alt in (RESULTS / "gte-small" / "report.md").read_text(encoding="utf-8"), "the report's own words"


def test_readme() -> None:
    found = compared(OWN, "paper")
    sentence = (
        f"it gains {number(100 * found.effect.mean, 1)} points on average over {WORDS[len(found.tasks)]} tasks (95 % "
        f"interval {span(found.effect)}; {over_tasks(found)} for other tasks like these)"
    )
    assert sentence in page("README.md")
    theirs, lora = (against_the_preset()[name][0] for name in ("UniPELT (APL)", "LoRA"))
    words = f"it is {number(100 * theirs.mean, 1)} points above APL ({span(theirs)}) and level with LoRA"
    assert words in page("README.md")
    assert f"LoRA ({signed(lora.mean)}, {span(lora)})" in page("README.md")
    apl, own = (compared(row, "single", k=500).effect.mean for row in ("unipelt-apl", OWN))
    assert f"LoRA by {number(-100 * apl, 1)} and above it by {number(100 * own, 1)}" in page("README.md")
