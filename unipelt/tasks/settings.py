"""Settings of runs on questions and on translation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from unipelt.config.presets import resolve
from unipelt.files.messages import show
from unipelt.runs.settings import FILES, SettingsError, TrainingSettings, expand_method, option

TASKS_DIR = "UNIPELT_TASKS_DIR"
"""Environment variable: the default of `tasks_dir`."""


@dataclass(frozen=True)
class TaskSettings(TrainingSettings):
    """Settings that both tasks share; each field's meaning is in its `help`.

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ()

    tasks_dir: str | None = option(
        None, f"folder with a folder of each known task's data; by default that of the variable {TASKS_DIR}"
    )
    eval_batch_size: int = option(32, "examples a batch of evaluation")

    def _check_data(self) -> None:
        if self.task is None:
            if self.train_file is None:
                raise SettingsError(
                    f"there is nothing to train on: name a task (--task {self.known[0]}) or a train_file"
                )
            if self.tasks_dir is not None:
                raise SettingsError("tasks_dir goes with a task, not with a train_file; leave it out")
            return
        if self.task not in self.known:
            raise SettingsError(f"there is no task {show(self.task)}; known are {', '.join(self.known)}")
        for name in FILES:
            if getattr(self, name) is not None:
                raise SettingsError(f"task and {name} exclude each other; set one of them to null")
        if self.tasks_dir is None and os.environ.get(TASKS_DIR):
            object.__setattr__(self, "tasks_dir", os.environ[TASKS_DIR])

    def file_of(self, name: str) -> Path:
        """A file of the known task's data. Raises `SettingsError` if nobody said where they are."""
        if self.tasks_dir is None:
            raise SettingsError(
                f"the data of {self.task} are not a part of this project: name the folder that holds {name} by "
                f"--tasks_dir or the variable {TASKS_DIR}"
            )
        return Path(self.tasks_dir) / name


@dataclass(frozen=True)
class QASettings(TaskSettings):
    """Everything that a run on questions about texts needs to know.

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ("xquad",)

    task: str | None = option(None, "xquad (the English part of XQuAD, xquad_en/xquad.en.json)")
    train_file: str | None = option(None, "instead of a task: your own training data, JSON in SQuAD's format")
    dev_file: str | None = option(None, "your own dev data; by default a tenth of the train file's articles")
    test_file: str | None = option(
        None, "your own test data; by default the dev_file, or without one a fifth of the train file's articles"
    )
    split_seed: int = option(0, "seed of that cut by article; not seed, so that all runs are tested on the same")
    train_samples: int | None = option(
        None, "K: train on the first K questions of the shuffled train data; by default on all of them"
    )
    dev_samples: int = option(1000, "at most that many questions of the dev data, the same ones in every run")
    max_length: int = option(384, "tokens of a window: question, a piece of the text and special ones")
    stride: int = option(128, "tokens that a window shares with the one before")
    n_best: int = option(20, "starts and ends considered in a window, and answers kept of a question")
    max_answer_length: int = option(30, "tokens of the longest answer")
    null_threshold: float = option(
        0.0, "where the train data have questions without an answer: how much better than the best answer none must be"
    )

    def _check_data(self) -> None:
        super()._check_data()
        if (self.trainer or {}).get("label_smoothing_factor"):
            raise SettingsError("trainer.label_smoothing_factor has no effect on questions; leave it out")
        if self.stride >= self.max_length:
            raise SettingsError(f"stride is {self.stride}, and must be below max_length, {self.max_length}")


@dataclass(frozen=True)
class TranslationSettings(TaskSettings):
    """Everything that a run on pairs of a text and its translation (or summary) needs to know.

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ("multi30k",)
    arguments: ClassVar[str] = "Seq2SeqTrainingArguments"

    model: str = option(
        "google-t5/t5-small",
        "the pretrained model: a name on the hub, a folder (that an earlier run with --random left, say), or "
        "package:NAME/FOLDER for a folder inside an installed Python package",
    )
    random: Literal["no", "bart", "t5"] = option(
        "no", "instead of model: a small BART or T5 that starts at random, with a tokenizer made of the train data"
    )
    random_width: int = option(256, "with random: width of a state, in units")
    random_layers: int = option(3, "with random: layers of the encoder, and of the decoder")
    vocabulary: int = option(4000, "with random: pieces of the tokenizer")
    task: str | None = option(None, "multi30k (multi30k/train.en and so on: train, val, test_2016_flickr)")
    source: str = option("en", "ending of the files with the texts")
    target: str = option("de", "ending of the files with their translations")
    source_prefix: str | None = option(
        None, 'put before every text, as T5 wants it: "translate English to German: "; by default nothing'
    )
    train_file: str | None = option(
        None, "instead of a task: your own training data, one text a line: data/train for data/train.en and .de"
    )
    dev_file: str | None = option(
        None, "your own dev data, likewise; not with train_samples, where dev is cut from the train file"
    )
    test_file: str | None = option(None, "your own test data, likewise; by default the dev data")
    skip_samples: int = option(
        0, "leave out the first that many pairs of the shuffled train data, which an earlier run trained on, say"
    )
    train_samples: int | None = option(
        None, "K: train on the next K pairs of the shuffled train data; by default on all of them"
    )
    dev_samples: int = option(
        1000,
        "with train_samples: the next that many pairs are the dev set, as in GLUE; else at most that many of the dev "
        "data",
    )
    max_target_length: int = option(128, "tokens of a translation; longer ones are cut, and none longer is made")
    beams: int = option(1, "beams of the search for a translation; 1: greedy")

    def _check_data(self) -> None:
        super()._check_data()
        if self.source == self.target:
            raise SettingsError(f"source and target are both {show(self.source)}")
        if self.task is None and self.dev_file is None and (self.train_samples is None or self.test_file is None):
            wanted = "test_file" if self.train_samples else "dev_file"
            raise SettingsError(f"there is nothing to test on: give a {wanted} beside the train_file")
        if self.random != "no" and self.model != type(self).model:
            raise SettingsError("model and random exclude each other; leave one of them out")
        if self.random != "no" and self.model_sha256 is not None:
            raise SettingsError("model_sha256 and random exclude each other; leave one of them out")
        if self.random != "no" and not resolve(expand_method(self.method)).train_base:
            raise SettingsError(
                "a base that starts at random must train as a whole: add --method fine-tuning, and give the folder "
                "that it leaves as --model to a run with another method"
            )
        if self.random != "no" and self.random_width % 32:
            raise SettingsError(f"random_width is {self.random_width}, and must be a multiple of 32, a head's width")
        if self.max_target_length < 3:
            raise SettingsError(f"max_target_length must be 3 or more tokens, not {self.max_target_length}")
