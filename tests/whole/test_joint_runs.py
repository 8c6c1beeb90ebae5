"""Runs in two processes: the numbers of one process, the record, the continuation after a kill, and the refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import BAD, GOOD, PLAIN, make_quick, quick, save_model, write_glue

from unipelt.demo.run import run_demo
from unipelt.glue.fold_run import fold_run
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.rerun import rerun, settings_of
from unipelt.glue.run import run as run_glue
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.runs import processes
from unipelt.runs.compare import compare, surroundings
from unipelt.runs.errors import RunError
from unipelt.runs.folder import CHECKPOINTS
from unipelt.runs.run import run as run_task
from unipelt.sweep import Sweep, carry_out, status
from unipelt.tasks import qa, translation
from unipelt.tasks.settings import QASettings, TranslationSettings

pytestmark = pytest.mark.usefixtures("alone")

TESTS = Path(__file__).parents[1]
TOLERANCE = 5e-6
Runs = dict[str, tuple[str, dict[str, Any]]]


def without_dropout(model: Path) -> Path:
    """The model in a folder, with every dropout 0: dropout is drawn by each process for its own rows."""
    config = json.loads((model / "config.json").read_text())
    config |= {name: 0.0 for name, value in config.items() if "dropout" in name and value}
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_quick(tmp_path_factory.mktemp("home"))
    save_model(folder / "dropout")
    without_dropout(folder / "model")
    without_dropout(save_model(folder / "bart", "bart"))
    write_glue(folder / "glue", rows=45)
    articles = []
    for index in range(10):
        words = [PLAIN[(index + place) % len(PLAIN)] for place in range(6 + index % 5)]
        words[index % 5] = (*GOOD, *BAD)[index % 8]
        answer = {"text": words[index % 5], "answer_start": len(" ".join(["", *words[: index % 5]]))}
        asked = [{"id": f"{index}-{number}", "question": "was the cat", "answers": [answer]} for number in range(4)]
        articles.append({"title": str(index), "paragraphs": [{"context": " ".join(words), "qas": asked}]})
    (folder / "all.json").write_text(json.dumps({"version": "1", "data": articles}))
    for name, count in (("pairs", 41), ("pairs-dev", 11)):
        rows = [[PLAIN[(7 * index + place) % 12] for place in range(2 + index % 4)] for index in range(count)]
        for ending, step in (("en", 1), ("de", -1)):
            (folder / f"{name}.{ending}").write_text("".join(f"{' '.join(row[::step])}\n" for row in rows))
    return folder


def classification(home: Path) -> dict[str, Any]:
    """A run with gates, whose last batch of an epoch has three rows: one process has one, the other has two."""
    return quick(home, train_samples=51, eval_tokens=60, max_length=12)


def scores(home: Path) -> dict[str, Any]:
    """A run with scores, batches in parts, several in a step, one of a single row, and predictions."""
    return quick(
        home,
        **{"task": "stsb", "glue_dir": str(home / "glue"), "train_file": None, "dev_file": None, "train_samples": 25},
        **{"dev_samples": 17, "max_length": 32, "eval_tokens": 60, "train_tokens": 60, "do_predict": True},
        **{"batch_size": 6, "trainer": {"gradient_accumulation_steps": 2}, "method": "adapter"},
    )


def questions(home: Path) -> dict[str, Any]:
    given = {"train_file": str(home / "all.json"), "max_length": 12, "stride": 2, "eval_batch_size": 5}
    return {**short(home), **given, "model": str(home / "model")}


def translations(home: Path) -> dict[str, Any]:
    """A run whose loss is the mean over tokens, of which the processes have different numbers."""
    files = {"train_file": str(home / "pairs"), "dev_file": str(home / "pairs-dev")}
    smoothed = {"trainer": {"label_smoothing_factor": 0.1}, "max_target_length": 8, "max_length": 12}
    return {**short(home), **files, **smoothed, "model": str(home / "bart"), "eval_batch_size": 2}


def short(home: Path) -> dict[str, Any]:
    names = ("epochs", "batch_size", "learning_rate", "threads", "device")
    return {name: value for name, value in quick(home).items() if name in names}


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def do_in_two(folder: Path, runs: Runs, *words: str) -> list[dict[str, str | None]]:
    """Do these runs in two processes. Return the errors of each process."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, str(TESTS / "scripts" / "joint_runs.py"), str(folder), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    print(subprocess.run(command, env=environment(), timeout=200, check=False, **pipes).stdout)
    return [json.loads(file.read_text()) for file in sorted(folder.glob("errors-*.json"))]


def do_in_one(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    if kind == "glue":
        return run_glue(RunSettings(**values), lambda line: None)
    if kind == "questions":
        return run_task(QASettings(**values), qa.prepare, lambda line: None)
    return run_task(TranslationSettings(**values), translation.prepare, lambda line: None)


def check_equal(folder: Path, kind: str, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare a run of `do_in_two`, whose record is in this folder, with the same run in one process."""
    values = {**values, "output_dir": str(folder / "one")}
    one, two = do_in_one(kind, values), read_result(folder / "two")
    found = compare(one, two, TOLERANCE)
    assert found["differences"] == []
    assert found["numbers"] > 15
    first, second = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if name == "qa_outputs.bias":  # softmax takes no notice of it, so its gradient is rounding alone
            continue
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert (two["world_size"], one.get("world_size")) == (2, None)
    assert two["attempts"] == 1
    assert two["digest"] == one["digest"]
    assert sorted(path.name for path in (folder / "two").iterdir() if path.name != ".lock") == sorted(
        path.name for path in (folder / "one").iterdir() if path.name != ".lock"
    )
    assert not (folder / "two" / CHECKPOINTS).exists()
    return one, two


@pytest.fixture(scope="module")
def quick_runs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str | None]]]:
    """The folder of runs in two processes, and the errors of each process."""
    folder = tmp_path_factory.mktemp("joint")
    (folder / "glue").mkdir()
    runs: Runs = {"glue": ("glue", {**classification(home), "output_dir": str(folder / "glue" / "two")})}
    refused = {**classification(home), "output_dir": str(folder / "refused")}
    runs |= {
        "batch": ("glue", {**refused, "batch_size": 13}),
        "file": ("glue", {**refused, "train_file": str(home / "absent.tsv")}),
        "other batches": ("glue", {**refused, "trainer": {"accelerator_config": {"split_batches": True}}}),
        "diverged": ("glue", {**refused, "method": "fine-tuning", "learning_rate": 1e20, "max_grad_norm": 0}),
        "another number": ("glue", {**refused, "output_dir": str(folder / "begun")}),
    }
    begun = folder / "begun" / CHECKPOINTS
    begun.mkdir(parents=True)
    progress = {"settings": RunSettings(**refused).digest(), "attempts": 1}
    progress["seconds"] = dict.fromkeys(("train", "evaluation", "total"), 0.0)
    (begun / "progress.json").write_text(json.dumps(progress))
    return folder, do_in_two(folder, runs)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    home: Path, quick_runs: tuple[Path, list[dict[str, str | None]]]
) -> None:
    folder, errors = quick_runs
    assert [found["glue"] for found in errors] == [None, None]
    one, two = check_equal(folder / "glue", "glue", classification(home))
    assert {"what": "world_size", "then": 1, "now": 2} in surroundings(one, two)
    assert len(two["evaluations"]) == 2
    assert two["gates"]["examples"] == 20, "each row once"
    lines = [Path(f"{folder / 'glue' / 'two'}.lines-{rank}") for rank in (0, 1)]
    assert "model" in lines[0].read_text()
    assert not lines[1].exists(), "only the first process speaks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch", "batch_size is 13, which 2 processes cannot share equally"),
        ("file", "absent.tsv"),
        ("other batches", "trainer.accelerator_config is for a run of one process, and here are 2"),
        ("diverged", "training has diverged"),
        ("another number", "holds an unfinished run of 1 processes, and here are 2; start as many"),
    ],
)
def test_all_processes_end_with_the_same_error(
    name: str, message: str, quick_runs: tuple[Path, list[dict[str, str | None]]]
) -> None:
    folder, errors = quick_runs
    assert [message in str(found[name]) for found in errors] == [True, True], errors
    assert not (folder / "refused" / "result.json").exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_in_other_runs(home: Path, tmp_path: Path) -> None:
    """Scores in parts of batches, questions, and translations."""
    kinds = {"glue": scores(home), "questions": questions(home), "translation": translations(home)}
    for kind in kinds:
        (tmp_path / kind).mkdir()
    runs: Runs = {
        kind: (kind, {**values, "output_dir": str(tmp_path / kind / "two")}) for kind, values in kinds.items()
    }
    assert do_in_two(tmp_path, runs) == [dict.fromkeys(runs)] * 2
    for kind, values in kinds.items():
        folder = tmp_path / kind
        check_equal(folder, kind, values)
        names = {path.relative_to(folder / "one") for path in (folder / "one" / "predictions").iterdir()}
        assert names
        for name in names - {Path("predictions/test-nbest.json")}:  # which has probabilities
            assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_of_one_process(home: Path, tmp_path: Path) -> None:
    """Dropout is drawn as if the run had not been killed."""
    values = {**classification(home), "model": str(home / "dropout"), "epochs": 3}
    killed: Runs = {"run": ("glue", {**values, "output_dir": str(tmp_path / "killed")})}
    do_in_two(tmp_path, killed, "kill")
    assert not (tmp_path / "killed" / "result.json").exists()
    both = {"whole": ("glue", {**values, "output_dir": str(tmp_path / "whole")})}
    assert do_in_two(tmp_path, killed | both) == [{"run": None, "whole": None}] * 2
    whole, found = (read_result(tmp_path / name) for name in ("whole", "killed"))
    assert compare(whole, found, 0.0)["differences"] == []
    assert (whole["attempts"], found["attempts"]) == (1, 2)
    one = run_glue(RunSettings(**{**values, "output_dir": str(tmp_path / "one")}), lambda line: None)
    assert compare(one, found, TOLERANCE)["differences"], "the processes draw dropout of their own"


def launch(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(**changes), timeout=200, check=False, capture_output=True, text=True
    )


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
TORCHRUN += ["--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
def test_accelerate_starts_a_run(home: Path, tmp_path: Path) -> None:
    values = {**classification(home), "epochs": 1, "output_dir": str(tmp_path / "two")}
    done = launch([*ACCELERATE, str(TESTS.parent / "examples" / "run_glue.py"), *options(values)])
    assert done.returncode == 0, done.stderr
    assert read_result(tmp_path / "two")["world_size"] == 2
    assert done.stdout.count("accuracy") == 2, "a line for the epoch and one for the result, each once"


@pytest.mark.slow
def test_torchrun_ends_all_processes_with_one_message(home: Path, tmp_path: Path) -> None:
    """An error of all processes, of the input, and an error of one process in training."""
    values = {**classification(home), "output_dir": str(tmp_path / "two")}
    command = [sys.executable, "-c", "import sys; from unipelt.cli import main; sys.exit(main())", "run"]
    done = launch([*TORCHRUN, "--no-python", *command, *options({**values, "batch_size": 13})])
    assert done.returncode != 0
    assert done.stderr.count("unipelt run: batch_size is 13, which 2 processes cannot share equally") == 1
    done = launch([*TORCHRUN, str(TESTS / "scripts" / "joint_failure.py"), *options(values)])
    assert done.returncode != 0
    assert done.stderr.count("run_glue.py: the run failed after it had begun: no room for process 1") == 1
    assert not (tmp_path / "two" / "result.json").exists()


# One process that is told that it is one of several


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("told")
def test_what_is_one_process_says_so(home: Path, tmp_path: Path) -> None:
    settings = RunSettings(**{**classification(home), "output_dir": str(tmp_path / "out")})
    sweep = Sweep("sweep.yaml", (settings,))
    calls: list[Any] = [
        lambda: run_packed([settings], 1),
        lambda: rerun(tmp_path),
        lambda: fold_run(tmp_path),
        lambda: run_demo(tmp_path / "demo"),
        lambda: carry_out(status(sweep, tmp_path / "sweep")),
    ]
    for call in calls:
        with pytest.raises(RunError, match="is one process, and WORLD_SIZE is 2; start it without a launcher"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set; start several processes by torchrun"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is above 1, and WORLD_SIZE is not set; start several processes by torchrun"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP; choose MULTI_GPU there"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed; choose MULTI_GPU there"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "asks for mixed_precision bf16, and the run is to train in fp32"),
    ],
)
def test_a_launcher_that_does_not_fit(
    variables: dict[str, str], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message):
        run_glue(RunSettings(**{**classification(home), "output_dir": str(tmp_path / "out")}))
    assert list(tmp_path.iterdir()) == []


def test_the_cpu_of_accelerate(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    settings = RunSettings(**{**classification(home), "output_dir": str(tmp_path / "out")})
    with pytest.raises(RunError, match="device is cuda, and accelerate's configuration asks for the CPU"):
        run_glue(replace(settings, device="cuda"))


@pytest.mark.slow
def test_a_record_of_several_processes_is_done_again_in_one(
    home: Path, quick_runs: tuple[Path, list[dict[str, str | None]]]
) -> None:
    record = read_result(quick_runs[0] / "glue" / "two")
    _, notes = settings_of(record)
    assert any("it was trained in 2 processes and is done in one now" in note for note in notes)


def test_one_process_needs_no_others() -> None:
    assert (processes.world_size(), processes.rank(), processes.is_first()) == (1, 0, True)
    assert processes.gather(3) == [3]
    assert processes.on_first(lambda: 4) == processes.first_then_others(lambda: 4) == 4
