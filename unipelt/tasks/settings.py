"""Settings of runs on questions and on translation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from unipelt.config.presets import resolve
from unipelt.files.messages import show, suggest
from unipelt.runs.settings import FILES, SettingsError, TrainingSettings, expand_method, option

TASKS_DIR = "UNIPELT_TASKS_DIR"
"""Environment variable with the default of `tasks_dir`."""


@dataclass(frozen=True)
class TaskSettings(TrainingSettings):
    """Settings that both tasks share. The `help` of each field says its meaning.

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ()

    tasks_dir: str | None = option(
        None,
        f"Folder that holds a folder with the data of each known task. Default: the folder in the variable {TASKS_DIR}",
    )
    eval_batch_size: int = option(32, "Number of examples in a batch of evaluation")

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
            meant = suggest(self.task, self.known, f"known are {', '.join(self.known)}")
            raise SettingsError(f"there is no task {show(self.task)}; {meant}")
        for name in FILES:
            if getattr(self, name) is not None:
                raise SettingsError(f"task and {name} exclude each other; set one of them to null")
        if self.tasks_dir is None and os.environ.get(TASKS_DIR):
            object.__setattr__(self, "tasks_dir", os.environ[TASKS_DIR])

    def file_of(self, name: str) -> Path:
        """Return the path of a file of the known task's data. Raise `SettingsError` if `tasks_dir` is not set."""
        if self.tasks_dir is None:
            raise SettingsError(
                f"the data of {self.task} are not a part of this project: name the folder that holds {name} by "
                f"--tasks_dir or the variable {TASKS_DIR}"
            )
        return Path(self.tasks_dir) / name


@dataclass(frozen=True)
class QASettings(TaskSettings):
    """Settings of a run on questions about texts.

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ("xquad",)

    task: str | None = option(None, "Task: xquad, the English part of XQuAD (xquad_en/xquad.en.json)")
    train_file: str | None = option(None, "Your own training data, in place of a task: JSON in the format of SQuAD")
    dev_file: str | None = option(None, "Your own dev data. Default: a tenth of the articles of the train file")
    test_file: str | None = option(
        None, "Your own test data. Default: the dev_file, or without one a fifth of the articles of the train file"
    )
    split_seed: int = option(
        0, "Seed of the cut by articles. It is apart from seed, so that all runs are tested on the same questions"
    )
    train_samples: int | None = option(
        None, "K, the number of training questions: the first K of the shuffled train data. Default: all"
    )
    dev_samples: int = option(1000, "Largest number of dev questions. They are the same questions in every run")
    max_length: int = option(384, "Number of tokens in a window: the question, a piece of the text and special tokens")
    stride: int = option(128, "Number of tokens that a window shares with the window before")
    n_best: int = option(20, "Number of starts and ends considered in a window, and of answers kept for a question")
    max_answer_length: int = option(30, "Largest number of tokens in an answer")
    null_threshold: float = option(
        0.0,
        "Margin by which the score of no answer must be above that of the best answer. It is used where the train data "
        "have questions without an answer",
    )

    def _check_data(self) -> None:
        super()._check_data()
        if (self.trainer or {}).get("label_smoothing_factor"):
            raise SettingsError("trainer.label_smoothing_factor has no effect on questions; leave it out")
        if self.stride >= self.max_length:
            raise SettingsError(f"stride is {self.stride}, and must be below max_length, {self.max_length}")


@dataclass(frozen=True)
class TranslationSettings(TaskSettings):
    """Settings of a run on pairs of a text and its translation (or summary).

    Raises:
        As `TrainingSettings`.
    """

    known: ClassVar[tuple[str, ...]] = ("multi30k",)
    arguments: ClassVar[str] = "Seq2SeqTrainingArguments"

    model: str = option(
        "google-t5/t5-small",
        "Pretrained model: a name on the hub, a folder (such as the one of an earlier run with --random), or "
        "package:NAME/FOLDER for a folder in an installed Python package",
    )
    random: Literal["no", "bart", "t5"] = option(
        "no", "Small BART or T5 that starts at random, in place of a model. Its tokenizer is made of the train data"
    )
    random_width: int = option(256, "Width of a state, in units. This needs random")
    random_layers: int = option(3, "Number of layers of the encoder, and of the decoder. This needs random")
    vocabulary: int = option(4000, "Number of pieces of the tokenizer. This needs random")
    task: str | None = option(None, "Task: multi30k (multi30k/train.en and so on: train, val, test_2016_flickr)")
    source: str = option("en", "Ending of the files with the texts")
    target: str = option("de", "Ending of the files with their translations")
    source_prefix: str | None = option(
        None, 'Text put before every text. T5 wants "translate English to German: ". Default: nothing'
    )
    train_file: str | None = option(
        None,
        "Your own training data, in place of a task, one text on a line. data/train means "
        "data/train.en and data/train.de",
    )
    dev_file: str | None = option(
        None,
        "Your own dev data, named alike. With train_samples the dev set is cut from the train file, so leave this out",
    )
    test_file: str | None = option(None, "Your own test data, named alike. Default: the dev data")
    skip_samples: int = option(
        0,
        "Number of pairs that are left out at the start of the shuffled train data. An earlier run may have trained on "
        "them",
    )
    train_samples: int | None = option(
        None, "K, the number of training pairs: the next K of the shuffled train data. Default: all"
    )
    dev_samples: int = option(
        1000,
        "Number of pairs in the dev set. With train_samples they are taken behind the first K, else from the dev data",
    )
    max_target_length: int = option(
        128, "Largest number of tokens in a translation. Longer ones are cut, and none longer is written"
    )
    beams: int = option(1, "Number of beams in the search for a translation. 1 is a greedy search")

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
