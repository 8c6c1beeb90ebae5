"""Options for Trainer in a run's settings: what is refused, and what the options do in whole runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from report_records import make_record
from tiny_task import make_quick, quick, write_glue
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from unipelt.cli import main
from unipelt.config.schema import ConfigError
from unipelt.glue.pack_runs import run_packed
from unipelt.glue.rerun import rerun
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.report.cells import Run
from unipelt.report.group import group_runs
from unipelt.runs.errors import RunError
from unipelt.runs.options import parse
from unipelt.runs.settings import SettingsError
from unipelt.runs.trainer_options import FIXED, OURS, check_joint
from unipelt.sweep import read_sweep, status, write_request
from unipelt.tasks.settings import QASettings, TranslationSettings

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_quick(tmp_path_factory.mktemp("home"))
    write_glue(folder / "glue")
    return folder


def quiet(line: str) -> None:
    pass


def settings(home: Path, out: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> RunSettings:
    values = {"method": "lora", "batch_size": 8, "train_samples": 32, "dev_samples": 16, **changes}
    return RunSettings(**quick(home, output_dir=str(out), trainer=trainer, **values))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is refused, and when


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        (7, "trainer must be a mapping of options for Trainer to values, not 7"),
        (
            {"lr_schedular_type": "cosine"},
            "unknown option 'trainer.lr_schedular_type'; did you mean 'lr_scheduler_type'?",
        ),
        ({"zzz": 1}, "unknown option 'trainer.zzz'; the options are those of transformers.TrainingArguments"),
        ({"learning_rate": 1.0}, "trainer.learning_rate is the setting learning_rate of a run"),
        ({"num_train_epochs": 1}, "trainer.num_train_epochs is the setting epochs of a run; give epochs instead"),
        ({"bf16": True}, "give precision instead"),
        ({"save_steps": 5}, "trainer.save_steps is set by the run itself: a run writes a checkpoint at every"),
        ({"hub_token": "hf_secret"}, "log in with `hf auth login` instead; leave it out"),
        ({"lr_scheduler_type": "cosin"}, "trainer.lr_scheduler_type is 'cosin'; did you mean 'cosine'?"),
        ({"optim": 3}, "trainer.optim is 3; "),
        ({"gradient_accumulation_steps": "two"}, "must be a whole number, not 'two'"),
        ({"gradient_accumulation_steps": 2.5}, "must be a whole number, not 2.5"),
        ({"gradient_accumulation_steps": 0}, "must be above 0, not 0"),
        ({"torch_compile": "yes"}, "trainer.torch_compile must be true or false, not 'yes'"),
        ({"label_smoothing_factor": True}, "trainer.label_smoothing_factor must be a number, not True"),
        ({"label_smoothing_factor": 1.0}, "must be at least 0 and below 1, not 1.0"),
        ({"label_smoothing_factor": float("nan")}, "trainer.label_smoothing_factor must be a number, not nan"),
        ({"warmup_steps": 10**400}, "trainer.warmup_steps must be a number, not 1000"),
        ({"max_steps": 10**400}, "trainer.max_steps must be a whole number, not 1000"),
        ({"eval_strategy": "no"}, "trainer.eval_strategy cannot be no"),
        ({"eval_strategy": "steps"}, "trainer.eval_strategy steps needs trainer.eval_steps"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "goes with trainer.eval_strategy steps, not epoch"),
        ({"report_to": "wandbb"}, "trainer.report_to names 'wandbb'; did you mean 'wandb'?"),
        ({"report_to": ["tensorboard", "board"]}, "trainer.report_to names 'board'"),
        ({"push_to_hub": True}, "trainer.push_to_hub needs trainer.hub_model_id"),
        ({"hub_strategy": "all_checkpoints"}, "trainer.hub_strategy cannot upload checkpoints"),
        ({"fp16": True}, "trainer.fp16 needs a GPU, and device is cpu"),
        (
            {"report_to": "mlflow"},
            "trainer.report_to names mlflow, whose package is not installed here; install it (pip install mlflow)",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "trainer: One of min_lr or min_lr_rate should be set"),
        (
            {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
            "trainer: You need to install `galore_torch`",
        ),
        ({"logging_steps": 2.5}, "trainer: --logging_steps must be an integer if bigger than 1"),
    ],
)
def test_what_cannot_be_meant(trainer: Any, sentence: str, home: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(SettingsError) as caught:
        run(settings(home, tmp_path / "run", trainer), log=quiet)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_contradict_an_option(home: Path, tmp_path: Path) -> None:
    for trainer, changes, said in (
        ({"warmup_steps": 3}, {"warmup_ratio": 0.1}, "warmup_ratio and trainer.warmup_steps exclude each other"),
        ({"fp16": True}, {"precision": "bf16", "device": "auto"}, "precision bf16 and trainer.fp16 exclude each other"),
    ):
        with pytest.raises(SettingsError, match=re.escape(said)):
            settings(home, tmp_path, trainer, **changes)
    values = {**quick(home), "train_file": None, "dev_file": None, "task": "stsb", "glue_dir": str(home / "glue")}
    values |= {"max_length": 32, "train_samples": 16, "dev_samples": 8, "output_dir": str(tmp_path / "run")}
    values |= {"trainer": {"label_smoothing_factor": 0.1}}
    with pytest.raises(SettingsError, match=r"is for classes, and this task has scores"):
        run(RunSettings(**values), log=quiet)
    assert not (tmp_path / "run").exists()


def test_the_lists_are_of_options_that_there_are() -> None:
    """And what a run takes of its own settings, no mapping can change."""
    known = {item.name for item in fields(Seq2SeqTrainingArguments)}
    gone = {"overwrite_output_dir", "warmup_ratio", "no_cuda"}  # of older versions
    new = {"activation_checkpointing", "activation_checkpointing_kwargs", "ddp_static_graph"}  # not in 5.0
    assert {*OURS, *FIXED} - known <= gone | new
    assert not OURS.keys() & FIXED.keys()
    own = {item.name for kind in (RunSettings, QASettings, TranslationSettings) for item in fields(kind)}
    assert set(OURS.values()) <= own
    assert all(FIXED.values()), "each with its reason"


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"train_sampling_strategy": None}, None),
        ({"train_sampling_strategy": "random"}, None),
        ({"train_sampling_strategy": "sequential"}, None),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"group_by_length": True}, "group_by_length"),
        ({"group_by_length": False}, None),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config"),
    ],
)
def test_several_processes_draw_the_same_batches(options: dict[str, Any], refused: str | None) -> None:
    check_joint(options, 1)
    if refused is None:
        check_joint(options, 2)
    else:
        with pytest.raises(ConfigError, match=f"trainer.{refused} is for a run of one process, and here are 2"):
            check_joint(options, 2)


def test_other_tasks_take_options_too(tmp_path: Path) -> None:
    file = str(tmp_path / "a.json")
    assert parse(["--train_file", file, "--trainer.logging_steps", "5"], QASettings).trainer == {"logging_steps": 5}
    with pytest.raises(SettingsError, match="has no effect on questions"):
        parse(["--train_file", file, "--trainer.label_smoothing_factor", "0.1"], QASettings)
    words = ["--train_file", file, "--dev_file", file, "--trainer.sortish_sampler", "true"]
    assert parse(words, TranslationSettings).trainer == {"sortish_sampler": True}
    with pytest.raises(SettingsError, match=r"unknown option 'trainer\.sortish_sampler'"):
        parse(["--train_file", file, "--trainer.sortish_sampler", "true"], QASettings)


# Settings and their digest


def test_files_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("task: rte\ntrainer: {lr_scheduler_type: cosine, adam_epsilon: 1e-7}\n")
    Path("mine.yaml").write_text("base: base.yaml\ntrainer.logging_steps: 10\n")
    taken = parse(["mine.yaml"], RunSettings)
    assert taken.trainer == {"lr_scheduler_type": "cosine", "adam_epsilon": 1e-7, "logging_steps": 10}
    words = ["mine.yaml", "--trainer.logging_steps=20", "--trainer.adam_epsilon", "null"]
    changed = parse(words, RunSettings)
    assert changed.trainer == {"lr_scheduler_type": "cosine", "logging_steps": 20}
    assert changed.output_dir == str(Path("runs") / "mine-trainer.logging_steps=20-trainer.adam_epsilon=None")
    Path("whole.yaml").write_text("base: base.yaml\ntrainer: {logging_steps: 10}\n")
    assert parse(["whole.yaml"], RunSettings).trainer == {"logging_steps": 10}
    Path("list.yaml").write_text("task: rte\ntrainer: [a]\n")
    with pytest.raises(SettingsError, match="trainer must be a mapping"):
        parse(["list.yaml", "--trainer.logging_steps", "5"], RunSettings)
    with pytest.raises(SettingsError, match=r"trainer\.logging_steps needs a value"):
        parse(["mine.yaml", "--trainer.logging_steps"], RunSettings)


def test_digests() -> None:
    plain = RunSettings(task="rte")
    assert plain.digest() == RunSettings(task="rte", trainer={}).digest()
    assert plain.digest() == RunSettings(task="rte", trainer={"tf32": None}).digest()
    assert "trainer" not in plain.identity()
    options: list[dict[str, Any]] = [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "linear"},
        {"logging_steps": 5},
    ]
    assert len({RunSettings(task="rte", trainer=each).digest() for each in options} | {plain.digest()}) == 4
    one = RunSettings(task="rte", trainer={"logging_steps": 5, "optim": "sgd"})
    assert one.digest() == RunSettings(task="rte", trainer={"optim": "sgd", "logging_steps": 5}).digest()
    assert RunSettings(**one.to_dict()) == one


# What the options do


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that train."""
    found: list[Trainer] = []
    train: Callable[..., Any] = Trainer.train

    def note(self: Trainer, *args: Any, **options: Any) -> Any:
        found.append(self)
        return train(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", note)
    return found


def test_options_reach_trainer_and_the_record(home: Path, tmp_path: Path, made: list[Trainer]) -> None:
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "adam_beta2": 0.9, "label_smoothing_factor": 0.2}
    lines: list[str] = []
    record = run(settings(home, tmp_path / "run", options), log=lines.append)
    arguments = made[0].args
    assert {name: getattr(arguments, name) for name in options} == options
    assert made[0].label_smoother is not None
    assert record["settings"]["trainer"] == options
    assert "trainer lr_scheduler_type cosine, warmup_steps 3, adam_beta2 0.9, label_smoothing_factor 0.2" in lines
    plain = run(settings(home, tmp_path / "plain"), log=quiet)
    assert plain["evaluations"] != record["evaluations"]
    assert plain["settings"]["trainer"] is None


def test_an_option_at_its_default_changes_no_number(home: Path, tmp_path: Path) -> None:
    one = run(settings(home, tmp_path / "one"), log=quiet)
    other = run(settings(home, tmp_path / "other", {"lr_scheduler_type": "linear"}), log=quiet)
    assert one["evaluations"] == other["evaluations"]
    assert one["test"] == other["test"]


@pytest.mark.parametrize("train_tokens", [None, 40])
def test_accumulated_steps_are_steps_of_the_larger_batch(home: Path, tmp_path: Path, train_tokens: int | None) -> None:
    """The same gradient, without dropout: 2 batches of 4 against 1 of 8."""
    found = {}
    for batch, options in ((8, {}), (4, {"gradient_accumulation_steps": 2})):
        trainer: dict[str, Any] = {"optim": "sgd", **options}  # AdamW would hide a gradient of another scale
        changes: dict[str, Any] = {
            "batch_size": batch,
            "train_tokens": train_tokens,
            "max_grad_norm": 0.0,
            "learning_rate": 0.1,
        }
        chosen = settings(home, tmp_path / str(batch), trainer, model=str(still(home)), **changes)
        found[batch] = run(chosen, log=quiet)["evaluations"]
    for one, other in zip(found[8], found[4], strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def still(home: Path) -> Path:
    """The model without dropout."""
    folder = home / "still"
    if not folder.exists():
        folder.mkdir()
        for path in (home / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_evaluation_and_logging_at_steps(home: Path, tmp_path: Path) -> None:
    """4 steps an epoch: every third and, since Transformers 5.1, the last; the best checkpoint is tested."""
    lines: list[str] = []
    out = tmp_path / "run"
    record = run(settings(home, out, {"eval_steps": 3, "logging_steps": 2}, keep_checkpoints=True), log=lines.append)
    steps = [item["step"] for item in record["evaluations"]]
    assert steps in ([3, 6, 8], [3, 6])
    assert all(item["train_loss"] is not None for item in record["evaluations"])
    assert record["best"]["step"] in steps
    kept = {path.name for path in (out / "checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-8", f"checkpoint-{record['best']['step']}"}
    assert [line.split()[:2] for line in lines if line.startswith("step")] == [["step", str(at)] for at in steps]
    every = run(settings(home, tmp_path / "every", {"logging_steps": 1}), log=quiet)
    plain = run(settings(home, tmp_path / "plain"), log=quiet)
    for one, other in zip(every["evaluations"], plain["evaluations"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6), "the mean since the evaluation before"
        assert one["loss"] == other["loss"]


def test_a_run_with_options_goes_on_after_a_kill(home: Path, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "eval_steps": 3, "gradient_accumulation_steps": 2}

    def die(line: str) -> None:
        if line.startswith("step      6"):
            raise Killed

    whole = run(settings(home, tmp_path / "whole", options, epochs=5), log=quiet)
    chosen = settings(home, tmp_path / "out", options, epochs=5)
    with pytest.raises(Killed):
        run(chosen, log=die)
    with pytest.raises(RunError, match="unfinished run of other settings"):
        run(settings(home, tmp_path / "out", {"lr_scheduler_type": "linear"}, epochs=5), log=quiet)
    lines: list[str] = []
    record = run(chosen, log=lines.append)
    assert any("going on from" in line for line in lines)
    for part in ("evaluations", "best", "dev", "test"):
        assert record[part] == whole[part], part
    with pytest.raises(RunError, match="trainer is"):
        run(settings(home, tmp_path / "out", epochs=5), log=quiet)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_record(home: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain = run(settings(home, tmp_path / "plain", epochs=1), log=quiet)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    record = run(settings(home, tmp_path / "run", options, epochs=1), log=quiet)
    torch.compiler.reset()
    assert record["evaluations"][0]["loss"] == pytest.approx(plain["evaluations"][0]["loss"], rel=1e-4)
    assert record["test"]["loss"] == pytest.approx(plain["test"]["loss"], rel=1e-4)
    assert record["parameters"] == plain["parameters"]


# Reruns, sweeps and packs


def test_a_rerun_takes_the_options_but_sends_nothing(home: Path, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "cosine", "report_to": "tensorboard"}
    run(settings(home, tmp_path / "run", options), log=quiet)
    lines: list[str] = []
    result = rerun(tmp_path / "run", tmp_path / "again", log=lines.append)
    assert result["equal"]
    assert read_result(tmp_path / "again")["settings"]["trainer"] == {"lr_scheduler_type": "cosine"}
    assert not (tmp_path / "again" / "logs").exists()
    assert any("a rerun reports and uploads nothing: trainer.report_to left out" in line for line in lines)


SWEEP = """
task: rte
train_samples: 16
num_train_epochs: 1
trainer: {optim: sgd}
grid:
  - trainer.lr_scheduler_type: [linear, cosine]
    trainer.warmup_steps: [0, 4]
    seed: [1, 2]
"""


def sweep_file(tmp_path: Path, text: str = SWEEP) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_grid_over_options(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path))
    assert len(sweep.runs) == 8
    assert {item.epochs for item in sweep.runs} == {1}
    assert [dict(item.trainer or {}) for item in sweep.runs[::2]] == [
        {"optim": "sgd", "lr_scheduler_type": kind, "warmup_steps": steps}
        for kind in ("linear", "cosine")
        for steps in (0, 4)
    ]
    assert len({sweep.cell(item) for item in sweep.runs}) == 4
    chosen = read_sweep(
        sweep_file(tmp_path, SWEEP.replace("grid:\n", "choose: {trainer.adam_beta1: [0.8, 0.9]}\ngrid:\n"))
    )
    assert len(chosen.runs) == 16
    assert len({chosen.cell(item) for item in chosen.runs}) == 4, "a cell tries the values of what is chosen"
    write_request(status(chosen, tmp_path / "out").sweep, tmp_path / "out")


def test_a_sweep_is_narrowed_and_changed_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_file(tmp_path)
    few = read_sweep(path, override={"trainer.lr_scheduler_type": "cosine", "trainer.adam_beta1": "0.5"})
    assert len(few.runs) == 4
    for item in few.runs:
        assert item.trainer is not None
        assert (item.trainer["lr_scheduler_type"], item.trainer["adam_beta1"]) == ("cosine", 0.5)
    words = ["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*words, "--trainer.warmup_steps", "4", "--trainer.lr_scheduler_type=linear"]) == 0
    assert "runs      2\n" in capsys.readouterr().out
    for more, said in (
        (["--trainer.warmup_steps", "7"], "no run that is left has the trainer.warmup_steps '7'; there is 0; 4"),
        (["--trainer.optimm", "sgd"], "unknown option 'trainer.optimm'; did you mean 'optim'?"),
        (["--pack", "2"], "trainer (optim, lr_scheduler_type, warmup_steps) and a pack exclude each other"),
        (["--method.lora.rank", "2"], "--method.lora.rank"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    whole = sweep_file(tmp_path, "task: rte\ngrid:\n  - trainer: [{optim: sgd}, {optim: adafactor}]\n")
    assert [item.trainer for item in read_sweep(whole).runs] == [{"optim": "sgd"}, {"optim": "adafactor"}]
    assert main(["sweep", str(whole), "--out", "x", "--dry-run", "--trainer.optim", "sgd"]) == 2
    assert "lists trainer as a whole" in capsys.readouterr().err


def test_a_pack_refuses_options(home: Path, tmp_path: Path) -> None:
    chosen = settings(home, tmp_path / "run", {"lr_scheduler_type": "cosine"})
    outcome = run_packed([chosen], places=1, log=quiet)[str(tmp_path / "run")]
    assert "trainer (lr_scheduler_type) and a pack exclude each other" in str(outcome)
    assert not (tmp_path / "run").exists()


def test_a_report_tells_options_apart_or_chooses(tmp_path: Path) -> None:
    kinds = (("linear", 0.5), ("cosine", 0.7))
    records = [
        make_record(seed=seed, score=score, dev=score, trainer={"optim": "sgd", "lr_scheduler_type": kind})
        for kind, score in kinds
        for seed in (1, 2)
    ]
    runs = [Run(str(index), record) for index, record in enumerate(records)]
    rows = {cell.row: cell.mean for cell in group_runs(runs, (), {})}
    assert rows == {f"adapter [trainer.lr_scheduler_type={kind}]": score for kind, score in kinds}
    (cell,) = group_runs(runs, ("trainer.lr_scheduler_type",), {})
    assert (cell.row, cell.mean) == ("adapter", 0.7)
    old = Run("old", make_record(seed=1))
    new = Run("new", make_record(seed=2, trainer=None, rates=None))
    assert len(group_runs([old, new], (), {})) == 1, "a record from before there were options is as one without"


# Trackers


def test_tensorboard_has_the_losses_and_scores(home: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    record = run(settings(home, out, {"report_to": "tensorboard", "logging_steps": 2}), log=quiet)
    assert files(out) == {".lock", "result.json", "model", "logs"} | ({"gates.png"} & files(out))
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert sorted(found["train/loss"]) == [2, 4, 6, 8]
    assert found["train/loss"][2] != found["train/loss"][4]
    assert found["eval/loss"] == pytest.approx({item["step"]: item["loss"] for item in record["evaluations"]})
    scores = {item["step"]: item["metrics"]["accuracy"] for item in record["evaluations"]}
    assert found["eval/accuracy"] == pytest.approx(scores)
    (out / "result.json").unlink()
    with pytest.raises(RunError, match="is of no run"):
        run(settings(home, out, {"report_to": "tensorboard", "logging_steps": 2}), log=quiet)


def test_a_run_again_has_new_logs(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(settings(home, out, {"report_to": ["tensorboard"]}, epochs=1), log=quiet)
    first = files(out / "logs")
    run(settings(home, out, {"report_to": ["tensorboard"]}, epochs=1, overwrite=True), log=quiet)
    assert len(files(out / "logs")) == 1
    assert files(out / "logs") != first


def test_a_tracker_that_is_not_installed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(
        SettingsError, match=r"names tensorboard, whose package is not installed here; install it \(pip"
    ):
        run(settings(home, tmp_path / "run", {"report_to": "tensorboard"}), log=quiet)
    assert not (tmp_path / "run").exists()


def test_the_arguments_are_those_of_trainer() -> None:
    assert RunSettings.arguments == TrainingArguments.__name__
    assert TranslationSettings.arguments == Seq2SeqTrainingArguments.__name__
