"""Loading and checks of everything that training needs, before anything is written: data, tokenizer and model."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from unipelt.files.progress import Progress
from unipelt.glue.corpus import Corpus, Tokens
from unipelt.glue.data import find_folder, fingerprint, load_files, load_task, split_note
from unipelt.glue.labels import describe_cuts, describe_labels
from unipelt.glue.metric import majority_score
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import Task, get_task
from unipelt.records.record import ResultError
from unipelt.runs.batches import text_lengths
from unipelt.runs.cache import SharedCache, files_in, state_of
from unipelt.runs.device import find_device
from unipelt.runs.errors import RunError, memory_named
from unipelt.runs.folder import check_folder
from unipelt.runs.pretrained import load_model, load_tokenizer, weights_sha256
from unipelt.runs.sampling import few_shot_rows, fixed_rows
from unipelt.runs.settings import locate_model


@dataclass
class Job:
    """A loaded and checked run. Nothing is written yet.

    Attributes:
        settings: the settings of the run.
        task: the task.
        model: the model with the method injected.
        tokenizer: the tokenizer of the model.
        splits: the tokenized splits: `train`, `dev`, `test` and the splits to predict, `predict:NAME`.
        order: for each evaluated split, the original index of each row, (rows,). These splits are sorted by length.
        data: the number of rows and the fingerprint of each split.
        majority: the primary metric of the test set's most frequent class as the only answer; None for a regression.
        notes: the notes that a reader of the score must know.
        labels: the lines of the header about the labels and about texts that are cut.
        device: the device, `cpu` or `cuda`.
        model_sha256: the SHA-256 of the file with the base's weights, or None.
        digest: the SHA-256 of everything that determines the outcome, including data and weights.
    """

    settings: RunSettings
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Dataset]
    order: dict[str, np.ndarray]
    data: dict[str, dict[str, Any]]
    majority: float | None
    notes: list[str]
    labels: list[str]
    device: str
    model_sha256: str | None
    digest: str

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.task.primary

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the task."""
        return self.task.metrics


@memory_named("data and model were loaded", "free some, or choose a smaller model", RunError)
def prepare(settings: RunSettings, kept: SharedCache | None = None) -> Job:
    """Load and check everything that a run needs.

    Args:
        settings: the settings of the run.
        kept: the cache of the runs of this process. The result is the same with and without it.

    Raises:
        ValueError, OSError: the run cannot start. One sentence gives the reason.
    """
    kept = SharedCache() if kept is None else kept
    device = find_device(settings.device)
    check_folder(Path(str(settings.output_dir)))
    corpus = _load_data(settings, kept)
    task = corpus.task
    parts, notes = _choose_parts(settings, corpus)
    data = {name: _describe(corpus, part) for name, part in parts.items()}
    train_labels, test_labels = (_labels(corpus, parts[name]) for name in ("train", "test"))
    majority = None if task.is_regression else majority_score(task, test_labels, test_labels)

    place = locate_model(settings.model)
    labels = dict(enumerate(task.label_names)) or {0: "score"}
    config, tokenizer = load_tokenizer(
        settings,
        place,
        kept,
        num_labels=task.num_labels,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )
    sha256, weights = weights_sha256(settings, place, kept)
    splits, order, cuts = {}, {}, {}
    for name, part in parts.items():
        splits[name], rows = _tokens(corpus, part, tokenizer, settings, in_order=name == "train")
        if rows is not None:
            order[name] = rows
        if not (name == "test" and part is parts["dev"]):
            cuts[name] = (
                _count_cut(corpus, part, tokenizer, settings.max_length, splits[name], rows),
                len(splits[name]),
            )
    labels_said = [*describe_labels(task, train_labels), *describe_cuts(cuts, settings.max_length)]
    model = load_model(settings, place, config, AutoModelForSequenceClassification)
    if weights and state_of(path for path, *_ in weights) == weights:
        kept.share_base(model, weights)
    if settings.train_tokens is not None and not (
        "attention_mask" in splits["train"].column_names
        and "attention_mask" in inspect.signature(model.forward).parameters
    ):
        raise RunError(
            f"train_tokens needs a model that can tell padding by an attention_mask, and {type(model).__name__} takes "
            "none; leave it out"
        )
    digest = hashlib.sha256(json.dumps([settings.digest(), data, sha256], sort_keys=True).encode()).hexdigest()
    return Job(
        settings, task, model, tokenizer, splits, order, data, majority, notes, labels_said, device, sha256, digest
    )


@dataclass(frozen=True)
class _Part:
    """Part of a split that a run uses: all rows, or some rows in this order; with labels or without."""

    split: str
    rows: np.ndarray | None = None
    labelled: bool = True


def _load_data(settings: RunSettings, kept: SharedCache) -> Corpus:
    if settings.task is not None:
        task = get_task(settings.task)
        files = [] if settings.glue_dir is None else files_in(find_folder(task, Path(settings.glue_dir)))
        return kept.data(
            (task.name, settings.glue_dir, settings.do_predict),
            files,
            lambda: Corpus(task, load_task(task, settings.glue_dir, with_test=settings.do_predict)),
        )
    named = (str(settings.train_file), settings.dev_file, settings.test_file)
    columns = None if settings.text_columns is None else tuple(settings.text_columns)
    return kept.data(
        (*named, columns, settings.label_column, settings.regression),
        [file for file in named if file is not None],
        lambda: Corpus(
            *load_files(
                *named,
                text_columns=settings.text_columns,
                label_column=settings.label_column,
                regression=settings.regression,
            )
        ),
    )


def _choose_parts(settings: RunSettings, corpus: Corpus) -> tuple[dict[str, _Part], list[str]]:
    """Return the parts of the data that the run uses, and notes on them.

    The parts are `train`; `dev`, which chooses the checkpoint; `test`, for the one test at the end; and `predict:NAME`
    for each split to predict.
    """
    notes: list[str] = []
    whole = corpus.splits
    if settings.task is not None:
        sizes = {split: len(whole[split]) for split in ("train", "dev")}
        notes += [
            f"{split} is {note}" for split, rows in sizes.items() if (note := split_note(corpus.task, split, rows))
        ]
        predicted = [name for name in whole if name.startswith("test")]
    else:
        predicted = [name for name in ("test",) if settings.do_predict and name in whole]
        if settings.do_predict and not predicted:
            raise RunError("do_predict needs a test_file, the rows to predict")
    train, dev, test = _choose_splits(settings, whole, notes)
    rows, count = len(whole[test.split]), settings.test_samples
    if count is not None and test is dev:
        raise RunError(
            "test_samples is given, and the test set is the dev set here, which chooses the checkpoint; leave it out"
        )
    if count is not None and count < rows:
        notes.append(f"tested on {count:,} of {rows:,} rows, the same in every run")
        test = _Part(test.split, fixed_rows(rows, count))
    parts = {"train": train, "dev": dev, "test": test}
    return parts | {f"predict:{name}": _Part(name, labelled=False) for name in predicted}, notes


def _choose_splits(settings: RunSettings, whole: DatasetDict, notes: list[str]) -> tuple[_Part, _Part, _Part]:
    """Return the parts for training, for the choice of the checkpoint, and for the one test at the end."""
    dev = _Part("dev") if "dev" in whole else None
    test = _Part("test") if "test" in whole and "label" in whole["test"].column_names else None
    if settings.train_samples is None:
        assert dev is not None, "settings without train_samples have a dev set"
        if test is None:
            notes.append("dev = test: the checkpoint was chosen on the data that it is tested on")
        return _Part("train"), dev, dev if test is None else test
    if dev is not None and test is not None:
        raise RunError(
            "with train_samples the dev set is cut from the train file, so dev_file and test_file would both be the "
            "test set; leave one out"
        )
    if dev is None and test is None:
        raise RunError("the test_file has no labels, so there is nothing to test on; give a labelled dev_file")
    rows, dev_rows = few_shot_rows(
        len(whole["train"]), settings.train_samples, settings.dev_samples, int(settings.data_seed or 0)
    )
    scored = dev if test is None else test
    assert scored is not None
    return _Part("train", rows), _Part("train", dev_rows), scored


def _describe(corpus: Corpus, part: _Part) -> dict[str, Any]:
    """Return the number of rows and the fingerprint of a part."""
    texts = corpus.texts(part.split, part.labelled)
    if part.rows is None:
        return {"rows": len(texts), "sha256": corpus.fingerprint(part.split, part.labelled)}
    return {"rows": len(part.rows), "sha256": fingerprint(texts.select(part.rows))}


def _labels(corpus: Corpus, part: _Part) -> np.ndarray:
    labels = corpus.splits[part.split].select_columns("label")
    if part.rows is not None:
        return np.asarray(labels.select(part.rows)[:]["label"])
    whole: np.ndarray = corpus.cached(("labels", part.split), lambda: np.asarray(labels[:]["label"]))
    return whole


def _tokens(
    corpus: Corpus, part: _Part, tokenizer: PreTrainedTokenizerBase, settings: RunSettings, in_order: bool
) -> tuple[Dataset, np.ndarray | None]:
    """Return the token ids of a part, and the original index of each row.

    The longest texts come first. With `in_order` the order is kept, and the indices are None.
    """
    whole = settings.pad_to_max_length
    of_this = (part.split, part.labelled, tokenizer, settings.max_length, whole)

    def encode(rows: Dataset) -> Dataset:
        return _encode(rows, corpus.task, tokenizer, settings.max_length, whole)

    def sort() -> tuple[Dataset, np.ndarray]:
        # longest first, so that a lack of memory shows at once
        order = np.argsort([-length for length in text_lengths(tokens.of(part.rows))], kind="stable")
        return tokens.of(order if part.rows is None else part.rows[order]), order

    tokens = corpus.cached(("tokens", *of_this), lambda: Tokens(corpus.texts(part.split, part.labelled), encode))
    if in_order:
        return tokens.of(part.rows), None
    return corpus.cached(("sorted", *of_this), sort) if part.rows is None else sort()


def _count_cut(
    corpus: Corpus,
    part: _Part,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tokens: Dataset,
    order: np.ndarray | None,
) -> int:
    """Return how many rows of a part have more than `max_length` tokens. Only rows that reach it are encoded."""

    def encode(rows: Dataset) -> Dataset:
        return _encode(rows, corpus.task, tokenizer, max_length + 1, False)

    here = np.flatnonzero(np.asarray(text_lengths(tokens)) >= max_length)
    if not len(here):
        return 0
    rows = here if order is None else order[here]
    longer = corpus.cached(
        ("longer", part.split, tokenizer, max_length), lambda: Tokens(corpus.texts(part.split, False), encode)
    )
    lengths = text_lengths(longer.of(rows if part.rows is None else part.rows[rows]))
    return sum(length > max_length for length in lengths)


def _encode(split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, whole: bool) -> Dataset:
    """Return texts as token ids, cut at `max_length`. With `whole` they are also padded to `max_length`."""
    padding = {"padding": "max_length"} if whole else {}

    progress = Progress("tokenizing", len(split), "text")

    def tokenize(rows: Mapping[str, list[str]]) -> Mapping[str, Any]:
        progress.update(len(rows[task.columns[0]]))
        return tokenizer(*[rows[column] for column in task.columns], truncation=True, max_length=max_length, **padding)

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress:
            return split.map(
                tokenize,
                batched=True,
                remove_columns=[name for name in split.column_names if name != "label"],
                keep_in_memory=True,
                load_from_cache_file=False,
                # otherwise `datasets` hashes the tokenizer for an unused cache, which is slower than tokenizing
                new_fingerprint=f"{split._fingerprint}-tokens",
            )
    finally:
        if not bars:
            datasets.enable_progress_bars()


def check_of_glue(record: Mapping[str, Any], path: str | Path) -> None:
    """Raise `ResultError` if a record is not from `unipelt.glue` but from another task."""
    if "floor" in record:
        raise ResultError(
            f"{path} is of a run of {record['task']['name']} and not of run_glue.py, which alone can be done again or "
            "folded from its record; give the script that did it another output_dir"
        )
