"""Reports: what is averaged and what is not, the paper's numbers, what a folder may hold."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.spoilt import BAD_FAILURES, BAD_REQUESTS
from report_records import by_row, make_record, plan, results_of, save, spoil

from unipelt.config.presets import resolve
from unipelt.config.submodule import SUBMODULES
from unipelt.records.record import Floor, write_result
from unipelt.report import read_results, write_report
from unipelt.report.cells import kinds
from unipelt.report.chosen import without_chosen
from unipelt.report.compare import marks, upper_bounds
from unipelt.report.group import CANDIDATES, PICKED
from unipelt.report.numbers import percent
from unipelt.report.paper import TASKS, paper, paper_costs, paper_upper_bound
from unipelt.report.results import Results

# The paper's numbers


def from_the_paper() -> Results:
    """A run for each number that the paper prints."""
    return results_of(
        *(
            make_record(task, method.partition(",")[0], score=number.mean / 100, k=k, name=method)
            for (k, method, task), number in paper().items()
            if task != "average"
        )
    )


def test_the_papers_numbers_agree_with_each_other() -> None:
    """Its averages are those of its cells, and its Table 2 follows from its Table 1 by our upper bound."""
    results = from_the_paper()
    assert results.ks == [100, 500, 1000, None]
    averages = bounds = 0
    for k in results.ks:
        table = results.table(k)
        assert tuple(table.tasks) == TASKS
        for row in (row for row in table.rows if not table.first(row).picked):
            slack = 0.02 if "length=50" in row else 0.011  # the paper prints 47.56 where its cells make 47.58
            average, printed = table.average(row), paper()[k, row, "average"].mean
            assert average is not None
            assert 100 * average[0] == pytest.approx(printed, abs=slack), (k, row)
            assert table.paper_average(row) == pytest.approx(printed, abs=slack)
            averages += 1
        for bound in upper_bounds(table):
            if k is not None:
                assert bound.paper == paper_upper_bound()[k, bound.row]
                assert (100 * bound.best, 100 * bound.combined) == pytest.approx(bound.paper, abs=0.011), (k, bound.row)
                bounds += 1
    assert (averages, bounds) == (8 + 7 + 7 + 7, 6)
    assert all(cell.paper and 100 * cell.mean == pytest.approx(cell.paper.mean) for cell in results.cells)


def test_the_papers_numbers_by_sample() -> None:
    assert (paper()[100, "unipelt-apl", "rte"].mean, paper()[100, "unipelt-apl", "rte"].std) == (55.45, 1.28)
    assert paper()[100, "prefix, prefix.length=50", "cola"].mean == 5.19
    assert (paper()[None, "lora", "cola"].mean, paper()[None, "lora", "cola"].std) == (60.47, None)
    assert paper_costs()["unipelt-apl", "inference_time_percent"] == "127"
    assert paper_costs()["prefix", "parameters"] == "184K"


def test_the_papers_number_is_for_the_same_metric_only() -> None:
    record = make_record("mrpc", score=0.8)
    for part in ("dev", "test"):
        record[part]["metrics"]["accuracy"] = 0.7
    assert results_of(record).cells[0].paper == paper()[100, "adapter", "mrpc"]
    record["task"]["primary"] = "accuracy"
    for evaluation in record["evaluations"]:
        evaluation["metrics"]["accuracy"] = 0.7
    assert results_of(record).cells[0].paper is None
    assert results_of(make_record(k=200)).cells[0].paper is None


def test_rows_and_tasks_have_the_order_of_the_papers_tables() -> None:
    """Single methods, then other methods, then combinations; the paper's tasks, then other tasks by name."""
    methods = ("fine-tuning", "bitfit", "adapter", "prefix", "lora", "ia3", "unipelt-ap-nogate", "unipelt-ap")
    names = (*methods, "unipelt-apl", "unipelt-al", "prefix, prefix.length=50")
    tasks = ("mnli", "another", "rte", "zoo", "sst2")
    records = [
        make_record(task, name.partition(",")[0], seed, name=name, max_length=length)
        for task in tasks
        for name in reversed(names)
        for seed, length in ((1, 64), (2, 128))
    ]
    table = results_of(*records).table(100)
    assert table.tasks == ["sst2", "rte", "mnli", "another", "zoo"]
    assert table.rows == [
        f"{name} [max_length={length}]"
        for name in (
            *("fine-tuning", "bitfit", "adapter", "prefix", "prefix, prefix.length=50", "lora", PICKED, "ia3"),
            *("unipelt-ap-nogate", "unipelt-ap", "unipelt-apl", "unipelt-al"),
        )
        for length in (128, 64)
    ]


# What is averaged


def test_mean_and_deviation_by_hand(tmp_path: Path) -> None:
    save(
        tmp_path / "runs",
        *(make_record(seed=s, score=x) for s, x in ((1, 0.5), (2, 0.6), (3, 0.7))),
        make_record("sst2"),
    )
    write_report(tmp_path / "runs", tmp_path / "out")
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        lines = {line["task"]: line for line in csv.DictReader(file)}
    rte = lines["rte"]
    assert (rte["k"], rte["method"], rte["seeds"], rte["mean"], rte["std"]) == (
        "100",
        "adapter",
        "3",
        "60.0000",
        "10.0000",
    )
    assert (rte["paper_mean"], rte["paper_std"], rte["difference"]) == ("52.78", "0.27", "7.2200")
    assert (rte["trained"], rte["deployed"], rte["head"], rte["seconds"]) == ("391000", "180000", "1538", "60.0000")
    assert (lines["sst2"]["std"], lines["sst2"]["missing_seeds"]) == ("", "2, 3"), "one run has no deviation"
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["run"], run["task"], run["seed"], run["test"]) for run in runs] == [
        *(("run-000", "rte", "1", "0.5"), ("run-001", "rte", "2", "0.6"), ("run-002", "rte", "3", "0.7")),
        ("run-003", "sst2", "1", "0.5"),
    ]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "60.00 ± 10.00" in page
    assert "paper 52.78 ± 0.27" in page
    assert "+7.22 · n = 3" in page
    assert "without seed 2, 3" in page


def test_what_differs_in_more_than_seeds_is_not_averaged() -> None:
    plain = make_record(score=0.5)
    others = {
        "batch_size": make_record(score=0.6, batch_size=8),
        "model": make_record(score=0.7, model="another"),
        "learning_rate": make_record(score=0.8, learning_rate=1e-3),
    }
    other_data = make_record(score=0.9)
    other_data["data"]["test"]["sha256"] = "f" * 64
    for other in (*others.values(), other_data):
        cells = results_of(plain, other).cells
        assert sorted(cell.mean for cell in cells) == [0.5, other["test"]["metrics"]["accuracy"]]
        assert all(cell.row.startswith("adapter [") for cell in cells)
    elsewhere = make_record(seed=2, score=0.6, glue_dir="/elsewhere", output_dir="/x", threads=3, device="cuda")
    assert [cell.mean for cell in results_of(plain, elsewhere).cells] == [pytest.approx(0.55)]


def test_the_order_in_which_a_configuration_was_written_does_not_matter() -> None:
    record = make_record(seed=2)
    record["method"]["config"] = dict(reversed(record["method"]["config"].items()))
    assert len(results_of(make_record(seed=1), record).cells) == 1


def test_what_a_method_adds() -> None:
    added = {name: kinds(resolve(name).to_dict()) for name in ("fine-tuning", "bitfit", "lora", "unipelt-apl")}
    assert added == {
        "fine-tuning": [],
        "bitfit": ["bitfit"],
        "lora": ["lora"],
        "unipelt-apl": ["adapter", "prefix", "lora"],
    }
    assert [kinds(resolve(name).to_dict()) for name in ("houlsby", "mam", "unipelt-mam", "prompt")] == [
        ["houlsby"],
        ["prefix", "parallel"],
        ["prefix", "parallel"],
        ["prompt"],
    ]
    assert kinds(resolve({"preset": "lora", "ia3": {}, "bitfit": True}).to_dict()) == ["lora", "ia3", "bitfit"]
    assert kinds({**resolve("lora").to_dict(), "peft": {"type": "OFT"}}) == ["lora", "peft_oft"]
    assert kinds({"lora": {"mixture": {"experts": 2}}, "zed": {"mixture": None}, "gate": {}}) == ["lora-mixture", "zed"]
    assert kinds({**resolve("lora").to_dict(), "of_another_program": {"width": 3}}) == ["lora", "of_another_program"]


@pytest.mark.parametrize("name", sorted(SUBMODULES))
def test_every_submodule_is_a_single_method(name: str) -> None:
    table = results_of(make_record("rte", name), make_record("rte", "unipelt-mam")).table(100)
    assert table.singles("") == [name]
    assert table.combined() == ["unipelt-mam"]


def test_the_average_is_over_all_tasks_or_is_not() -> None:
    scores = {("rte", 1): 0.4, ("rte", 2): 0.6, ("sst2", 1): 0.7, ("sst2", 2): 0.7}
    records = [make_record(task, seed=seed, score=score) for (task, seed), score in scores.items()]
    table = results_of(*records, make_record("rte", "lora")).table(100)
    mean, std = table.average("adapter") or (None, None)
    assert mean == pytest.approx(0.6)
    assert std == pytest.approx(math.sqrt(2) * 0.05), "of the seeds' averages, 0.55 and 0.65"
    assert table.paper_average("adapter") == pytest.approx((52.78 + 80.48) / 2)
    assert table.average("lora") is None
    mean, std = results_of(*records[:3]).table(100).average("adapter") or (None, None)
    assert mean == pytest.approx(0.6)
    assert std is None, "tasks have different seeds"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.3, 0.2, 0.0], ["", "best", "second", ""]),
        ([0.3, None, 0.3, 0.2], ["best", "", "best", "second"]),
        ([0.30001, 0.30002, 0.2, 0.2], ["best", "best", "second", "second"]),
        ([0.3, None], ["", ""]),
        ([0.2, None, 0.3], ["second", "", "best"]),
        ([], []),
    ],
)
def test_best_and_second_best(values: list[float | None], expected: list[str]) -> None:
    assert marks(values) == expected


def test_best_and_second_best_on_the_page(tmp_path: Path) -> None:
    methods = {"adapter": 0.5, "lora": 0.7, "prefix": 0.6}
    save(tmp_path / "runs", *(make_record("x", method, score=score) for method, score in methods.items()))
    write_report(tmp_path / "runs", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    compact, whole = page.partition("All numbers")[::2]
    for table in (compact, whole):
        assert re.findall(r"<strong>(.*?)</strong>", table) == ["70.00"]
        assert re.findall(r"<u>(.*?)</u>", table) == ["60.00"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| lora | **70.00**<br>n = 1 |" in text
    assert "| prefix | <u>60.00</u><br>n = 1 |" in text


def gates_of(*means: Any) -> dict[str, Any]:
    return {"layers": [0], "values": {"adapter": {"mean": list(means)}}}


def of_test(**scores: Any) -> dict[str, Any]:
    return {name: {"loss": 0.7, "metrics": {"accuracy": score}} for name, score in scores.items()}


def test_damaged_and_foreign_files_are_named_and_left_out(tmp_path: Path) -> None:
    good = make_record(score=0.6)
    moved = spoil(make_record(score=0.9), settings__glue_dir="/elsewhere")
    cases = {
        "broken": ("{", "is not valid JSON"),
        "foreign": ('{"accuracy": 0.5}', "is not the result of a run"),
        "nan": (
            json.dumps(spoil(make_record(seed=2), test__metrics={"accuracy": float("nan")})),
            "test.metrics.accuracy is nan",
        ),
        "percent": (
            json.dumps(spoil(make_record(seed=2), test__metrics={"accuracy": 55.0})),
            "is 55.0, not a fraction",
        ),
        "text": (
            json.dumps(spoil(make_record(seed=2), dev__metrics={"accuracy": "high"})),
            "is 'high', not a fraction",
        ),
        "k": (json.dumps(spoil(make_record(seed=2), settings__train_samples="many")), "train_samples is 'many'"),
        "running": (json.dumps(spoil(make_record(seed=2), status="running")), "its status is 'running'"),
        "seconds": (json.dumps(spoil(make_record(seed=2), seconds__total=float("inf"))), "seconds.total is inf"),
        "before": (json.dumps(spoil(make_record(seed=2), seconds__train=-1.0)), "its seconds are [-1.0"),
        "gates": (json.dumps(spoil(make_record(seed=2), gates={"layers": [0], "values": {"a": [1]}})), "its gates are"),
        "open": (json.dumps(spoil(make_record(seed=2), gates=gates_of(0.5, 1.5))), "its gates are"),
        "shut": (json.dumps(spoil(make_record(seed=2), gates=gates_of(-0.1))), "its gates are"),
        "words": (json.dumps(spoil(make_record(seed=2), gates=gates_of("0.5"))), "its gates are"),
        "empty": (json.dumps(spoil(make_record(seed=2), gates=gates_of())), "its gates are"),
        "none": (json.dumps(spoil(make_record(seed=2), settings__train_samples=0)), "train_samples is 0"),
        "tests": (json.dumps(spoil(make_record(seed=2), tests=[0.5])), "its tests are not losses and metrics by name"),
        "test": (json.dumps(spoil(make_record(seed=2), tests={"average": 0.5})), "its tests are not losses and"),
        "of": (
            json.dumps(spoil(make_record(seed=2), tests=of_test(average=None))),
            "tests.average.metrics.accuracy is",
        ),
        "true": (json.dumps(spoil(make_record(seed=2), settings__train_samples=True)), "train_samples is True"),
        "early": (
            json.dumps(spoil(make_record(seed=2), evaluations=[{"epoch": 1.0, "step": 7, "loss": 0.7, "metrics": {}}])),
            "evaluations[0].metrics.accuracy is None",
        ),
        "twin": (json.dumps({**make_record(seed=2, score=0.9), "digest": good["digest"]}), "the same run as a-good/"),
        "moved": (json.dumps(moved), "the same run as a-good/result.json"),
    }
    (tmp_path / "a-good").mkdir()
    write_result(good, tmp_path / "a-good")
    for name, (text, _) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "is-a-folder" / "result.json").mkdir(parents=True)
    results = read_results(tmp_path)
    assert [(cell.mean, len(cell.runs)) for cell in results.cells] == [(0.6, 1)]
    reasons = dict(results.left_out)
    assert set(reasons) == {f"{name}/result.json" for name in (*cases, "is-a-folder")}
    for name, (_, reason) in cases.items():
        assert reason in reasons[f"{name}/result.json"], name
    write_report(tmp_path, tmp_path / "out")
    for name in ("index.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert all(f"{case}/result.json" in text for case in cases), name


def test_missing_seeds_come_from_the_plan_or_from_the_others(tmp_path: Path) -> None:
    records = [make_record(seed=seed) for seed in (1, 2, 3)] + [
        make_record(method="lora", seed=seed) for seed in (1, 2)
    ]
    save(tmp_path, *(records[index] for index in (0, 2, 3)))
    cells = by_row(read_results(tmp_path))
    assert cells["adapter", "rte"].missing == []
    assert cells["lora", "rte"].missing == [(3, 3)], "seen for another method"

    failed = tmp_path / f"folder-{records[4]['digest'][-6:]}"
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"error": "out of <memory>"}))
    (tmp_path / "run-000" / "failure.json").write_text('{"error": "an earlier try"}')
    (tmp_path / "sweep.json").write_text(plan(*records))
    results = read_results(tmp_path)
    cells = by_row(results)
    assert cells["adapter", "rte"].missing == [(2, 2)]
    assert cells["lora", "rte"].missing == [(2, 2)]
    assert results.absent == (f"folder-{records[1]['digest'][-6:]}",)
    assert results.failures == ((failed.name, "out of <memory>"),)
    write_report(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "out of &lt;memory&gt;" in page
    assert results.absent[0] in page
    assert "configs/table1.yaml" in page


@pytest.mark.parametrize(("text", "reason"), BAD_REQUESTS)
def test_a_plan_that_cannot_be_read_hides_no_results(tmp_path: Path, text: bytes, reason: str) -> None:
    save(tmp_path, make_record(score=0.6))
    (tmp_path / "sweep.json").write_bytes(text)
    results = read_results(tmp_path)
    assert [cell.mean for cell in results.cells] == [0.6]
    [(name, said)] = results.left_out
    assert name == "sweep.json"
    assert said.startswith(f"it does not say what a sweep asked for: {reason}"), said
    assert "move it away and start the sweep again" in said


@pytest.mark.parametrize(("text", "reason"), BAD_FAILURES)
def test_a_failure_that_cannot_be_read_is_still_one(tmp_path: Path, text: bytes, reason: str) -> None:
    save(tmp_path, make_record(score=0.6))
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "failure.json").write_bytes(text)
    [(name, said)] = read_results(tmp_path).failures
    assert name == "failed"
    assert said.startswith(f"failure.json does not say why it failed: {reason}"), said
    assert "a sweep tries the run again" in said


def test_folders_with_the_names_of_files(tmp_path: Path) -> None:
    save(tmp_path, make_record(score=0.6))
    (tmp_path / "failed" / "failure.json").mkdir(parents=True)
    (tmp_path / "sweep.json").mkdir()
    results = read_results(tmp_path)
    assert results.failures == (("failed", "failure.json cannot be read: Is a directory; move it away"),)
    assert results.left_out == (("sweep.json", "it cannot be read: Is a directory; move it away"),)
    write_report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "sweep.json: it cannot be read" in text
    assert "failed: failure.json cannot be read" in text


def test_of_candidates_the_best_on_dev_is_kept(tmp_path: Path) -> None:
    slow = [make_record(seed=s, score=0.9, dev=d, learning_rate=1e-4) for s, d in ((1, 0.5), (2, 0.5))]
    fast = [make_record(seed=s, score=0.4, dev=d, learning_rate=5e-4) for s, d in ((1, 0.4), (2, 0.7), (3, 0.1))]
    records = [*slow, *fast, make_record("sst2")]
    cell = by_row(results_of(*records, choose=("learning_rate",)))["adapter", "rte"]
    assert cell.mean == pytest.approx(0.4), "dev says 0.55 against 0.5 over the seeds that both have; test is not asked"
    assert len(cell.runs) == 3
    assert by_row(results_of(*records, choose=("learning_rate",)))["adapter", "sst2"].chosen == "", "there was one"
    assert cell.chosen == (
        "learning_rate=0.0005 of 2 candidates by mean dev score over the 2 seeds that all have "
        "(learning_rate=0.0001: 50.00; learning_rate=0.0005: 55.00)"
    )
    save(tmp_path / "runs", *records)
    (tmp_path / "runs" / "sweep.json").write_text(plan(*records, chosen=("learning_rate",)))
    write_report(tmp_path / "runs", tmp_path / "out")
    assert cell.chosen in (tmp_path / "out" / "report.md").read_text()
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        assert [line["row"] for line in csv.DictReader(file)] == ["", "", "adapter", "adapter", "adapter", "adapter"]
    assert len(results_of(*records).cells) == 3, "without a plan that says so nothing is chosen"


def test_of_a_field_of_the_method_the_best_on_dev_is_kept() -> None:
    """Candidates that differ in a chosen field are one row; those that differ in another field are other rows."""
    records = [
        make_record(
            "rte",
            {"preset": "lora", "lora": {"rank": rank, "alpha": alpha}},
            seed,
            score=rank / 100,
            dev=rank / 20,
            name=f"lora, lora.rank={rank}",
        )
        for rank in (2, 4)
        for alpha in (8, 16)
        for seed in (1, 2)
    ]
    results = results_of(*records, choose=("method.lora.rank",))
    assert [cell.scores for cell in results.cells] == [{(1, 1): 0.04, (2, 2): 0.04}] * 2
    assert all(re.fullmatch(r"lora \[method_config=[0-9a-f]{8}\]", cell.row) for cell in results.cells)
    assert {cell.chosen for cell in results.cells} == {
        "method.lora.rank=4 of 2 candidates by mean dev score over the 2 seeds that all have "
        "(method.lora.rank=2: 10.00; method.lora.rank=4: 20.00)"
    }
    assert len(results_of(*records).cells) == 4


def test_a_method_keeps_what_was_not_chosen_in_its_name() -> None:
    name = "lora, lora.targets=['query', 'value'], lora.rank=4"
    assert without_chosen(name, ("method.lora.rank", "learning_rate")) == "lora, lora.targets=['query', 'value']"
    assert without_chosen(name, ("method.lora.targets",)) == "lora, lora.rank=4"
    assert without_chosen(name, ("method.lora.ran", "lora.rank")) == name
    assert without_chosen(name, ()) == name


def test_planned_runs_on_files_of_ones_own_have_no_seeds_to_miss(tmp_path: Path) -> None:
    record = make_record()
    save(tmp_path, record)
    request = json.loads(plan(record))
    request["runs"][0]["settings"]["task"] = None
    (tmp_path / "sweep.json").write_text(json.dumps(request))
    assert read_results(tmp_path).seeds == {}


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("shop/reviews.csv", None), "reviews"),
        (("shop/train.csv", "shop/dev.csv"), "shop"),
        (("shop/training.csv", None), "shop"),
        (("shop/data.jsonl", None), "shop"),
        (("train.csv", None), "train"),
    ],
)
def test_a_task_of_ones_own_is_named_by_its_file(files: tuple[str, str | None], name: str) -> None:
    record = make_record("custom")
    record["settings"] |= {"task": None, "train_file": files[0], "dev_file": files[1]}
    assert results_of(record).table(100).tasks == [name]


# Scores at chance, and the method that is picked on dev


def test_a_score_is_at_chance_where_its_interval_reaches_a_constant_answer() -> None:
    """By hand: 0.527 is the majority class; the t interval of five scores is 2.776 standard errors wide each way."""
    scores = {"low": (0.53, 0.54, 0.55, 0.52, 0.53), "wide": (0.53, 0.75, 0.53, 0.75, 0.55), "high": (0.6,) * 5}
    records = [
        make_record("rte", "adapter", seed, score, name=name)
        for name, found in scores.items()
        for seed, score in enumerate(found)
    ]
    table = results_of(*records).table(100)
    assert {cell.row: cell.at_chance(table.chance("rte")) for cell in table.column("rte")} == {
        "low": True,
        "wide": True,
        "high": False,
    }
    assert table.chance("rte") == 0.527


def test_of_one_seed_a_score_is_at_chance_within_the_test_sets_error() -> None:
    """200 rows at 0.527: two standard errors are 7.06 points."""
    for score, at in ((0.597, True), (0.598, False), (0.4, True)):
        [cell] = results_of(make_record(score=score)).cells
        assert cell.at_chance(0.527) is at, score


def test_the_majority_class_of_the_test_data_counts() -> None:
    """Seed 1 voted for the rarer class of the test data, so that its record holds 1 - 0.527."""
    records = [spoil(make_record(seed=seed), majority=level) for seed, level in ((1, 0.473), (2, 0.527))]
    for chosen in (records, records[:1]):
        assert results_of(*chosen).table(100).chance("rte") == pytest.approx(0.527)
    three = [spoil(record, task__labels=["a", "b", "c"]) for record in records]
    older = [{**record, "majority": level} for record, level in zip(three, (0.3, 0.4), strict=True)]
    assert results_of(*older).table(100).majority("rte") == Floor(0.4, "train set's majority", of_test=False), "largest"
    assert results_of(three[0]).table(100).majority("rte") == Floor(0.473, "train set's majority", of_test=False)
    three[0] |= {"majority": 0.45, "majority_of": "test"}
    assert results_of(*three[:1]).table(100).majority("rte") == Floor(0.45)
    assert results_of(three[0], spoil(three[1], majority=0.48)).table(100).chance("rte") == 0.45, (
        "the other may be less"
    )


def test_a_row_of_the_majority_class_says_where_it_holds_something_else(tmp_path: Path) -> None:
    old = spoil(make_record("mnli"), task__labels=["a", "b", "c"], majority=0.35)
    new = make_record("rte") | {"majority": 0.6, "majority_of": "test"}
    scores = spoil(make_record("stsb"), task__labels=[]) | {"majority": None, "majority_of": "test"}
    save(tmp_path / "runs", old, new, scores)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"| majority class | {percent((0.35 + 0.6) / 3)} | 60.00 | – | 35.00 |" in text  # noqa: RUF001
    assert "mnli: that row holds another number of the records: train set's majority." in text
    assert "stsb: a task with scores has no classes, so it has no majority class." in text
    with open(tmp_path / "out" / "runs.csv", encoding="utf-8", newline="") as file:
        found = {row["task"]: (row["majority"], row["majority_of"]) for row in csv.DictReader(file)}
    assert found == {"mnli": ("0.35", "train set's majority"), "rte": ("0.6", "test"), "stsb": ("", "")}


def test_the_single_method_with_the_best_dev_score_is_picked_for_each_seed(tmp_path: Path) -> None:
    found = {  # dev and test of seeds 1 and 2
        "adapter": ((0.6, 0.50), (0.5, 0.70)),
        "bitfit": ((0.6, 0.90), (0.4, 0.20)),
        "lora": ((0.5, 0.99), (0.7, 0.60)),
        "prefix": ((0.9, 0.10), (0.9, 0.10)),
    }
    records = [
        make_record("rte", method, seed, test, dev=dev)
        for method, pairs in found.items()
        for seed, (dev, test) in enumerate(pairs, start=1)
    ]
    results = results_of(*records, make_record("rte", "lora", 3, 0.9))
    [cell] = results.picked
    assert (cell.row, cell.method, cell.picked) == (PICKED, PICKED, CANDIDATES)
    assert cell.scores == {(1, 1): 0.5, (2, 2): 0.6}, "of equal dev scores the first counts; a prefix is no candidate"
    assert cell.missing == [(3, 3)]
    assert cell.seconds == 3 * 60.0
    assert cell.paper is None
    assert PICKED in results.table(100).rows
    assert PICKED not in results.table(100).singles("") + results.table(100).combined()
    assert results_of(*(record for record in records if record["method"]["name"] != "bitfit")).picked == ()
    save(tmp_path / "runs", *records)
    write_report(tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| picked on dev | <i>55.00</i><br>± 7.07 |" in text
    assert "180<br>3 trainings" in text.partition("## Parameters and time")[2]
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        [line] = [line for line in csv.DictReader(file) if line["method"] == PICKED]
    assert (line["mean"], line["trainings"], line["seconds"], line["learning_rate"]) == ("55.0000", "3", "180.0000", "")
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        assert PICKED not in {line["row"] for line in csv.DictReader(file)}, "a run keeps the row of its method"


def test_each_setting_has_a_method_that_is_picked_of_its_own() -> None:
    records = [
        make_record("rte", method, seed, score, dev=score, model=model)
        for model, scores in (("small", (0.5, 0.6, 0.7)), ("large", (0.8, 0.7, 0.6)))
        for method, score in zip(CANDIDATES, scores, strict=True)
        for seed in (1, 2)
    ]
    results = results_of(*records, make_record("rte", "unipelt-ap", score=0.9, model="small"))
    assert {(cell.row, cell.method, cell.setting): cell.mean for cell in results.picked} == {
        (f"{PICKED} [model=small]", PICKED, "model=small"): 0.7,
        (f"{PICKED} [model=large]", PICKED, "model=large"): 0.8,
    }
    table = results.table(100)
    assert table.picked("model=large") == [f"{PICKED} [model=large]"]
    assert table.singles("model=small") == [f"{method} [model=small]" for method in ("bitfit", "adapter", "lora")]
    assert table.named("lora", "model=large")["rte"].mean == 0.6
    assert table.named("lora", "model=none") == {}


# Lines of files


def test_a_line_of_a_run_that_has_little_to_say(tmp_path: Path) -> None:
    record = spoil(make_record("stsb", k=None, epochs=4), code={"commit": None, "dirty": None}, best__epoch=2.0)
    record["seeds"] = {"run": 1, "data": 5}
    save(tmp_path / "runs", spoil(record, method__name="=1+1"), make_record("rte", name="-1.5e3", seed=2))
    write_report(tmp_path / "runs", tmp_path / "out")
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        lines = {line["task"]: line for line in csv.DictReader(file)}
    wanted = {
        "k": "all",
        "seed": "1",
        "data_seed": "5",
        "commit": "",
        "dirty": "",
        "best_epoch": "2.0",
        "epochs": "4.0",
    }
    assert {name: lines["stsb"][name] for name in wanted} == wanted
    assert (lines["stsb"]["method"], lines["rte"]["method"]) == ("'=1+1", "-1.5e3"), "no formula for a spreadsheet"
    assert (lines["rte"]["commit"], lines["rte"]["dirty"]) == ("c" * 40, "False")
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        cells = {line["task"]: line for line in csv.DictReader(file)}
    assert (cells["stsb"]["k"], cells["stsb"]["seeds"], cells["stsb"]["missing_seeds"]) == ("all", "1", "")
    assert (cells["stsb"]["paper_mean"], cells["stsb"]["trainings"], cells["stsb"]["dev_mean"]) == ("", "1", "50.0000")


# A table of pandas


def test_runs_as_a_table_of_pandas(tmp_path: Path) -> None:
    results = results_of(make_record(seed=1, score=0.5), make_record(seed=2, score=0.75), make_record("stsb", k=None))
    frame = results.to_frame()
    assert list(frame["test"]) == [0.5, 0.75, 0.5]
    assert list(frame["k"]) == [100, 100, "all"]
    assert frame.groupby("task")["test"].mean()["rte"] == 0.625
    save(tmp_path / "runs", *(run.record for run in results.runs))
    write_report(tmp_path / "runs", tmp_path / "report")
    with open(tmp_path / "report" / "runs.csv", newline="") as file:
        assert list(frame.columns) == next(csv.reader(file))
    assert results_of().to_frame().empty


def test_a_table_of_pandas_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas; install it \(pip install pandas\)"):
        results_of(make_record()).to_frame()
