"""Averages of weights and the choice of submodules at the end of a run: what is tested, recorded and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import make_quick, quick
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainerControl, TrainerState

import unipelt
from unipelt.glue import pack_runs as packed
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.packed_run import PackedRun
from unipelt.glue.rerun import rerun
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result, summary
from unipelt.report import write_report
from unipelt.runs import final
from unipelt.runs.averages import AverageCallback, WeightAverage
from unipelt.runs.folder import checkpoint_at
from unipelt.runs.options import parse
from unipelt.runs.settings import SettingsError
from unipelt.sweep import read_sweep

pytestmark = pytest.mark.usefixtures("alone")


def quiet(line: str) -> None:
    """No line."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick(tmp_path_factory.mktemp("home"))


def settings(home: Path, out: Path, **changes: Any) -> RunSettings:
    return RunSettings(**quick(home, output_dir=str(out), **{"epochs": 3, "method": "unipelt-al-nogate", **changes}))


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run without an average, and its folder."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return run(settings(home, out), quiet), out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = weights(folder), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The average itself


def test_the_mean_is_of_the_last_evaluations() -> None:
    average = WeightAverage({"last": 3})
    values = [torch.full((2,), float(n)) for n in (100, 1, 2, 6)]
    for step, value in enumerate(values):
        average.after_step({"w": value + 50})
        average.after_evaluation(step, {"w": value})
        value.add_(1000)  # the average holds copies
        if step == 1:
            assert torch.equal(average.mean()["w"], torch.full((2,), 50.5)), "of fewer, of those that there are"
    torch.testing.assert_close(average.mean()["w"], torch.full((2,), 3.0))
    assert average.steps == [1, 2, 3]
    again = WeightAverage({"last": 3})
    again.restore(average.state() | {"row": values[0]})
    assert again.steps == average.steps
    for one in (average, again):
        one.after_evaluation(9, {"w": torch.full((2,), 10.0)})
    assert torch.equal(again.mean()["w"], average.mean()["w"])


def test_the_moving_average_is_the_equation() -> None:
    average = WeightAverage({"ema": 0.9})
    values = [torch.tensor([float(n)], dtype=torch.bfloat16) for n in (3, 5, 4)]
    for step, value in enumerate(values):
        average.after_step({"a.b": value.clone()})
        average.after_evaluation(step, {"a.b": value})
    want = 0.9 * (0.9 * 3.0 + 0.1 * 5.0) + 0.1 * 4.0
    assert average.mean()["a.b"].dtype == torch.float32, "in bfloat16, steps of a hundredth are rounded away"
    assert average.mean()["a.b"].item() == pytest.approx(want)
    assert average.steps == []
    again = WeightAverage({"ema": 0.9})
    again.restore(average.state())
    for one in (average, again):
        one.after_step({"a.b": values[0]})
    assert torch.equal(again.mean()["a.b"], average.mean()["a.b"])


@pytest.mark.parametrize("kind", [{"ema": 0.5}, {"last": 2}], ids=str)
def test_an_average_goes_on_from_a_checkpoint(tmp_path: Path, kind: dict[str, float]) -> None:
    model: Any = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    control, checkpoint = TrainerControl(), checkpoint_at(tmp_path, 4)
    checkpoint.mkdir(parents=True)

    def pass_step(*callbacks: AverageCallback) -> None:
        model.weight.data += torch.rand(1, 2)
        for each in callbacks:
            each.on_step_end(None, TrainerState(), control)

    first, second = (AverageCallback(WeightAverage(kind), model, tmp_path) for _ in range(2))
    first.on_train_begin(None, TrainerState(), control)
    pass_step(first)
    pass_step(first)
    first.on_save(None, TrainerState(global_step=4), control)
    second.on_train_begin(None, TrainerState(global_step=4), control)
    assert second.average.mean().keys() == {"weight"}, "what trains"
    pass_step(first, second)
    for each in (first, second):
        each.average.after_evaluation(8, {"weight": model.weight})
    assert second.average.steps == first.average.steps == ([4, 8] if "last" in kind else [])
    assert torch.equal(second.average.mean()["weight"], first.average.mean()["weight"])
    assert not torch.equal(second.average.mean()["weight"], model.weight)


# Settings


@pytest.mark.parametrize(
    ("average", "sentence"),
    [
        ("last-5", "average must be one of"),
        ({"last": 2, "ema": 0.9}, "average must be one of"),
        ({"swa": 3}, "average must be one of"),
        ({"last": 4}, "average.last must be a whole number from 1 to epochs, 3, not 4"),
        ({"last": 1.5}, "average.last must be a whole number"),
        ({"last": True}, "average.last must be a whole number"),
        ({"ema": 1}, "average.ema must be above 0 and below 1, not 1"),
        ({"ema": "much"}, "average.ema must be above 0 and below 1, not 'much'"),
        ({"ema": 1.5}, "average.ema must be above 0 and below 1"),
    ],
)
def test_a_wrong_average_is_refused(home: Path, tmp_path: Path, average: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace(".", r"\.")):
        settings(home, tmp_path, average=average)


def test_a_choice_without_submodules_is_refused(home: Path, tmp_path: Path) -> None:
    for method in ("fine-tuning", "lora"):
        with pytest.raises(SettingsError, match=r"select chooses between two submodules or more.*leave select out"):
            settings(home, tmp_path, method=method, select=True)


def test_older_digests_stay_and_options_and_grids_set_it(home: Path, tmp_path: Path) -> None:
    default = settings(home, tmp_path)
    assert {"average", "select"}.isdisjoint(default.identity())
    assert settings(home, tmp_path, average={"last": None}).digest() == default.digest()
    words = ["--task", "rte", "--average.ema", "0.99", "--select", "true"]
    taken = parse(words, RunSettings)
    assert taken.average == {"ema": 0.99}
    assert taken.select is True
    file = tmp_path / "sweep.yaml"
    grid = {"task": "rte", "average": [None, {"last": 5}], "select": [False, True]}
    file.write_text(json.dumps({"grid": [grid, {"task": "rte", "average.ema": [0.9, 0.99]}]}))
    runs = read_sweep(file).runs
    assert [one.average for one in runs] == [None, None, {"last": 5}, {"last": 5}, {"ema": 0.9}, {"ema": 0.99}]
    assert [one.select for one in runs] == [False, True] * 2 + [False, False]


# Runs


@pytest.mark.parametrize("average", [{"last": 2}, pytest.param({"ema": 0.9}, marks=pytest.mark.slow)], ids=str)
def test_the_average_is_a_candidate_beside_the_epochs(
    home: Path,
    tmp_path: Path,
    plain: tuple[dict[str, Any], Path],
    average: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Tensor]] = []
    mean = WeightAverage.mean

    def note(self: WeightAverage) -> dict[str, Tensor]:
        seen.append(mean(self))
        return seen[-1]

    monkeypatch.setattr(WeightAverage, "mean", note)
    lines: list[str] = []
    record = run(settings(home, tmp_path / "run", average=average), lines.append)
    assert record["evaluations"] == plain[0]["evaluations"], "training does not change"
    entry = record["average"]
    ((kind, value),) = average.items()
    assert entry[kind] == value
    assert entry["steps"] == ([8, 12] if kind == "last" else [])
    best = plain[0]["dev"]["metrics"]["accuracy"]
    assert entry["taken"] == (entry["dev"]["metrics"]["accuracy"] >= best)
    assert any(line.startswith(f"average ({kind} {value:g})") for line in lines)
    stored = weights(tmp_path / "run")
    trained = {name for name in stored if name in seen[0]}
    assert trained == stored.keys(), "a checkpoint holds what trains"
    if entry["taken"]:
        assert all(torch.equal(stored[name], seen[0][name]) for name in trained)
        assert record["dev"] == entry["dev"]
        assert "with averaged weights" in summary(record, "")
    tests = record["tests"]
    assert tests["best_epoch"] == plain[0]["test"], "what averaging gained is in the record"
    assert (tests["average"] == record["test"]) == (entry["taken"] or tests["average"] == tests["best_epoch"])
    monkeypatch.setattr(final, "_evaluate", lambda trainer, job: {"loss": 9.0, "metrics": {"accuracy": -1.0}})
    worse = run(settings(home, tmp_path / "worse", average=average), quiet)
    assert worse["average"]["taken"] is False
    assert worse["dev"] == plain[0]["dev"]
    assert same_weights(tmp_path / "worse", plain[1])
    assert worse["test"] == plain[0]["test"]
    assert worse["tests"] == tests
    assert "tests" not in plain[0]


class Kill(BaseException):
    """As of the process."""


def stop_after(steps: int, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end at the call after that many calls of a method."""
    method: Callable[..., Any] = getattr(owner, name)
    count = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > steps:
            raise Kill
        return method(*args, **options)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("average", "method", "moment"),
    [
        pytest.param({"last": 2}, "unipelt-apl", 9, marks=pytest.mark.slow),
        pytest.param({"ema": 0.8}, "fine-tuning", 9, marks=pytest.mark.slow),
        pytest.param({"ema": 0.8}, "unipelt-al-nogate", "save", marks=pytest.mark.slow),
        pytest.param({"last": 2}, "unipelt-al-nogate", "end", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_goes_on_after_a_kill_bit_for_bit(
    home: Path, tmp_path: Path, average: Any, method: str, moment: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"average": average, "method": method, "learning_rate": 1e-3}
    whole = run(settings(home, tmp_path / "whole", **changes), quiet)
    with monkeypatch.context() as patch:
        if moment == "end":
            stop_after(0, final, "_evaluate", patch)
        elif moment == "save":  # a checkpoint without its average is not complete
            stop_after(1, AverageCallback, "on_save", patch)
        else:
            stop_after(int(moment), AverageCallback, "on_step_end", patch)
        with pytest.raises(Kill):
            run(settings(home, tmp_path / "killed", **changes), quiet)
    record = run(settings(home, tmp_path / "killed", **changes), quiet)
    assert record["attempts"] == 2
    for name in ("evaluations", "average", "dev", "test", "tests", "best"):
        assert record[name] == whole[name], name
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model without dropout, since a checkpoint of a pack holds no state of the generator."""
    return make_quick(tmp_path_factory.mktemp("still"), dropout=False)


@pytest.mark.slow
@pytest.mark.parametrize("average", [{"last": 2}, {"ema": 0.8}], ids=str)
def test_in_a_pack_and_on_after_a_kill(
    still: Path, tmp_path: Path, average: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(place: str) -> list[RunSettings]:
        changes: dict[str, Any] = {"average": average, "select": True, "method": "unipelt-al"}
        return [settings(still, tmp_path / place / str(seed), seed=seed, **changes) for seed in (1, 2)]

    monkeypatch.setattr(packed, "CHECKPOINT_SECONDS", 0.0)
    run_packed(make("whole"), places=2, log=quiet)
    with monkeypatch.context() as patch:
        stop_after(17, PackedRun, "update", patch)
        with pytest.raises(Kill):
            run_packed(make("killed"), places=2, log=quiet)
    run_packed(make("killed"), places=2, log=quiet)
    alone = run(replace(make("whole")[0], output_dir=str(tmp_path / "alone")), quiet)
    for seed in (1, 2):
        whole, record = (read_result(tmp_path / place / str(seed)) for place in ("whole", "killed"))
        assert record["attempts"] == 2
        for name in ("evaluations", "average", "selected", "dev", "test", "tests"):
            assert record[name] == whole[name], name
        assert same_weights(tmp_path / "whole" / str(seed), tmp_path / "killed" / str(seed))
        if seed == 1:
            assert whole["average"]["steps"] == alone["average"]["steps"]
            assert whole["average"]["dev"]["metrics"] == alone["average"]["dev"]["metrics"]
            assert whole["average"]["dev"]["loss"] == pytest.approx(alone["average"]["dev"]["loss"], rel=1e-4)
            assert whole["selected"]["chosen"] == alone["selected"]["chosen"]


@pytest.mark.slow
def test_the_chosen_submodules_are_tested_and_saved(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "run"
    record = run(settings(home, out, select=True, average={"last": 2}, method="unipelt-apl"), lines.append)
    chosen = record["selected"]
    assert len(chosen["subsets"]) == 7
    scores = {tuple(one["submodules"]): one["dev"]["metrics"]["accuracy"] for one in chosen["subsets"]}
    assert scores[tuple(chosen["chosen"])] == max(scores.values())
    assert sorted([*chosen["chosen"], *chosen["removed"]]) == ["adapter", "lora", "prefix"]
    assert record["dev"]["metrics"]["accuracy"] == max(scores.values())
    assert record["method"]["name"] == "unipelt-apl"
    assert any(line.startswith("7 passes; removed ") for line in lines)
    full = record["average"]["dev"] if record["average"]["taken"] else record["evaluations"][-1]
    if record["average"]["taken"]:
        assert chosen["subsets"][0]["dev"] == full
    model = unipelt.from_pretrained(out / "model")
    counts = unipelt.parameter_counts(model)
    assert record["parameters"]["trained"] == counts.trained
    assert chosen["parameters"]["trained"] == run_counts(home).trained
    config = json.loads((out / "model" / "unipelt.json").read_text())["unipelt"]
    assert [name for name in ("adapter", "prefix", "lora") if config[name]] == chosen["chosen"]
    assert {name.partition("_")[0] for name in record["gates"]["values"]} == set(chosen["chosen"])
    again = rerun(out, tmp_path / "again", log=quiet)
    assert again["equal"], again["differences"]
    assert again["weights"]


def run_counts(home: Path) -> unipelt.ParameterCounts:
    base = AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=2)
    return unipelt.parameter_counts(unipelt.inject(base, "unipelt-apl"))


def test_a_choice_between_two_leaves_the_best(home: Path, tmp_path: Path, plain: tuple[dict[str, Any], Path]) -> None:
    record = run(settings(home, tmp_path / "run", select=True), quiet)
    assert record["evaluations"] == plain[0]["evaluations"]
    subsets = {tuple(one["submodules"]): one["dev"] for one in record["selected"]["subsets"]}
    assert [*subsets] == [("adapter", "lora"), ("adapter",), ("lora",)]
    assert subsets["adapter", "lora"] == plain[0]["dev"]
    chosen = tuple(record["selected"]["chosen"])
    assert record["dev"] == subsets[chosen]
    assert subsets[chosen]["metrics"]["accuracy"] == max(dev["metrics"]["accuracy"] for dev in subsets.values())
    model = unipelt.from_pretrained(tmp_path / "run" / "model")
    assert unipelt.parameter_counts(model).submodules.keys() == set(chosen)
    assert ("without" in summary(record, "")) == (len(chosen) == 1)


@pytest.mark.slow
def test_a_report_names_what_differs(home: Path, tmp_path: Path, plain: tuple[dict[str, Any], Path]) -> None:
    runs = tmp_path / "runs"
    run(settings(home, runs / "average", average={"last": 2}), quiet)
    run(settings(home, runs / "select", select=True), quiet)
    dropped = {"preset": "unipelt-al-nogate", "gate": {"dropout": 0.2}}
    run(settings(home, runs / "dropout", method=dropped), quiet)
    (runs / "plain").mkdir()
    (runs / "plain" / "result.json").write_text((plain[1] / "result.json").read_text())
    write_report(runs, tmp_path / "report")
    page = next((tmp_path / "report").glob("*.md")).read_text(encoding="utf-8")
    for words in ("average.last=2", "select=true", "unipelt-al-nogate, gate.dropout=0.2"):
        assert words in page, words
