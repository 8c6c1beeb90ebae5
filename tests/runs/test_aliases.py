"""The usual names of options, as the scripts of Transformers have them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from unipelt.glue.settings import RunSettings
from unipelt.runs.aliases import ALIASES, NOT_TAKEN, SAME, SWITCHES, TRAINERS
from unipelt.runs.options import parse
from unipelt.runs.trainer_options import FIXED, OURS
from unipelt.tasks.settings import QASettings, TranslationSettings

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainer.md"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)


def test_the_command_of_the_script_of_transformers() -> None:
    """As its documentation has it, with the usual additions; what is kept has our own names."""
    words = (
        "--model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval true --max_seq_length 100 "
        "--per_device_train_batch_size 32 --per_device_eval_batch_size=8 --learning_rate 2e-5 --num_train_epochs 3 "
        "--max_train_samples 50 --max_eval_samples 20 --overwrite_output_dir --output_dir out --seed 7 --bf16 "
        "--gradient_accumulation_steps 2 --lr_scheduler_type cosine --report_to tensorboard --use_cpu"
    )
    own = (
        "--model bert-base-cased --task mrpc --max_length 100 --batch_size 32 --eval_batch_size 8 "
        "--learning_rate 2e-5 --epochs 3 --train_samples 50 --dev_samples 20 --overwrite --output_dir out --seed 7 "
        "--precision bf16 --trainer.gradient_accumulation_steps 2 --trainer.lr_scheduler_type cosine "
        "--trainer.report_to tensorboard --device cpu"
    )
    usual = parse(words.split(), RunSettings)
    assert usual == parse(own.split(), RunSettings)
    assert usual.to_dict().keys() == {item.name for item in fields(RunSettings)}


def test_files_of_ones_own_and_switches_that_are_off() -> None:
    words = "--train_file a.tsv --validation_file b.tsv --test_file c.tsv --bf16 false --fp16 false --use_cpu false"
    taken = parse(words.split(), RunSettings)
    assert (taken.train_file, taken.dev_file, taken.test_file) == ("a.tsv", "b.tsv", "c.tsv")
    assert (taken.precision, taken.device, taken.trainer) == ("fp32", "auto", {"fp16": False})


def test_the_other_scripts() -> None:
    words = "--model_name_or_path m --train_file a --validation_file b --num_train_epochs 2 --max_eval_samples 9"
    for kind in (QASettings, TranslationSettings):
        taken = parse(words.split(), kind)
        assert (taken.model, taken.dev_file, taken.epochs, taken.dev_samples) == ("m", "b", 2, 9)


def test_names_in_files() -> None:
    Path("base.yaml").write_text("task_name: rte\nnum_train_epochs: 3\nbf16: true\n")
    Path("mine.yaml").write_text("base: base.yaml\nepochs: 4\nlr_scheduler_type: cosine\ndo_train: true\n")
    taken = parse(["mine.yaml"], RunSettings)
    assert (taken.task, taken.epochs, taken.precision) == ("rte", 4, "bf16")
    assert taken.trainer == {"lr_scheduler_type": "cosine"}
    over = parse(["mine.yaml", "--num_train_epochs", "5", "--trainer.lr_scheduler_type", "linear"], RunSettings)
    assert (over.epochs, over.trainer) == (5, {"lr_scheduler_type": "linear"})
    assert over.output_dir == str(Path("runs") / "mine-epochs=5-trainer.lr_scheduler_type=linear")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--num_train_epochs 3 --epochs 3", "num_train_epochs is another name of epochs, and both are given"),
        ("--epochs 3 --num_train_epochs 3", "num_train_epochs is another name of epochs, and both are given"),
        ("--bf16 --precision bf16", "bf16 is another name of precision, and both are given"),
        ("--fp16 false --trainer.fp16 false", "fp16 is another name of trainer.fp16, and both are given"),
        ("--do_train false", "do_train cannot be false: a run always trains"),
        ("--do_eval no", "do_eval cannot be false: a run needs its evaluations"),
        ("--bf16 maybe", "bf16 must be true or false, not 'maybe'"),
        ("--num_train_epochs three", "epochs must be a whole number, not 'three'"),
        ("--max_eval_samples 20", "max_eval_samples is dev_samples here, which has no effect without train_samples"),
        ("--trust_remote_code", "trust_remote_code is not taken: code from the hub is never run"),
        ("--cache-dir x", "cache_dir is not taken: set the variable HF_HOME"),
        ("--save_steps=500", "save_steps is not taken: a checkpoint is written at every evaluation"),
        ("--lr_scheduler_type cosin", "trainer.lr_scheduler_type is 'cosin'; did you mean 'cosine'?"),
    ],
)
def test_what_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is looked at below)
        parse(["--task", "rte", *words.split()], RunSettings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: 3\nnum_train_epochs: 3\n", "num_train_epochs is another name of epochs"),
        ("optim: sgd\ntrainer: {optim: sgd}\n", "optim is another name of trainer.optim, and both are given"),
        ("optim: sgd\ntrainer.optim: sgd\n", "optim is another name of trainer.optim, and both are given"),
        ("do_eval: false\n", "do_eval cannot be false"),
        ("max_eval_samples: 20\n", "max_eval_samples is dev_samples here"),
        ("cache_dir: x\n", "cache_dir is not taken: set the variable HF_HOME"),
    ],
)
def test_what_is_refused_in_a_file(text: str, sentence: str) -> None:
    Path("mine.yaml").write_text(f"task: rte\n{text}")
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is looked at below)
        parse(["mine.yaml"], RunSettings)
    assert sentence in str(caught.value)


def test_a_number_of_samples_may_come_from_another_place() -> None:
    Path("mine.yaml").write_text("task: rte\ntrain_samples: 40\n")
    assert parse(["mine.yaml", "--max_eval_samples", "20"], RunSettings).dev_samples == 20


def test_the_table_fits_the_settings_and_trainer() -> None:
    own = {item.name for item in fields(RunSettings)}
    known = {item.name for item in fields(TrainingArguments)}
    assert set(SAME) <= own
    assert set(ALIASES.values()) <= own
    assert not {*ALIASES, *TRAINERS, *SWITCHES, *NOT_TAKEN} & own
    assert set(TRAINERS) <= known - OURS.keys() - FIXED.keys()
    lists = (SAME, ALIASES, TRAINERS, SWITCHES, NOT_TAKEN)
    assert sum(map(len, lists)) == len({name for names in lists for name in names}), "each option is in one list"


def test_the_page_lists_and_counts_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", text, re.M))
    assert rows.keys() == {*SAME, *ALIASES, *TRAINERS, *SWITCHES, *NOT_TAKEN}
    for name in SAME:
        assert rows[name] == "the same", name
    for name, setting in ALIASES.items():
        assert rows[name].startswith(f"`{setting}`"), name
    for name in TRAINERS:
        assert rows[name].startswith(f"`trainer.{name}`"), name
    for name, reason in NOT_TAKEN.items():
        assert rows[name] == f"not taken: {reason}", name
    taken = len(rows) - len(NOT_TAKEN)
    assert f"{len(rows)} usual options, of which {taken} are taken" in text
