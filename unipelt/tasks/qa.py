"""A run on questions about texts: `examples/run_qa.py`.

Shapes: W windows, T tokens of the longest window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unipelt.runs.cache import SharedCache
from unipelt.runs.device import find_device
from unipelt.runs.errors import RunError
from unipelt.runs.folder import check_folder
from unipelt.runs.joint_trainer import JointTrainer
from unipelt.runs.pretrained import load_model, load_tokenizer, weights_sha256
from unipelt.runs.run import Outcome, TaskJob, scored_by
from unipelt.runs.sampling import fixed_rows
from unipelt.runs.settings import locate_model
from unipelt.runs.tables import DataError
from unipelt.runs.trainer_arguments import training_arguments
from unipelt.tasks.settings import QASettings
from unipelt.tasks.squad import (
    Answer,
    Question,
    Window,
    best_answers,
    describe_questions,
    make_windows,
    read_squad,
    split_articles,
    squad_score,
)

_XQUAD = "xquad_en/xquad.en.json"
_DEV, _TEST = 0.1, 0.2
"""Fractions of a file's articles for the dev set and the test set, if the file is cut."""


@dataclass
class QAJob(TaskJob):
    """A loaded run on questions.

    Attributes:
        questions: the questions of each split, `train`, `dev` and `test`.
        windows: the windows of these questions, by split.
    """

    settings: QASettings
    questions: dict[str, list[Question]]
    windows: dict[str, list[Window]]

    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")

    def arguments(self, folder: Path) -> TrainingArguments:
        """Return Trainer's arguments for a run in that folder."""
        batch = self.settings.eval_batch_size
        return training_arguments(self, folder, TrainingArguments, per_device_eval_batch_size=batch)

    def make_trainer(self, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
        """Return the trainer, which evaluates on the dev set."""
        return JointTrainer(
            model=self.model,
            args=self.arguments(folder),
            # a bound method, because Trainer saves the tokenizer of a collator with every checkpoint
            data_collator=DataCollatorWithPadding(self.tokenizer).__call__,
            train_dataset=_rows(self.windows["train"]),
            eval_dataset=_rows(self.windows["dev"]),
            compute_metrics=self._scorer("dev"),
            # BART's and T5's outputs hold more than the two kinds of logits
            preprocess_logits_for_metrics=_starts_and_ends,
            callbacks=callbacks,
        )

    def test(self, trainer: Trainer) -> Outcome:
        """Test the model with its present weights.

        One file holds the answers in SQuAD's official format, the other the best answers with their probabilities.
        """
        with scored_by(trainer, self._scorer("test")):
            output = trainer.predict(_rows(self.windows["test"]))
        answers, metrics = self.answers("test", output.predictions), output.metrics or {}
        best = {name: ranked[0].text for name, ranked in answers.items()}
        all_of_them = {name: [asdict(answer) for answer in ranked] for name, ranked in answers.items()}
        files = {"test.json": _json(best), "test-nbest.json": _json(all_of_them)}
        scores = {name: metrics[f"test_{name}"] for name in self.metrics}
        return Outcome(metrics["test_loss"], scores, files, {})

    def answers(self, split: str, logits: Any) -> dict[str, list[Answer]]:
        """Return the best answers to a split's questions, from the start logits and the end logits, each (W, T)."""
        settings = self.settings
        may_be_none = any(not question.answers for question in self.questions["train"])
        return best_answers(
            self.questions[split],
            self.windows[split],
            *logits,
            n_best=settings.n_best,
            max_answer_length=settings.max_answer_length,
            null_threshold=settings.null_threshold if may_be_none else None,
        )

    def _scorer(self, split: str) -> Callable[[EvalPrediction], dict[str, float]]:
        def score(output: EvalPrediction) -> dict[str, float]:
            answers = self.answers(split, output.predictions)
            return squad_score(self.questions[split], {name: ranked[0].text for name, ranked in answers.items()})

        return score


def prepare(settings: QASettings) -> QAJob:
    """Load and check everything that a run needs.

    Raises:
        ValueError, OSError: the run cannot start. One sentence gives the reason.
    """
    device = find_device(settings.device)
    check_folder(Path(str(settings.output_dir)))
    questions, notes = load_questions(settings)
    kept, place = SharedCache(), locate_model(settings.model)
    config, tokenizer = load_tokenizer(settings, place, kept)
    if not tokenizer.is_fast:
        raise RunError(f"the tokenizer of {settings.model} does not say where its tokens are in the text")
    windows = {
        name: make_windows(part, tokenizer, settings.max_length, settings.stride) for name, part in questions.items()
    }
    # a window without the answer teaches "no answer", which is wrong if every question has an answer
    if all(question.answers for question in questions["train"]):
        windows["train"] = [window for window in windows["train"] if window.start != window.null]
        if not windows["train"]:
            raise DataError("no window of the train data holds an answer whole; raise max_length or stride")
    sha256, _ = weights_sha256(settings, place, kept)
    model = load_model(settings, place, config, AutoModelForQuestionAnswering)
    data = {name: describe_questions(part) | {"windows": len(windows[name])} for name, part in questions.items()}
    unanswerable = float(np.mean([not question.answers for question in questions["test"]]))
    floor = (unanswerable, 'always "no answer"')
    return QAJob(settings, model, tokenizer, data, notes, floor, device, sha256, questions, windows)


def load_questions(settings: QASettings) -> tuple[dict[str, list[Question]], list[str]]:
    """Read the questions of `train`, `dev` and `test`. Return them with notes for a reader of the score.

    Raises:
        DataError: the files cannot be read, or have too few articles or questions.
        RunError: `test_samples` is given, and the test set is the dev set.
    """
    notes = []
    if settings.task is not None:
        train, dev, test = read_squad(settings.file_of(_XQUAD)), None, None
    else:
        train = read_squad(str(settings.train_file))
        dev, test = (None if file is None else read_squad(file) for file in (settings.dev_file, settings.test_file))
    if dev is None:
        fractions = (_DEV,) if test is not None else (_DEV, _TEST)
        train, dev, *rest = split_articles(train, settings.split_seed, *fractions)
        notes.append(f"one file cut by article with seed {settings.split_seed}; no paragraph is in two parts")
        test = rest[0] if rest else test
    if test is None:
        test = dev
        notes.append("dev = test: the checkpoint was chosen on the data that it is tested on")
    else:
        dev = _some(dev, settings.dev_samples)
    if settings.test_samples is not None and test is dev:
        raise RunError("test_samples is given, and the test set is the dev set here; leave it out")
    if settings.test_samples is not None and settings.test_samples < len(test):
        notes.append(f"tested on {settings.test_samples:,} of {len(test):,} questions, the same in every run")
        test = _some(test, settings.test_samples)
    if settings.train_samples is not None:
        if settings.train_samples > len(train):
            raise DataError(
                f"train_samples is {settings.train_samples:,}, and the train data have {len(train):,} questions; lower "
                "it"
            )
        order = np.random.default_rng(settings.data_seed).permutation(len(train))
        train = [train[row] for row in order[: settings.train_samples]]
    return {"train": train, "dev": dev, "test": test}, notes


def _starts_and_ends(outputs: Any, labels: Any) -> Any:
    return tuple(outputs[:2])


def _some(questions: list[Question], count: int) -> list[Question]:
    return [questions[row] for row in fixed_rows(len(questions), count)]


def _rows(windows: Sequence[Window]) -> Dataset:
    columns: dict[str, list[Any]] = {
        "input_ids": [window.ids for window in windows],
        "attention_mask": [window.mask for window in windows],
        "start_positions": [window.start for window in windows],
        "end_positions": [window.end for window in windows],
    }
    if windows[0].kinds is not None:
        columns["token_type_ids"] = [window.kinds for window in windows]
    return Dataset.from_dict(columns)


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
