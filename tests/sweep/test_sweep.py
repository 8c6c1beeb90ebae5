"""Sweeps: what a file asks for, the plan, and that every run is done once, whatever is killed and whoever joins in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults.spoilt import BAD_FAILURES, BAD_REQUESTS
from scripts.killed_sweep import MOMENTS
from tiny_task import save_model, write_glue

from unipelt import cli
from unipelt.cli import main, make_parser
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import RESULT, read_result, write_result
from unipelt.runs.folder import locked
from unipelt.sweep import (
    FAILURE,
    LOG,
    REQUEST,
    Busy,
    SweepError,
    carry_out,
    read_request,
    read_sweep,
    run_folder,
    split_list,
    status,
    write_request,
)
from unipelt.sweep.seeds import expand

pytestmark = pytest.mark.usefixtures("alone")

TESTS = Path(__file__).parents[1]
SWEEP = """
model: {home}/model
glue_dir: {home}/glue
train_samples: 16
dev_samples: 8
epochs: 1
max_length: 16
threads: 1
device: cpu
grid:
  - task: [rte, SST-2]
    method: [lora, bitfit]
    seed: [1, 2]
"""
PREFIXES = """
grid:
  - task: rte
    train_samples: [100, null]
    method: [prefix, {preset: prefix, prefix: {length: 50}}, {preset: lora, train_head: false}]
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipelt.sweep.workers._PAUSE", 0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data, sweep.yaml, and record.json, which stands for every run's."""
    folder = tmp_path_factory.mktemp("home")
    save_model(folder / "model")
    write_glue(folder / "glue")
    (folder / "sweep.yaml").write_text(SWEEP.format(home=folder))
    first = read_sweep(folder / "sweep.yaml").runs[0].to_dict()
    record = run(RunSettings(**{**first, "output_dir": str(folder / "first")}), log=lambda line: None)
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def finish(home: Path, settings: RunSettings, seconds: float = 1.0) -> None:
    """Leave what a run leaves."""
    record = json.loads((home / "record.json").read_text())
    record |= {"settings": settings.to_dict(), "digest": settings.digest()}
    record["seconds"]["total"] = seconds
    Path(str(settings.output_dir)).mkdir(parents=True, exist_ok=True)
    write_result(record, str(settings.output_dir))


class Pretend:
    """Does runs by leaving a record, some not; counts."""

    def __init__(self, home: Path, fails: Sequence[str] = (), seconds: float = 0.0) -> None:
        self.home, self.fails, self.seconds = home, fails, seconds
        self.starts: list[str] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, settings: RunSettings, stop: threading.Event) -> str | None:
        name = f"{settings.task} {settings.method_name} {settings.seed}"
        with self.lock:
            self.starts.append(name)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        if name in self.fails:
            (Path(str(settings.output_dir)) / LOG).write_text("epoch 1\nValueError: no luck\n")
            return "ValueError: no luck"
        finish(self.home, settings)
        return None


def silent(line: str) -> None:
    pass


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# What a file asks for


def test_the_grid_is_the_product_of_its_lists_in_their_order(home: Path) -> None:
    sweep = read_sweep(home / "sweep.yaml")
    assert [(one.task, one.method, one.seed) for one in sweep.runs] == [
        (task, method, seed) for task in ("rte", "sst2") for method in ("lora", "bitfit") for seed in (1, 2)
    ]
    assert {(one.train_samples, one.dev_samples, one.epochs) for one in sweep.runs} == {(16, 8, 1)}
    assert [one.learning_rate for one in sweep.runs[:4]] == [5e-4, 5e-4, 1e-4, 1e-4]
    assert len({sweep.cell(one) for one in sweep.runs}) == 4


def test_blocks_that_overlap_ask_for_no_run_twice(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train_samples: 100\nepochs: 3\n")
    text = """
base: base.yaml
epochs: 4
grid:
  - {task: [rte, cola], seed: [1, 2]}
  - {task: rte, seed: [2, 3], method: {preset: unipelt-apl}}
  - {task: rte, train_samples: 500}
"""
    runs = read_sweep(write(tmp_path, text)).runs
    assert [(one.task, one.train_samples, one.seed) for one in runs] == [
        *[("rte", 100, 1), ("rte", 100, 2), ("cola", 100, 1), ("cola", 100, 2)],
        *[("rte", 100, 3), ("rte", 500, 1)],
    ]
    assert {one.epochs for one in runs} == {4}


def test_paths_in_a_list_are_found_from_the_repository(tmp_path: Path) -> None:
    text = """
grid:
  - {train_file: [a.tsv, rte], dev_file: dev.tsv, label_column: a.tsv, method: [own.yaml, lora]}
"""
    for name in ("a.tsv", "dev.tsv", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "own.yaml").write_text("preset: lora\nlora: {rank: 4}\n")
    runs = read_sweep(write(tmp_path, text)).runs
    assert [one.method_name for one in runs] == ["lora, lora.rank=4", "lora"] * 2
    assert [one.train_file for one in runs] == [str(tmp_path / "a.tsv")] * 2 + ["rte"] * 2
    assert {(one.dev_file, one.label_column) for one in runs} == {(str(tmp_path / "dev.tsv"), "a.tsv")}


def test_a_choice_multiplies_the_runs_but_not_the_cells(tmp_path: Path) -> None:
    grid = "grid:\n  - {task: rte, method: [lora, adapter], seed: [1, 2]}\n"
    path = write(tmp_path, f"{grid}choose: {{learning_rate: [1e-4, 5e-4]}}\n")
    sweep = read_sweep(path)
    assert sweep.chosen == ("learning_rate",)
    assert len(sweep.runs) == 8
    assert len({sweep.cell(one) for one in sweep.runs}) == 2
    assert [one.learning_rate for one in read_sweep(path, override={"learning_rate": "1e-4"}).runs] == [1e-4] * 4
    names = [run_folder("out", one).name.rpartition("-")[0] for one in sweep.runs]
    assert names[:2] == ["rte-lora-K=all-seed=1-lr=0.0001", "rte-lora-K=all-seed=1"]


def test_folders_have_names_for_people_that_do_not_depend_on_how_a_run_is_carried_out(tmp_path: Path) -> None:
    path = write(tmp_path, PREFIXES)
    sweep, other = read_sweep(path), read_sweep(path, override={"threads": "3", "device": "cpu"})
    folders = [run_folder(tmp_path, one) for one in sweep.runs]
    assert folders == [run_folder(tmp_path, one) for one in other.runs]
    assert len(set(folders)) == len(sweep.runs) == 6
    assert [folder.name for folder in folders][1] == f"rte-prefix_prefix.length=50-K=100-seed=1-{short(sweep.runs[1])}"
    assert folders[5].name.startswith("rte-lora_train_head=false-K=all-seed=1-")


def short(settings: RunSettings) -> str:
    return settings.digest()[:8]


def test_files_of_a_sweep_keep_their_names() -> None:
    """Sweeps that were begun before go on."""
    assert (REQUEST, FAILURE, LOG) == ("sweep.json", "failure.json", "log.txt")


@pytest.mark.parametrize(
    ("narrow", "override", "count"),
    [
        ({"task": ["rte"]}, {}, 4),
        ({"task": ["SST-2"], "seed": ["2"]}, {}, 2),
        ({"method": ["bitfit", "lora"], "seed": ["1"]}, {}, 4),
        ({}, {"seed": "1,2", "task": "rte"}, 4),
        ({"train_samples": ["16"]}, {"epochs": "2"}, 8),
    ],
)
def test_is_narrowed(home: Path, narrow: dict[str, list[str]], override: dict[str, str], count: int) -> None:
    assert len(read_sweep(home / "sweep.yaml", narrow, override).runs) == count


def test_a_range_stands_for_its_seeds_and_new_seeds_extend_the_grid(home: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "grid:\n  - {task: rte, seed: [1-3, 8]}\n  - {task: cola, seed: 2-3}\n  - {task: mrpc}\n")

    def seeds(*wanted: str, **override: str) -> list[tuple[str | None, int]]:
        return [(one.task, one.seed) for one in read_sweep(path, {"seed": wanted} if wanted else {}, override).runs]

    every = [*[("rte", seed) for seed in (1, 2, 3, 8)], ("cola", 2), ("cola", 3), ("mrpc", 1)]
    assert seeds() == every
    assert seeds("1", "2") == [("rte", 1), ("rte", 2), ("cola", 2), ("mrpc", 1)], "nothing is new, so values are kept"
    new = [(task, seed) for task in ("rte", "cola", "mrpc") for seed in (6, 7)]
    assert seeds("6-7") == seeds(seed="6-7") == new
    assert seeds("8", "6-7")[:3] == [("rte", 8), ("rte", 6), ("rte", 7)]
    assert {one.data_seed for one in read_sweep(path, {"seed": ["6-7"]}).runs} == {6, 7}


def test_a_grid_without_seeds_has_the_first_and_takes_others(tmp_path: Path) -> None:
    path = write(tmp_path, "grid:\n  - {task: rte}\n")
    assert [one.seed for one in read_sweep(path).runs] == [1]
    for seed in ("1", "2"):
        assert [one.seed for one in read_sweep(path, {"seed": [seed]}).runs] == [int(seed)]


def test_a_range_has_ten_thousand_seeds_at_most() -> None:
    assert expand(["0-9999", 7], "seed") == [*range(10_000), 7]
    with pytest.raises(ValueError, match="seed: the range 0-10000 has more than 10,000 seeds; write a shorter one"):
        expand(["0-10000"], "seed")
    assert expand(["3-3", " 4 - 5 ", "x-1"], "seed") == [3, 4, 5, "x-1"]


def test_an_extended_grid_keeps_what_is_there(home: Path, tmp_path: Path) -> None:
    first = Pretend(home)
    assert carry_out(status(read_sweep(home / "sweep.yaml"), tmp_path), first, silent) == {}
    wider = read_sweep(home / "sweep.yaml", {"seed": ["1-3"], "task": ["rte"], "method": ["lora"]})
    second = Pretend(home)
    assert carry_out(status(wider, tmp_path), second, silent) == {}
    assert (len(first.starts), second.starts) == (8, ["rte lora 3"])


@pytest.mark.parametrize(
    ("narrow", "names"),
    [
        ({"method": ["prefix"]}, ["prefix"] * 2),
        ({"method": ["prefix,prefix.length=50"], "train_samples": ["all"]}, ["prefix, prefix.length=50"]),
        ({"method": [" prefix,  prefix.length = 50 "]}, ["prefix, prefix.length=50"] * 2),
        ({"method": ["lora"], "train_samples": ["100"]}, ["lora, train_head=false"]),
    ],
)
def test_a_method_goes_by_its_whole_name_or_its_preset(
    tmp_path: Path, narrow: dict[str, list[str]], names: list[str]
) -> None:
    assert [one.method_name for one in read_sweep(write(tmp_path, PREFIXES), narrow).runs] == names


def test_other_fields_replace_the_common_value(home: Path) -> None:
    runs = read_sweep(home / "sweep.yaml", override={"learning_rate": "1e-3", "train_samples": "null"}).runs
    assert {(one.learning_rate, one.train_samples) for one in runs} == {(1e-3, None)}


def test_a_list_of_methods_is_split_between_methods() -> None:
    text = "lora,prefix, prefix.length=50, prefix.hidden=8,unipelt-ap, layers=[0, 1],adapter"
    methods = ["lora", "prefix, prefix.length=50, prefix.hidden=8", "unipelt-ap, layers=[0, 1]", "adapter"]
    assert split_list(text) == methods


@pytest.mark.parametrize(
    ("text", "narrow", "override", "message"),
    [
        (None, {"task": ["rte", "cola"]}, {}, "no run that is left has the task 'cola'; there is rte; sst2"),
        (None, {"method": ["adapter"]}, {}, "has the method 'adapter'; there is lora; bitfit"),
        (None, {"train_samples": ["100"]}, {}, "has the train_samples '100'; there is 16"),
        (None, {}, {"seed": "seven"}, "has the seed 'seven'; there is 1; 2"),
        (None, {"seed": ["9-3"]}, {}, "seed: the range 9-3 ends before it begins; write 3-9"),
        (None, {"seed": ["1-99999"]}, {}, "seed: the range 1-99999 has more than 10,000 seeds"),
        ("grid: [{task: rte, seed: 5-1}]\n", {}, {}, "seed: the range 5-1 ends before it begins"),
        (None, {}, {"epochs": "none"}, "epochs must be a whole number"),
        ("task: rte\n", {}, {}, "grid must be a list of blocks"),
        ("grid: [{task: rte}]\noutput_dir: here\n", {}, {}, "unknown field 'output_dir' of a sweep"),
        ("grid: [{task: rte, sede: [1]}]\n", {}, {}, "unknown field 'sede' of a sweep; did you mean 'seed'?"),
        ("grid: [{task: rte, seed: []}]\n", {}, {}, "the list of seed is empty"),
        ("grid: [{task: rte}, {task: [cola, snli]}]\n", {}, {}, "block 2 of the grid: unknown task 'snli'"),
        ("grid: [{task: rte, method: [lora, loar]}]\n", {}, {}, "block 1 of the grid: method: there is no preset"),
        ("grid: [{task: rte, method: gone.yaml}]\n", {}, {}, "there is no configuration file at gone.yaml"),
        ("grid: [{task: rte, seed: [1]}]\nchoose: {seed: [1, 2]}\n", {}, {}, "in grid or in choose, not in both"),
        ("grid: [{task: rte}]\nchoose: [1]\n", {}, {}, "choose must be a mapping"),
        ("grid: [{task: rte}]\nbase: gone.yaml\n", {}, {}, "there is no configuration file at"),
    ],
)
def test_what_cannot_be_meant_is_an_error_before_anything_runs(
    home: Path, tmp_path: Path, text: str | None, narrow: dict[str, list[str]], override: dict[str, str], message: str
) -> None:
    path = home / "sweep.yaml" if text is None else write(tmp_path, text)
    with pytest.raises(SweepError, match=message.replace("[", r"\[")):
        read_sweep(path, narrow, override)


# The plan


def test_the_plan_counts_and_estimates_from_runs_of_the_same_kind(home: Path, tmp_path: Path) -> None:
    sweep = read_sweep(home / "sweep.yaml")
    assert "time      unknown" in str(status(sweep, tmp_path))
    runs = status(sweep, tmp_path).sweep.runs
    finish(home, runs[0], seconds=100)  # RTE, LoRA
    finish(home, runs[4], seconds=300)  # SST-2, LoRA
    Path(str(runs[2].output_dir)).mkdir()
    (Path(str(runs[2].output_dir)) / FAILURE).write_text(json.dumps({"error": "no luck"}))
    state = status(sweep, tmp_path, workers=3)
    # one more of each, and four of BitFit, of which only the mean of all is known
    assert state.seconds_left(state.left) == pytest.approx((100 + 300 + 4 * 200) / 3)
    assert state.seconds_left(state.left[:1]) == 100, "more workers than runs do not help"
    assert [line.split(maxsplit=1) for line in str(state).splitlines()] == [
        ["sweep", str(home / "sweep.yaml")],
        ["cells", "4"],
        ["runs", "8"],
        ["finished", "2"],
        ["failed", "1, to be tried again"],
        ["left", "6, 3 at a time"],
        ["time", "6 min 40 s"],
    ]


def test_the_plan_says_what_is_chosen_on_dev(tmp_path: Path) -> None:
    path = write(tmp_path, "grid:\n  - {task: rte}\nchoose: {learning_rate: [1e-4, 5e-4], warmup_ratio: [0, 0.1]}\n")
    plan = str(status(read_sweep(path), tmp_path / "out"))
    assert plan.splitlines()[-1] == "choose    learning_rate, warmup_ratio, on dev"
    assert "cells     1\nruns      4\n" in plan


def test_a_grid_of_more_runs_than_anybody_means_is_refused(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(1000)))
    path = write(tmp_path, f"grid:\n  - {{task: rte, seed: [{seeds}], data_seed: [{seeds}]}}\n")
    with pytest.raises(SweepError, match=r"a block of the grid asks for 1,000,000 runs; more than .* are not meant"):
        read_sweep(path)


def test_a_run_begins_without_the_drafts_of_one_that_was_killed(home: Path, tmp_path: Path) -> None:
    sweep = read_sweep(home / "sweep.yaml", {"task": ["rte"], "seed": ["1"], "method": ["lora"]})
    state = status(sweep, tmp_path)
    folder = Path(str(state.sweep.runs[0].output_dir))
    folder.mkdir()
    for name in (".settings.json.abc.tmp", "mine.tmp"):
        (folder / name).touch()
    assert carry_out(state, Pretend(home), silent) == {}
    assert [path.name for path in folder.glob("*.tmp")] == ["mine.tmp"]
    assert not list(folder.glob(".*.tmp"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(home / "sweep.yaml"), "--out", str(tmp_path / "out"), "--seeds", "2"]
    assert main([*command, "--dry-run"]) == 0
    assert "runs      4" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    finish(home, status(read_sweep(home / "sweep.yaml"), tmp_path / "out").sweep.runs[1])
    before = tree(tmp_path)
    assert main([*command, "--dry-run", "--workers", "2"]) == 0
    assert "finished  1" in capsys.readouterr().out
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "cola"], "no run that is left has the task 'cola'"),
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--sede", "1"], "unknown option '--sede'; did you mean '--seed'? (see unipelt sweep --help)"),
        (["--overwrite", "true"], "unknown option '--overwrite'; see unipelt sweep --help"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["sweep", str(home / "sweep.yaml"), "--out", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("unipelt: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep", "x.yaml"], "unknown command 'swep'; did you mean 'sweep'? (see unipelt --help)"),
        (["nothing"], "unknown command 'nothing'; see unipelt --help"),
        (["--hlp"], "unknown option '--hlp'; did you mean '--help'? (see unipelt --help)"),
        (["report", "x", "--ot", "y"], "unknown option '--ot'; did you mean '--out'? (see unipelt report --help)"),
        (["report", "x", "y", "--out", "z"], "cannot tell what 'y' belongs to; see unipelt report --help"),
        (["sweep", "x.yaml", "--out", "y", "--backend", "rai"], "'rai' is not one of local, ray"),
        (["sweep", "x.yaml"], "the following arguments are required: --out"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 200, "no list of all options"


def test_words_of_an_option_are_joined_either_way(tmp_path: Path) -> None:
    command = ["sweep", "x.yaml", "--out", "y", "--dry_run", "--learning-rate=1", "--text-columns", "a", "b"]
    parsed = make_parser().parse_args(command)
    assert parsed.dry_run
    assert cli._fields_given(parsed) == {"learning_rate": "1", "text_columns": '["a", "b"]'}


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--help"])
    assert "--learning_rate" in capsys.readouterr().out


# Doing it


def test_runs_are_done_once_so_many_at_a_time(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    pretend = Pretend(home, seconds=0.1)
    state = status(read_sweep(home / "sweep.yaml"), tmp_path, workers=3)
    assert carry_out(state, pretend, lines.append) == {}
    assert len(set(pretend.starts)) == len(pretend.starts) == 8
    assert pretend.most == 3
    assert not state.left
    assert str(state).endswith("\nleft      0, 3 at a time\ntime      none")
    assert [line.split("]")[0] for line in lines[:2]] == ["[1 of 8, 0 min 02 s left", "[2 of 8, 0 min 02 s left"]
    assert lines[-1].startswith("[8 of 8] ")
    assert lines[-1].endswith(RESULT)
    again = Pretend(home)
    assert carry_out(status(read_sweep(home / "sweep.yaml"), tmp_path), again, silent) == {}
    assert again.starts == []


def test_a_sweep_whose_runs_have_finished_changes_no_file(home: Path, tmp_path: Path) -> None:
    sweep, pretend = read_sweep(home / "sweep.yaml"), Pretend(home)
    for settings in status(sweep, tmp_path).sweep.runs:
        finish(home, settings)
    before = tree(tmp_path)
    assert carry_out(status(sweep, tmp_path), pretend, silent) == {}
    assert tree(tmp_path) == before, "the records may lie in a folder that is not to be written to"
    assert not pretend.starts


def test_a_long_run_leaves_a_line_of_progress(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipelt.sweep.workers._TICK", 0.02)
    monkeypatch.setattr("unipelt.files.progress.LINE_SECONDS", 0.05)
    sweep = read_sweep(home / "sweep.yaml", {"task": ["rte"], "method": ["lora"]})
    finish(home, status(sweep, tmp_path).sweep.runs[0])
    said = threading.Event()

    def log(line: str) -> None:
        if line.startswith("sweep: 1 of 2 runs"):
            said.set()

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        assert said.wait(10), "nothing was said while the run went on"
        finish(home, settings)
        return None

    assert carry_out(status(sweep, tmp_path), start, log) == {}


def test_a_failure_is_recorded_the_others_go_on_and_it_is_tried_again(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    sweep = read_sweep(home / "sweep.yaml")
    pretend = Pretend(home, fails=["rte lora 2"])
    failures = carry_out(status(sweep, tmp_path), pretend, lines.append)
    folder = run_folder(tmp_path, sweep.runs[1])
    assert failures == {str(folder): "ValueError: no luck"}
    assert len(pretend.starts) == 8
    failure = json.loads((folder / FAILURE).read_text())
    assert failure["error"] == "ValueError: no luck"
    assert failure["log"] == "epoch 1\nValueError: no luck"
    assert [line for line in lines if f"{folder.name} FAILED: ValueError: no luck" in line]

    for fails in (["rte lora 2"], []):
        state = status(sweep, tmp_path)
        assert (len(state.failures), len(state.left)) == (1, 1)
        pretend = Pretend(home, fails)
        assert list(carry_out(state, pretend, silent).values()) == ["ValueError: no luck"] * len(fails)
        assert pretend.starts == ["rte lora 2"]
    assert not (folder / FAILURE).exists()
    assert not status(sweep, tmp_path).left


def test_a_run_that_leaves_no_result_or_a_damaged_one_has_failed(home: Path, tmp_path: Path) -> None:
    sweep = read_sweep(home / "sweep.yaml", {"task": ["rte"], "seed": ["1"]})
    (run_folder(tmp_path, sweep.runs[1])).mkdir(parents=True)
    (run_folder(tmp_path, sweep.runs[1]) / RESULT).write_text("{")
    failures = carry_out(status(sweep, tmp_path), lambda settings, stop: None, silent)
    assert list(failures.values()) == ["it ended without a result"] * 2
    told = [json.loads((Path(folder) / FAILURE).read_text()) for folder in failures]
    assert [(one["error"], one["log"]) for one in told] == [("it ended without a result", "")] * 2


def hold(folder: Path, then: Callable[[], None]) -> threading.Thread:
    """Have the folder locked, as by a process on another machine, for a while."""
    begun = threading.Event()

    def work() -> None:
        with locked(folder):
            begun.set()
            time.sleep(0.4)
            then()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    return thread


@pytest.mark.parametrize("claim", ["", ".sweep"])
@pytest.mark.parametrize("ends", ["finished", "vanished", "failed"])
def test_a_run_that_another_process_does_is_waited_for(home: Path, tmp_path: Path, claim: str, ends: str) -> None:
    sweep = read_sweep(home / "sweep.yaml", {"task": ["rte"]})
    state = status(sweep, tmp_path)
    first = state.sweep.runs[0]
    folder = Path(str(first.output_dir))

    def end() -> None:
        if ends == "finished":
            finish(home, first)
        if ends == "failed":
            (folder / FAILURE).write_text(json.dumps({"error": "their bad luck", "log": "", "time": 1.0}))

    pretend, lines = Pretend(home), list[str]()
    thread = hold(folder / claim, end)
    failures = carry_out(state, pretend, lines.append)
    thread.join()
    assert pretend.starts == ["rte lora 2", "rte bitfit 1", "rte bitfit 2", *["rte lora 1"] * (ends == "vanished")]
    assert failures == ({str(folder): "their bad luck"} if ends == "failed" else {})
    assert lines.count("waiting for other processes, which do 1 of the runs") == 1
    assert lines[-1].startswith("[4 of 4] ")


def test_sweeps_in_one_folder_share_the_work(home: Path, tmp_path: Path) -> None:
    pretend = Pretend(home, seconds=0.05)
    states = [status(read_sweep(home / "sweep.yaml"), tmp_path, workers=2) for _ in range(2)]
    threads = [threading.Thread(target=carry_out, args=(state, pretend, silent)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pretend.starts)) == len(pretend.starts) == 8
    assert pretend.most > 2, "they were at it together"
    assert not states[0].left
    assert not states[1].left


def test_an_interruption_stops_the_others_and_records_no_failure(home: Path, tmp_path: Path) -> None:
    stopped = []

    def start(settings: RunSettings, stop: threading.Event) -> str | None:
        if settings.seed == 1:
            time.sleep(0.1)
            raise KeyboardInterrupt
        stopped.append(stop.wait(10))
        raise Busy

    with pytest.raises(KeyboardInterrupt):
        carry_out(status(read_sweep(home / "sweep.yaml"), tmp_path, workers=2), start, silent)
    assert stopped == [True]
    assert not list(tmp_path.rglob(FAILURE))
    pretend = Pretend(home)
    assert carry_out(status(read_sweep(home / "sweep.yaml"), tmp_path), pretend, silent) == {}
    assert len(pretend.starts) == 8


@pytest.mark.parametrize(("text", "reason"), BAD_REQUESTS)
def test_a_request_that_cannot_be_read_is_left_as_it_is(home: Path, tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / REQUEST
    path.write_bytes(text)
    with pytest.raises(SweepError) as caught:
        write_request(read_sweep(home / "sweep.yaml"), tmp_path)
    assert str(caught.value).startswith(f"{path} does not say what a sweep asked for: {reason}"), str(caught.value)
    assert "move it away and start the sweep again" in str(caught.value)
    assert path.read_bytes() == text
    path.unlink()
    write_request(read_sweep(home / "sweep.yaml"), tmp_path)
    request = read_request(tmp_path)
    assert request is not None
    assert len(request["runs"]) == 8


def test_the_command_says_what_is_wrong_with_a_request(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REQUEST).write_text("{}")
    assert main(["sweep", str(home / "sweep.yaml"), "--out", str(tmp_path)]) == 2
    assert f"unipelt: {tmp_path / REQUEST} does not say what a sweep asked for" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/")), "nothing was begun"


@pytest.mark.parametrize(("text", "reason"), BAD_FAILURES)
def test_a_run_whose_failure_cannot_be_read_is_tried_again(
    home: Path, tmp_path: Path, text: bytes, reason: str
) -> None:
    sweep = read_sweep(home / "sweep.yaml", {"task": ["rte"], "method": ["lora"]})
    path = run_folder(tmp_path, sweep.runs[0]) / FAILURE
    path.parent.mkdir()
    path.write_bytes(text)
    state = status(sweep, tmp_path)
    [failure] = state.failures.values()
    assert failure["error"].startswith(f"{path} does not say why it failed: {reason}"), failure["error"]
    assert "failed    1, to be tried again" in str(state)
    pretend = Pretend(home)
    assert carry_out(state, pretend, silent) == {}
    assert pretend.starts == ["rte lora 1", "rte lora 2"]
    assert not path.exists()


def test_a_folder_where_a_file_should_be_is_named_before_anything_runs(home: Path, tmp_path: Path) -> None:
    sweep = read_sweep(home / "sweep.yaml")
    path = run_folder(tmp_path, sweep.runs[0]) / FAILURE
    path.mkdir(parents=True)
    with pytest.raises(SweepError, match="cannot be read: Is a directory; move it away") as caught:
        status(sweep, tmp_path)
    assert str(path) in str(caught.value)


def test_the_request_lists_what_all_sweeps_asked_for(home: Path, tmp_path: Path) -> None:
    whole = read_sweep(home / "sweep.yaml")
    for task in ("rte", "sst2", "rte"):
        write_request(read_sweep(home / "sweep.yaml", {"task": [task]}), tmp_path)
    request = json.loads((tmp_path / REQUEST).read_text())
    assert [item["digest"] for item in request["runs"]] == [settings.digest() for settings in whole.runs]
    assert [item["folder"] for item in request["runs"]] == [run_folder(tmp_path, one).name for one in whole.runs]
    assert len({item["cell"] for item in request["runs"]}) == 4
    assert request["sweep"] == str(home / "sweep.yaml")
    assert RunSettings(**request["runs"][0]["settings"]).digest() == whole.runs[0].digest()


# Sweeps that are killed


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def killed(home: Path) -> dict[str, list[int]]:
    command = [sys.executable, str(TESTS / "scripts" / "killed_sweep.py"), str(home)]
    subprocess.run(command, check=True, env=environment(), timeout=120)
    return json.loads((home / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_sweep_goes_on_without_repeating_a_run(home: Path, killed: dict[str, list[int]], moment: str) -> None:
    first, *_, last = killed[moment]
    assert first == signal.SIGKILL
    assert last == 0
    out = home / f"moment-{list(MOMENTS).index(moment)}"
    assert len(list(out.glob(f"*/{RESULT}"))) == 8
    assert not list(out.rglob("*.tmp")) + list(out.rglob(FAILURE))
    starts = (out / "starts.txt").read_text().split()
    assert len(set(starts)) == 8
    assert len(starts) == 9, "only the run that was killed, or that failed, is started again"


@pytest.mark.slow
def test_three_processes_in_one_folder_start_each_run_once(home: Path, killed: dict[str, list[int]]) -> None:
    assert killed["shared"] == [0, 0, 0]
    starts = (home / "shared" / "starts.txt").read_text().split()
    assert len(set(starts)) == len(starts) == 8


# Runs in processes of their own


def command(home: Path, out: Path, *options: str) -> list[str]:
    # a shell's background job, and all that it starts, would not be interrupted
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from unipelt.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "sweep", str(home / "sweep.yaml"), "--out", str(out), *options]


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_leaves_its_record_or_its_last_words(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS.parent)
    options = ["--tasks", "rte", "--methods", "lora", "--workers", "2"]
    folder = run_folder(tmp_path, read_sweep(home / "sweep.yaml").runs[1])
    folder.mkdir()
    (folder / RESULT).write_text("{")
    assert main(["sweep", str(home / "sweep.yaml"), "--out", str(tmp_path), *options]) == 1
    printed = capsys.readouterr().out
    assert "rte · lora · K=16 · seed 1: accuracy" in printed
    assert "1 of 2 runs failed" in printed
    failure = json.loads((folder / FAILURE).read_text())
    assert failure["error"].startswith(f"RunError: {folder / RESULT} is not valid JSON")
    assert "Traceback" in failure["log"]
    done = run_folder(tmp_path, read_sweep(home / "sweep.yaml").runs[0])
    assert read_result(done)["attempts"] == 1
    assert "epoch   1" in (done / LOG).read_text()


def children(folder: Path) -> list[int]:
    """Processes that do runs in a folder: their output goes to a log there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            log = path.readlink()
            if log.name == LOG and log.is_relative_to(folder):
                found.append(int(path.parts[2]))
    return found


def unfinished(out: Path) -> list[Path]:
    """Runs that have a checkpoint and no result."""
    found = {path.parents[2] for path in out.glob("*/checkpoints/*/complete.json")}
    return [folder for folder in found if not (folder / RESULT).exists()]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_of_a_real_sweep_takes_its_runs_along_and_kill_of_a_run_is_a_failure(home: Path, tmp_path: Path) -> None:
    line = command(home, tmp_path, "--tasks", "rte", "--epochs", "30", "--train_samples", "32")
    line += ["--patience", "null"]
    first = subprocess.Popen(line, env=environment())
    until(lambda: unfinished(tmp_path))
    first.kill()
    first.wait()
    until(lambda: not children(tmp_path), 10)
    begun = unfinished(tmp_path)
    assert not list(tmp_path.glob(f"*/{RESULT}"))

    second = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
    until(lambda: (begun[0] / RESULT).exists())
    until(lambda: unfinished(tmp_path))
    victim = unfinished(tmp_path)[0]
    os.kill(children(victim)[0], signal.SIGKILL)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "1 of 4 runs failed" in printed
    assert printed.count("killed by SIGKILL (for want of memory?)") == 2
    assert read_result(begun[0])["attempts"] == 2
    assert "going on from" in (begun[0] / LOG).read_text()
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{RESULT}")}
    assert len(results) == 3
    assert json.loads((victim / FAILURE).read_text())["error"].startswith("killed by SIGKILL")

    third = subprocess.Popen(line, env=environment())
    until(lambda: children(tmp_path))
    third.send_signal(signal.SIGINT)
    assert third.wait(20) == 130
    assert not children(tmp_path)
    assert subprocess.run(line, env=environment(), timeout=120).returncode == 0
    assert len(list(tmp_path.glob(f"*/{RESULT}"))) == 4
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert not list(tmp_path.rglob(FAILURE))
