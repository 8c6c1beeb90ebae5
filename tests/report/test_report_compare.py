"""Reports: methods compared by hand, against scipy, and by simulation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_records import make_record, results_of, save, spoil
from scipy import stats

from unipelt.report import write_report
from unipelt.report.blocks import Fold, Grid
from unipelt.report.compare import curves, gate_agreements, upper_bounds
from unipelt.report.costs import costs
from unipelt.report.differences import (
    against_best_single,
    against_frozen_heads,
    against_papers,
    compare_all,
    last_choices,
)
from unipelt.report.group import CANDIDATES, PICKED
from unipelt.report.numbers import NONE
from unipelt.report.paper import TASKS, paper_upper_bound
from unipelt.report.sections import compare_rows
from unipelt.report.significance import MeanEffect, holm, mean_effect


def assert_t_interval(effect: MeanEffect, differences: list[float]) -> None:
    """It is scipy's."""
    wanted = stats.ttest_1samp(differences, 0.0)
    interval = wanted.confidence_interval(0.95)
    assert effect.mean == pytest.approx(np.mean(differences))
    assert (effect.low, effect.high, effect.p) == pytest.approx((interval.low, interval.high, wanted.pvalue))
    assert effect.count == len(differences)


def test_the_upper_bound_by_hand() -> None:
    scores = {"adapter": (0.5, 0.8), "prefix": (0.6, 0.7), "lora": (0.9, 0.9), "unipelt-ap": (0.65, 0.7)}
    records = [
        make_record(task, method, score=score)
        for method, pair in scores.items()
        for task, score in zip(("rte", "sst2"), pair, strict=True)
    ]
    [bound] = upper_bounds(results_of(*records, make_record("cola", "unipelt-ap")).table(100))
    assert (bound.row, bound.tasks, bound.chosen) == (
        "unipelt-ap",
        ("sst2", "rte"),
        {"sst2": "adapter", "rte": "prefix"},
    )
    assert (bound.best, bound.combined, bound.paper) == (pytest.approx(0.7), pytest.approx(0.675), None)


def test_comparisons_on_the_page(tmp_path: Path) -> None:
    scores = {"adapter": 0.5, "prefix": 0.6, "lora": 0.4, "unipelt-apl": 0.7}
    records = [make_record(task, method, score=score) for method, score in scores.items() for task in TASKS]
    for number, record in enumerate(records[:4]):
        spoil(record, parameters__trained=1000 + number)  # the adapter's, on four of its tasks
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()

    def after(heading: str) -> list[str]:
        return [line for line in lines[lines.index(heading) :] if line.startswith("| ")]

    best, combined = paper_upper_bound()[100, "unipelt-apl"]
    bound = after("## Upper bound")[2]
    for words in (
        "| unipelt-apl | K = 100 | 60.00",
        f"paper {best:.2f}",
        "| 70.00",
        f"paper {combined:.2f}",
        "| +10.00",
    ):
        assert words in bound
    assert "sst2: prefix, mrpc: prefix" in bound
    test = next(
        line
        for line in after("## Every method against the best single method")
        if line.startswith("| unipelt-apl | K = 100 | prefix")
    )
    assert f"| +10.00<br>+10.00 to +10.00 | {NONE} | +10.00 to +10.00 |" in test, "equal differences have no t-test"
    cost = next(line for line in after("## Parameters and time") if line.startswith("| adapter"))
    assert "| 1,000 to 391,000" in cost


def test_where_the_paper_says_nothing_the_page_has_our_numbers_alone(tmp_path: Path) -> None:
    scores = {"adapter": 0.5, "prefix": 0.6, "lora": 0.4, "unipelt-apl": 0.7}
    records = [
        make_record(task, method, score=score, k=64) for method, score in scores.items() for task in ("rte", "cola")
    ]
    for record in records:
        spoil(record, parameters__base=0)
    table = results_of(*records).table(64)
    assert table.average("adapter") is not None
    assert table.paper_average("adapter") is None
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| unipelt-apl | K = 64 | 60.00 | 70.00 | +10.00 |" in text
    assert not re.search(r"paper -?\d+\.\d\d", text)
    assert "of the base" not in text
    assert "paper" not in text.lower(), "neither of its scores nor of its costs"


def test_a_stray_run_with_another_learning_rate_does_not_end_comparisons() -> None:
    """Learning rates are the methods' own; models must agree."""
    methods = {"fine-tuning": 2e-5, "adapter": 1e-4, "prefix": 2e-4, "unipelt-ap": 5e-4}
    records = [
        make_record(task, method, seed, 0.6, learning_rate=rate, model=model)
        for method, rate in methods.items()
        for task in ("rte", "sst2")
        for seed in (1, 2)
        for model in ("small", "large")
        if (method, model) != ("prefix", "large")
    ]
    stray = make_record("rte", "adapter", score=0.9, learning_rate=1e-2, model="small")
    table = results_of(*records, stray).table(100)
    assert {"adapter [model=small, learning_rate=0.01]", "unipelt-ap [model=small]", "prefix [model=small]"} <= {
        *table.rows
    }
    [bound] = upper_bounds(table)
    assert (bound.row, bound.tasks) == ("unipelt-ap [model=small]", ("sst2", "rte"))
    assert bound.best == pytest.approx(0.6), "the adapter's row is the one with the most tasks"
    tests = {test.row: test.among for test in against_best_single(table)}
    assert {row: among for row, among in tests.items() if row.startswith("unipelt")} == {
        "unipelt-ap [model=small]": ("adapter [model=small, learning_rate=0.0001]", "prefix [model=small]"),
        "unipelt-ap [model=large]": ("adapter [model=large, learning_rate=0.0001]",),
    }
    assert all(line["training"] == 1.0 for line in costs(table))


def test_the_best_single_method_has_the_best_mean_over_the_tasks() -> None:
    scores = {"adapter": (0.5, 0.8), "prefix": (0.7, 0.7), "bitfit": (0.1, 0.2), "fine-tuning": (0.9, 0.9)}
    scores["unipelt-ap"] = (0.75, 0.8)
    records = [
        make_record(task, method, seed, score + 0.01 * seed * (method == "unipelt-ap"))
        for method, pair in scores.items()
        for task, score in zip(("rte", "sst2"), pair, strict=True)
        for seed in (1, 2)
    ]
    extra = [make_record("sst2", {"preset": "adapter", "adapter": {"bottleneck": 64}}, name="adapter, 64", score=0.99)]
    table = results_of(*records[:-1], *extra).table(100)
    [test] = [found for found in against_best_single(table) if found.row == "unipelt-ap"]
    assert (test.against, test.among) == ("prefix", ("bitfit", "adapter", "prefix"))
    assert (test.tasks, test.pairs) == (("sst2", "rte"), 3), "a seed that one of the two lacks makes no pair"
    assert test.effect.mean == pytest.approx((0.06 + 0.07 + 0.11) / 3)
    assert test.unit == "pairs", "tasks have different seeds"
    alone = test.by_task["sst2"]
    assert alone.mean == pytest.approx(0.11)
    assert (alone.low, alone.high, alone.p, alone.count) == (None, None, None, 1), "one pair has no interval"
    reach = stats.t.ppf(0.975, 1) * 0.005
    assert test.by_task["rte"].mean == pytest.approx(0.065)
    assert (test.by_task["rte"].low, test.by_task["rte"].high) == pytest.approx((0.065 - reach, 0.065 + reach))
    rows = {found.row for found in against_best_single(table)}
    assert {"fine-tuning", "bitfit", "adapter"} <= rows, "every row is compared, fine-tuning too"
    assert "prefix" not in rows, "but itself"


def test_a_combination_without_single_methods_is_compared_with_none() -> None:
    table = results_of(*(make_record(task, "unipelt-ap", seed) for task in ("rte", "sst2") for seed in (1, 2))).table(
        100
    )
    assert compare_all([table]) == []
    assert upper_bounds(table) == []


def test_what_a_head_that_trains_gains_is_paired_by_task_and_seed(tmp_path: Path) -> None:
    frozen = {"preset": "lora", "train_head": False}
    records = [
        *(make_record(task, "lora", seed, 0.7 + 0.01 * seed) for task in ("rte", "sst2") for seed in (1, 2)),
        make_record("rte", frozen, 1, 0.51, name="lora, train_head=false"),
        make_record("rte", frozen, 2, 0.62, name="lora, train_head=false"),
        make_record("mrpc", frozen, 1, 0.1, name="lora, train_head=false"),  # no pair
        make_record("rte", "adapter", 1, 0.9),  # another method
        *(
            make_record("rte", {"preset": "prefix", "train_head": False}, seed, 0.2, name="prefix, train_head=false")
            for seed in (1, 2)
        ),
        *(make_record("rte", "prefix", seed, 0.9, learning_rate=2e-4) for seed in (1, 2)),  # another learning rate
    ]
    elsewhere = [make_record("rte", "lora", seed, 0.3, model="another") for seed in (1, 2)]
    [other] = against_frozen_heads(results_of(*records, *elsewhere).table(100))
    assert other.row == "lora [model=bert-base-uncased]", "not a pair of another model"
    [effect] = against_frozen_heads(results_of(*records).table(100))
    assert (effect.row, effect.against) == ("lora", "lora, train_head=false")
    assert (effect.tasks, effect.pairs) == (("rte",), 2)
    assert_t_interval(effect.effect, [0.2, 0.1])
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    section = text.partition("## Heads that train against heads that do not")[2]
    assert "| lora | K = 100 | lora, train_head=false | +15.00<br>−48.53 to +78.53 |" in section  # noqa: RUF001


def test_other_combinations_are_paired_with_the_papers_by_task_and_seed(tmp_path: Path) -> None:
    mass = {"preset": "unipelt-apl", "prefix": {"gating": "mass"}}
    records = [
        *(make_record(task, "unipelt-apl", seed, 0.6 + 0.01 * seed) for task in ("rte", "sst2") for seed in (1, 2)),
        make_record("rte", mass, 1, 0.71, name="unipelt-apl, mass", learning_rate=5e-4),  # whatever its rate
        make_record("rte", mass, 2, 0.67, name="unipelt-apl, mass", learning_rate=5e-4),
        make_record("mrpc", mass, 1, 0.1, name="unipelt-apl, mass", learning_rate=5e-4),  # no pair
        *(make_record("rte", "unipelt-apl", seed, 0.2, max_length=64) for seed in (1, 2)),  # another setting
        *(make_record("rte", "lora", seed, 0.9) for seed in (1, 2)),  # one submodule
    ]
    [effect] = against_papers(results_of(*records).table(100))
    assert effect.row.startswith("unipelt-apl, mass")
    assert effect.against.startswith("unipelt-apl")
    assert (effect.tasks, effect.pairs) == (("rte",), 2)
    assert_t_interval(effect.effect, [0.1, 0.05])
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    section = text.partition("## Other combinations against UniPELT(APL)")[2]
    assert "+7.50<br>−24.27 to +39.27 |" in section  # noqa: RUF001


def test_last_choices_are_compared_with_the_best_epoch_of_the_same_runs(tmp_path: Path) -> None:
    """The first seed takes the average, the second does not. Runs without such choices have no line."""
    scores = {  # of the best epoch, of the average, and of what was tested
        ("rte", 1): (0.50, 0.56, 0.56),
        ("rte", 2): (0.60, 0.58, 0.60),
        ("sst2", 1): (0.70, 0.74, 0.74),
        ("sst2", 2): (0.80, 0.78, 0.80),
    }
    records = []
    for (task, seed), (best, average, tested) in scores.items():
        metrics = [{"loss": 0.7, "metrics": {"accuracy": score}} for score in (best, average)]
        tests = dict(zip(("best_epoch", "average"), metrics, strict=True))
        records.append(spoil(make_record(task, "lora", seed, tested), tests=tests))
        records.append(make_record(task, "adapter", seed, 0.5))
    found = {difference.kind: difference for difference in last_choices(results_of(*records).table(100))}
    assert [*found] == ["average", "tested"]
    assert {(one.row, one.against, one.tasks, one.pairs) for one in found.values()} == {
        ("lora", "best epoch", ("sst2", "rte"), 4)
    }
    assert_t_interval(found["average"].effect, [0.05, -0.02])  # the mean over the tasks for each seed
    assert_t_interval(found["tested"].effect, [0.05, 0.0])
    assert_t_interval(found["average"].by_task["rte"], [0.06, -0.02])

    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    section = text.partition("## Averages of weights against the weights of the best epoch")[2].partition("\n## ")[0]
    assert "| lora | K = 100 | best epoch | +1.50<br>" in section
    assert "adapter" not in section
    section = text.partition("## Last choices against the weights of the best epoch")[2].partition("\n## ")[0]
    assert "| lora | K = 100 | best epoch | +2.50<br>" in section


def test_a_choice_of_submodules_alone_has_no_average() -> None:
    tests = {"best_epoch": {"loss": 0.7, "metrics": {"accuracy": 0.5}}}
    records = [spoil(make_record("rte", "unipelt-ap", seed, 0.5 + seed / 100), tests=tests) for seed in (1, 2)]
    [found] = last_choices(results_of(*records).table(100))
    assert found.kind == "tested"
    assert_t_interval(found.effect, [0.01, 0.02])
    records.append(make_record("rte", "unipelt-ap", 3))
    assert not list(last_choices(results_of(*records).table(100))), "a run of the row has no such choice"


def test_the_last_choices_of_the_methods_picked_on_dev_are_not_compared_again() -> None:
    tests = {"best_epoch": {"loss": 0.7, "metrics": {"accuracy": 0.5}}}
    records = [spoil(make_record("rte", method, seed), tests=tests) for method in CANDIDATES for seed in (1, 2)]
    table = results_of(*records).table(100)
    assert PICKED in table.rows
    assert {one.row for one in last_choices(table)} == {*CANDIDATES}


def test_a_method_that_selects_is_compared_with_one_that_has_nothing_to_select() -> None:
    """And its own runs without a selection are another row."""
    records = [make_record("rte", "lora", seed, 0.5, select=False) for seed in (1, 2)]
    for select in (False, True):
        records += [make_record("rte", "unipelt-ap", seed, 0.6 + 0.1 * select, select=select) for seed in (1, 2)]
    found = against_best_single(results_of(*records).table(100))
    assert {(one.row, one.against) for one in found} == {
        (f"unipelt-ap [select={select}]", "lora") for select in ("null", "true")
    }


def test_gates_beside_what_submodules_do_alone(tmp_path: Path) -> None:
    """Prefix gates are the most open everywhere; only less their mean do they go with the prefix's scores."""
    alone = {"rte": (0.5, 0.6), "sst2": (0.9, 0.6), "mrpc": (0.7, 0.6)}  # adapter, prefix
    gates = {"rte": (0.2, 0.9), "sst2": (0.4, 0.5), "mrpc": (0.3, 0.7)}
    records = []
    for task in alone:
        for seed in (1, 2):
            record = make_record(task, "unipelt-ap", seed, 0.5)
            record["gates"]["values"] = {
                name: {"mean": [gate - 0.05 * seed, gate + 0.05 * seed], "std": [0.0, 0.0]}
                for name, gate in zip(("adapter", "prefix"), gates[task], strict=True)
            }
            records.append(record)
        records += [make_record(task, part, 1, alone[task][i]) for i, part in enumerate(("adapter", "prefix"))]
    [found] = gate_agreements(results_of(*records).table(100))
    assert found.row == "unipelt-ap"
    assert {task: {part: gate for part, (gate, _) in parts.items()} for task, parts in found.tasks.items()} == {
        task: pytest.approx({"adapter": adapter, "prefix": prefix}) for task, (adapter, prefix) in gates.items()
    }
    assert found.tasks["sst2"]["adapter"][1] == 0.9
    assert found.agreeing == ("rte",)
    centred = [np.array([[values[task][part] for task in found.tasks] for part in (0, 1)]) for values in (gates, alone)]
    gate, score = ((value - value.mean(axis=1, keepdims=True)).round(12).ravel() for value in centred)
    assert found.correlation == pytest.approx(stats.spearmanr(gate, score).statistic, abs=1e-6)
    assert found.correlation is not None
    assert found.correlation > 0
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").partition("## Gates and the better")[2]
    assert "in 1 of 3 tasks; by chance it would be in one of 2." in text
    assert "| rte | 0.200<br>alone 50.00 | **0.900**<br>alone 60.00, the best |" in text
    assert "| sst2 | 0.400<br>alone 90.00, the best | **0.500**<br>alone 60.00 |" in text


def test_gates_beside_scores_need_both() -> None:
    pair = [make_record("rte", "adapter"), make_record("rte", "prefix")]
    assert gate_agreements(results_of(*pair, make_record("rte", "unipelt-ap-nogate")).table(100)) == []
    assert gate_agreements(results_of(pair[0], make_record("rte", "unipelt-ap")).table(100)) == []
    [found] = gate_agreements(results_of(*pair, make_record("rte", "unipelt-ap")).table(100))
    assert found.correlation is None, "of one task"


def test_curves_are_of_methods_that_differ_in_one_number() -> None:
    sizes = [{"preset": "adapter", "adapter": {"bottleneck": size}} for size in (256, 48, 96)]
    records = [
        make_record("cola", size, seed, 0.1 * index, name=f"adapter, {index}")
        for index, size in enumerate(sizes)
        for seed in (1, 2)
    ]
    others: list[dict[str, Any]] = [
        {"preset": "lora", "lora": {"alpha": 32}},
        {"preset": "lora", "lora": {"alpha": 8, "rank": 4}},
    ]
    records += [make_record("cola", other, name=f"lora, {index}") for index, other in enumerate(others)]
    [curve] = curves(results_of(*records))
    assert curve.key == "adapter.bottleneck"
    assert [(size, round(cell.mean, 6), len(cell.runs)) for size, cell in curve.cells.items()] == [
        (48.0, 0.1, 2),
        (96.0, 0.2, 2),
        (256.0, 0.0, 2),
    ]


def test_times_are_relative_to_fine_tuning_on_the_same_tasks() -> None:
    whole = [spoil(make_record(task, "fine-tuning"), seconds__train=t) for task, t in (("rte", 21.0), ("sst2", 42.0))]
    ours = spoil(make_record("rte", "lora", epochs=6), seconds__train=21.0, seconds__evaluation=20.0)
    lines = {line["row"]: line for line in costs(results_of(*whole, ours).table(100))}
    assert lines["lora"]["training"] == pytest.approx((21 / 42) / (21 / 21)), "a step: 42 steps against 21"
    assert lines["lora"]["inference"] == pytest.approx((20 / 800) / (15 / 500)), "an evaluated example"
    assert lines["fine-tuning"]["training"] == 1.0
    assert costs(results_of(ours).table(100))[0]["training"] is None
    for part in ("dev", "test"):
        unknown = spoil(make_record("rte", "lora"), **{f"data__{part}": {"rows": None}})
        [line] = [line for line in costs(results_of(*whole, unknown).table(100)) if line["row"] == "lora"]
        assert line["inference"] is None, "how many examples were evaluated is not known"


def test_the_evaluations_of_averages_and_of_selections_count_as_inference() -> None:
    """Three epochs and so many more passes over 100 dev rows, and so many over 200 test rows, took 20 seconds."""
    base = spoil(make_record("rte", "fine-tuning"), seconds__evaluation=5.0)  # 500 rows in 5 seconds
    further: dict[str, Any]
    for further, passes, tests in (
        ({}, 3, 1),
        ({"average": {}}, 4, 1),  # a record of before the choices were tested
        ({"average": {}, "tests": {"best_epoch": {}, "average": {}}}, 4, 3),
        ({"selected": {"subsets": [{}, {}, {}]}, "tests": {"best_epoch": {}}}, 6, 2),
    ):
        ours = spoil(make_record("rte", "lora"), seconds__evaluation=20.0) | further
        [line] = [line for line in costs(results_of(base, ours).table(100)) if line["row"] == "lora"]
        assert line["inference"] == pytest.approx(20 / (100 * passes + 200 * tests) * 100)


# Statistics


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_the_interval_and_its_p_value_agree_with_scipy(count: int) -> None:
    generator = np.random.default_rng(count)
    ours, theirs = generator.normal(0.62, 0.05, count), generator.normal(0.6, 0.05, count)
    effect = mean_effect(list(ours - theirs))
    assert_t_interval(effect, list(ours - theirs))
    assert effect.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert effect.differs == (effect.p is not None and effect.p < 0.05), "an interval without 0 is p < 0.05"


def test_of_five_pairs_the_interval_holds_the_mean_in_95_percent() -> None:
    """By simulation. A percentile bootstrap of five, which stood here before, holds it in 84."""
    generator = np.random.default_rng(0)
    draws = generator.normal(0.02, 0.05, size=(4000, 5))
    effects = [mean_effect(row) for row in draws]
    held = np.mean([effect.low <= 0.02 <= effect.high for effect in effects])  # type: ignore[operator]
    assert held == pytest.approx(0.95, abs=0.011), "three standard errors of the simulation"
    resampled = draws[:, generator.integers(5, size=(1000, 5))].mean(axis=2)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    assert np.mean((low <= 0.02) & (high >= 0.02)) < 0.87


def test_over_seeds_the_interval_holds_the_mean_of_these_tasks() -> None:
    """Tasks differ widely, and one is much noisier; the interval is still right for these tasks with other seeds."""
    generator = np.random.default_rng(1)
    truth, noise = np.array([0.25, 0.02, 0.0, -0.03]), np.array([0.08, 0.01, 0.03, 0.02])
    held = []
    for _ in range(2000):
        values = generator.normal(truth[:, None], noise[:, None], size=(4, 5))
        effect = mean_effect(values.mean(axis=0))
        held.append(effect.low <= truth.mean() <= effect.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.1, 0.1]])
def test_without_spread_there_is_no_p_value(values: list[float]) -> None:
    effect = mean_effect(values)
    assert (effect.mean, effect.low, effect.high) == pytest.approx((values[0],) * 3)
    assert (effect.p, effect.count) == (None, len(values))


def test_of_one_difference_nothing_is_known_but_itself() -> None:
    effect = mean_effect([0.25])
    assert effect == MeanEffect(0.25, None, None, None, 1)
    assert not effect.differs


@pytest.mark.parametrize(("middle", "differs"), [(0.03, True), (0.02, False), (-0.02, False), (-0.03, True)])
def test_a_mean_differs_where_its_interval_is_on_one_side_of_zero(middle: float, differs: bool) -> None:
    """Of middle - 0.01, middle, middle + 0.01 the interval reaches 4.303 * 0.01 / sqrt(3) = 0.0248 each way."""
    effect = mean_effect([middle - 0.01, middle, middle + 0.01])
    assert effect.differs is differs
    assert mean_effect([middle, middle]).differs, "without spread the interval is the mean"


def test_holms_correction_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.04 x 2 (not below the one before), 0.9 x 1."""
    assert holm([0.04, 0.01, None, 0.9, 0.02]) == pytest.approx([0.08, 0.04, None, 0.9, 0.06])
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04]), "never below that of a smaller one"
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holms_correction_keeps_false_calls_rare() -> None:
    """Of 20 comparisons without any difference, at most 5 % of pages call one; uncorrected, 64 % do."""
    generator = np.random.default_rng(2)
    pages = generator.uniform(size=(2000, 20))
    corrected = [min(value for value in holm(list(page)) if value is not None) for page in pages]
    assert np.mean(np.array(corrected) < 0.05) < 0.065
    assert np.mean(pages.min(axis=1) < 0.05) > 0.6


@pytest.mark.parametrize("tasks", [("rte", "sst2"), ("rte", "sst2", "mrpc")])
def test_intervals_over_seeds_and_over_tasks(tasks: tuple[str, ...]) -> None:
    generator = np.random.default_rng(4)
    gain = {task: generator.normal(0.05 * index, 0.02, 5) for index, task in enumerate(tasks)}
    records = [
        make_record(task, method, seed, 0.6 + (gain[task][seed - 1] if method == "unipelt-ap" else 0.0))
        for task in tasks
        for method in ("adapter", "unipelt-ap")
        for seed in range(1, 6)
    ]
    [test] = compare_all([results_of(*records).table(100)])
    values = np.array([gain[task] for task in test.tasks])
    assert (test.pairs, test.unit) == (5 * len(tasks), "seeds")
    assert_t_interval(test.effect, list(values.mean(axis=0)))
    for task, found in zip(test.tasks, values, strict=True):
        assert_t_interval(test.by_task[task], list(found))
    assert (test.over_tasks is None) == (len(tasks) < 3)
    if test.over_tasks is not None:
        assert_t_interval(test.over_tasks, list(values.mean(axis=1)))


def test_each_task_has_an_interval_of_its_own_in_a_fold() -> None:
    """Three seeds with differences 0.01 apart: the interval reaches 2.48 points each way."""
    gains = {"sst2": (0.09, 0.1, 0.11), "rte": (-0.01, 0.0, 0.01)}
    records = [
        make_record(task, method, seed, 0.5 + gain * (method == "unipelt-ap"))
        for task, found in gains.items()
        for seed, gain in enumerate(found, 1)
        for method in ("adapter", "unipelt-ap")
    ]
    blocks = compare_rows(compare_all([results_of(*records).table(100)]))
    [fold] = [block for block in blocks if isinstance(block, Fold) and block.title == "By task"]
    [grid] = [block for block in fold.blocks if isinstance(block, Grid)]
    assert list(grid.head) == ["method", "sst2", "rte"]
    assert grid.rows == [
        [
            [("unipelt-ap", ""), ("K = 100, against adapter", "minor")],
            [("+10.00", "clear"), ("+7.52 to +12.48", "minor")],
            [("+0.00", ""), ("−2.48 to +2.48", "minor")],  # noqa: RUF001
        ]
    ]


def test_all_comparisons_of_a_page_are_one_family() -> None:
    """Those of both values of K are corrected together."""
    generator = np.random.default_rng(5)
    methods = ("adapter", "bitfit", "lora", "unipelt-ap", "unipelt-apl")
    records = [
        make_record("rte", method, seed, float(generator.uniform(0.5, 0.6)), k=k)
        for method in methods
        for k in (100, 500)
        for seed in (1, 2, 3)
    ]
    results = results_of(*records)
    found = compare_all([results.table(k) for k in results.ks])
    kinds_found = Counter((difference.kind, difference.k) for difference in found)
    assert kinds_found == {
        **{("single", k): 5 for k in (100, 500)},  # two singles, the picked one, two combinations
        **{("picked", k): 2 for k in (100, 500)},
        **{("paper", k): 1 for k in (100, 500)},
    }
    assert [difference.holm for difference in found] == holm([difference.effect.p for difference in found])
