"""Searches in sweeps: what a file may ask for, and that a search keeps to its trials, whatever stops it."""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_records import make_record

from unipelt.cli import main
from unipelt.glue.settings import RunSettings
from unipelt.records.record import write_result
from unipelt.report import read_results
from unipelt.report.chosen import without_chosen
from unipelt.sweep import Sweep, SweepError, read_request, read_sweep
from unipelt.sweep.optuna_search import JOURNAL, carry_out_search, plan
from unipelt.sweep.space import read_search

pytestmark = pytest.mark.usefixtures("alone")

GRID = "grid:\n  - {task: rte, method: [lora, adapter], seed: [1, 2]}\n"
SEARCH = """
choose: optuna
trials: 4
space:
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  method.lora.rank: [2, 8]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return read_sweep(write(tmp_path, GRID + SEARCH))


# What a file asks for


def test_a_search_has_fields_that_its_methods_have(sweep: Sweep) -> None:
    assert sweep.chosen == ("learning_rate", "method.lora.rank")
    assert [(run.method_name, run.seed) for run in sweep.runs] == [
        (method, seed) for method in ("lora", "adapter") for seed in (1, 2)
    ]
    assert sweep.search is not None
    assert [list(sweep.search.of(sweep.runs[index])) for index in (0, 2)] == [[*sweep.chosen], ["learning_rate"]]
    assert len({sweep.cell(run) for run in sweep.runs}) == 2
    other = RunSettings(task="rte", method={"preset": "lora", "lora": {"rank": 2}}, learning_rate=7e-3)
    assert sweep.cell(other) == sweep.cell(sweep.runs[0]), "values that are searched are not of a cell"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("choose: optuna\n", "choose: optuna needs trials, a whole number of 1 or more, not None"),
        ("choose: optuna\ntrials: 0\nspace: {epochs: [1]}\n", "needs trials, a whole number of 1 or more, not 0"),
        ("choose: optuna\ntrials: 3\n", "choose: optuna needs space, a mapping of fields to values"),
        ("trials: 3\n", "trials and space go with choose: optuna"),
        ("choose: optun\n", "choose must be a mapping of fields to lists of values or optuna, not 'optun'"),
        (SEARCH + "  sede: [1, 2]\n", "unknown field 'sede' of a sweep"),
        (SEARCH + "  seed: [1, 2]\n", "space: seed cannot be searched"),
        (SEARCH + "  method: [lora]\n", "space: method cannot be searched"),
        (SEARCH + "  epochs: {low: 3}\n", "space: epochs must be a list of values or a range as {low: 1, high: 8}"),
        (SEARCH + "  epochs: {low: 3, high: 2}\n", "space: epochs: low must be below high, and 3 is not below 2"),
        (SEARCH + "  epochs: {low: 1, high: 2, lgo: true}\n", "unknown 'lgo'; did you mean 'log'"),
        (SEARCH + "  warmup_ratio: {low: 0, high: 0.5, log: true}\n", "with log needs a low above 0"),
        (SEARCH + "  epochs: {low: 1, high: x}\n", "space: epochs: high must be a number, not 'x'"),
        (SEARCH + "  epochs: []\n", "space: epochs must be a list of numbers or texts"),
        (SEARCH + "  epochs: [1, null]\n", r"space: epochs must be a list of numbers or texts, not \[1, None\]"),
        (SEARCH + "  epochs: {low: 1, high: 8, step: 0}\n", "space: epochs: step must be above 0, not 0"),
        (SEARCH + "  epochs: {low: 1, high: 8, step: 2, log: true}\n", "with log needs a low above 0 and no step"),
        (SEARCH + "  batch_size: {low: 0, high: 16}\n", "space: batch_size must be 1 or more, not 0"),
        (SEARCH + "  method.lora.rang: [1, 2]\n", "space: .*lora.rang|space: method: .*rang"),
        (
            "choose: optuna\ntrials: 3\nspace: {method.lora.rank: [2, 4]}\n",
            "no field of space is a field of adapter; add one, or leave it out",
        ),
    ],
)
def test_a_search_that_cannot_be_meant_is_an_error_before_anything_runs(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SweepError, match=message):
        read_sweep(write(tmp_path, GRID + text))


def test_a_field_of_a_part_goes_with_the_methods_that_have_the_part() -> None:
    names = [
        *("epochs", "method.layers", "method.lora.rank", "method.gate.pooling"),
        *("rates.lora", "rates.lora_b", "rates.gate", "rates.head", "rates.adapter"),
    ]
    search = read_search("grid.yaml", 1, {name: [1, 2] for name in names})
    of_both = ["epochs", "method.layers", "method.gate.pooling", "rates.gate", "rates.head"]
    for method, own in (
        ("lora", ["method.lora.rank", "rates.lora", "rates.lora_b"]),
        ("adapter", ["rates.adapter"]),
    ):
        assert sorted(search.of(RunSettings(task="rte", method=method))) == sorted([*of_both, *own])


def test_a_plan_needs_no_optuna(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "runs      at most 16, 2 at a time" in plan(sweep, 2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    command = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    assert "search    optuna, 4 trials in each cell, of learning_rate, method.lora.rank" in capsys.readouterr().out
    assert main(command) == 2
    assert "install the extra 'optuna' (pip install 'unipelt[optuna]')" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_methods_without_what_is_chosen() -> None:
    chosen = ("learning_rate", "method.lora.rank")
    assert without_chosen("lora, lora.rank=4, layers=[0, 1]", chosen) == "lora, layers=[0, 1]"
    assert without_chosen("lora, lora.rank=4", ("learning_rate",)) == "lora, lora.rank=4"


# Searches


class Pretend:
    """Does a run by leaving a record, whose dev score is best at a learning rate of 1e-3 and a rank of 8."""

    def __init__(self, stop_at: int | None = None, fails: Callable[[RunSettings], bool] = lambda run: False) -> None:
        self.stop_at, self.fails = stop_at, fails
        self.starts: list[tuple[str, int, float]] = []

    def __call__(self, settings: RunSettings, stop: threading.Event) -> str | None:
        if self.stop_at is not None and len(self.starts) == self.stop_at:
            raise KeyboardInterrupt
        rate = float(settings.learning_rate or 0.0)
        self.starts.append((settings.method_name, settings.seed, rate))
        if self.fails(settings):
            return "ValueError: no luck"
        score = 0.9 - 0.2 * abs(math.log10(rate) + 3) - (0.05 if "rank=2" in settings.method_name else 0.0)
        record = make_record(
            method=settings.config.to_dict(), name=settings.method_name, seed=settings.seed, score=score, k=None
        )
        record |= {"digest": settings.digest()}
        record["method"]["learning_rate"] = rate
        record["settings"]["epochs"] = settings.epochs
        write_result(record, str(settings.output_dir))
        return None


def silent(line: str) -> None:
    pass


def values(pretend: Pretend) -> list[tuple[str, float]]:
    return list(dict.fromkeys((method, rate) for method, _, rate in pretend.starts))


def test_each_cell_gets_its_trials_and_the_report_keeps_the_best(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    pretend, lines = Pretend(), list[str]()
    assert carry_out_search(sweep, tmp_path / "out", 1, pretend, lines.append) == {}
    assert len(pretend.starts) <= 16
    told = [line for line in lines if line.startswith("trial ")]
    assert len(told) == 8
    for line in told:
        values_of = r"(lora: learning_rate \d\S*, method\.lora\.rank [28]|adapter: learning_rate \d\S*)"
        assert re.fullmatch(rf"trial [1-4] of 4, {values_of}: dev 0\.\d{{3}}", line), line
    for method in ("lora", "adapter"):
        [line] = [line for line in lines if line.startswith(f"best of 4 trials, {method}: learning_rate")]
        assert ("method.lora.rank" in line) == (method == "lora")
    rates = {rate for _, rate in values(pretend)}
    assert len(rates) > 4
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    request = read_request(tmp_path / "out")
    assert request is not None
    assert request["chosen"] == ["learning_rate", "method.lora.rank"]
    results = read_results(tmp_path / "out")
    assert not results.absent
    assert sorted(cell.row for cell in results.cells) == ["adapter", "lora"]
    for cell in results.cells:
        assert len(cell.runs) == 2
        assert cell.mean == max(run.score for run in results.runs if run.method.startswith(cell.row))
    again = Pretend()
    assert carry_out_search(sweep, tmp_path / "out", 1, again, silent) == {}
    assert not again.starts
    assert b"pickle" not in (tmp_path / "out" / JOURNAL).read_bytes()


def test_more_trials_go_on_with_a_search(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    first, second = Pretend(), Pretend()
    carry_out_search(sweep, tmp_path / "out", 1, first, silent)
    assert sweep.search is not None
    wider = replace(sweep, search=replace(sweep.search, trials=5))
    carry_out_search(wider, tmp_path / "out", 1, second, silent)
    assert len(values(second)) == 2
    assert not set(values(second)) & set(values(first))


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(sweep: Sweep, tmp_path: Path, stop_at: int) -> None:
    pytest.importorskip("optuna")
    whole, first, second = Pretend(), Pretend(stop_at), Pretend()
    carry_out_search(sweep, tmp_path / "whole", 1, whole, silent)
    with pytest.raises(KeyboardInterrupt):
        carry_out_search(sweep, tmp_path / "out", 1, first, silent)
    assert carry_out_search(sweep, tmp_path / "out", 1, second, silent) == {}
    assert first.starts + second.starts == whole.starts


def test_a_failed_run_is_tried_again_by_the_next_search(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    lines: list[str] = []
    pretend = Pretend(fails=lambda run: run.seed == 2 and run.method_name == "adapter")
    failures = carry_out_search(sweep, tmp_path / "out", 1, pretend, lines.append)
    assert set(failures.values()) == {"ValueError: no luck"}
    assert len(failures) == 4
    assert len([line for line in lines if line.endswith("no score, as a run failed")]) == 4
    again = Pretend()
    assert carry_out_search(sweep, tmp_path / "out", 1, again, silent) == {}
    assert sorted(again.starts) == sorted(start for start in pretend.starts if start[:2] == ("adapter", 2))


def test_several_workers_ask_for_several_trials_at_once(sweep: Sweep, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    rounds: list[str] = []
    carry_out_search(sweep, tmp_path / "out", 8, Pretend(), rounds.append)
    assert len([line for line in rounds if line.startswith("trial ")]) == 8
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    assert [len(study.get_trials()) for study in studies] == [4, 4]
    assert len([line for line in rounds if line.startswith("[8 of 8]")]) == 2, "two rounds of two trials in each cell"
