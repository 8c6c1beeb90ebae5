"""Everything that training needs, loaded and checked before anything is written: data, tokenizer, model."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import cached_file, logging

import unipelt
from unipelt.glue.batches import text_lengths
from unipelt.glue.data import find_folder, fingerprint, load_files, load_task, split_note
from unipelt.glue.failure import memory_named
from unipelt.glue.keep import Corpus, Kept, State, Tokens, files_in, state_of
from unipelt.glue.metric import majority_score
from unipelt.glue.sampling import few_shot_rows, fixed_rows
from unipelt.glue.settings import RunSettings, TrainingSettings, locate_model
from unipelt.glue.tasks import Task, get_task
from unipelt.manifest import WEIGHTS


class RunError(ValueError):
    """A run that cannot start; the message says why and what to do. Nothing was trained."""


@dataclass
class Job:
    """Everything that training needs, loaded and checked; nothing is written yet.

    Attributes:
        splits: `train`, `dev`, `test` and what is to be predicted, tokenized.
        order: for each evaluated split, the original row of each of its rows, which are sorted by length.
        data: rows and fingerprint of each split.
        notes: what a reader of the score must know.
        digest: SHA-256 of all that determines the outcome, data and weights included.
    """

    settings: RunSettings
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Dataset]
    order: dict[str, np.ndarray]
    data: dict[str, dict[str, Any]]
    majority: float
    notes: list[str]
    device: str
    model_sha256: str | None
    digest: str

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.task.primary


@memory_named("data and model were loaded", "free some, or choose a smaller model", RunError)
def prepare(settings: RunSettings, kept: Kept | None = None) -> Job:
    """Load and check everything.

    Args:
        settings: of the run.
        kept: what runs before it in this process left, and where this one leaves what the next can use. The job is
            the same with and without.

    Raises:
        ValueError, OSError: it cannot start; one sentence says why.
    """
    kept = Kept() if kept is None else kept
    device = find_device(settings)
    corpus = _load_data(settings, kept)
    task = corpus.task
    parts, notes = _choose_parts(settings, corpus)
    data = {name: _describe(corpus, part) for name, part in parts.items()}
    majority = majority_score(task, _labels(corpus, parts["train"]), _labels(corpus, parts["test"]))

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
    splits, order = {}, {}
    for name, part in parts.items():
        splits[name], rows = _tokens(corpus, part, tokenizer, settings.max_length, in_order=name == "train")
        if rows is not None:
            order[name] = rows
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
    return Job(settings, task, model, tokenizer, splits, order, data, majority, notes, device, sha256, digest)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of what a fast tokenizer is made of, truncation and padding apart; None of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = {key: part for key, part in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def precision_of(job: Job) -> contextlib.AbstractContextManager[Any]:
    """What a run computes in: bfloat16 autocast, or nothing in particular."""
    if job.settings.precision == "bf16":
        return torch.autocast(job.device, torch.bfloat16)
    return contextlib.nullcontext()


def find_device(settings: TrainingSettings) -> str:
    """What a run computes on, `cpu` or `cuda`. Raises `RunError` if it cannot start here at all."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a run trains in one process, and WORLD_SIZE is above 1; start it with python, and several runs side by "
            "side with one GPU each (CUDA_VISIBLE_DEVICES)"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RunError("device is cuda, and PyTorch finds no GPU; use --device cpu")
    _check_folder(Path(str(settings.output_dir)))
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"


def _check_folder(folder: Path) -> None:
    """Raise `RunError` if the output folder cannot be one, before time is spent; nothing is made."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise RunError(f"cannot write the results: {place} is not a folder; choose another output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"cannot write the results: {place} is not writable; choose another output_dir")


@dataclass(frozen=True)
class _Part:
    """What a run takes of a split: all rows, or some in this order; the labels too, or not."""

    split: str
    rows: np.ndarray | None = None
    labelled: bool = True


def _load_data(settings: RunSettings, kept: Kept) -> Corpus:
    if settings.task is not None:
        task = get_task(settings.task)
        files = [] if settings.glue_dir is None else files_in(find_folder(task, Path(settings.glue_dir)))
        return kept.corpus(
            (task.name, settings.glue_dir, settings.do_predict),
            files,
            lambda: (task, load_task(task, settings.glue_dir, with_test=settings.do_predict)),
        )
    named = (str(settings.train_file), settings.dev_file, settings.test_file)
    columns = None if settings.text_columns is None else tuple(settings.text_columns)
    return kept.corpus(
        (*named, columns, settings.label_column, settings.regression),
        [file for file in named if file is not None],
        lambda: load_files(
            *named,
            text_columns=settings.text_columns,
            label_column=settings.label_column,
            regression=settings.regression,
        ),
    )


def _choose_parts(settings: RunSettings, corpus: Corpus) -> tuple[dict[str, _Part], list[str]]:
    """What the run takes, and notes on it.

    `train`; what chooses the checkpoint, `dev`; what is tested once at the end, `test`; and all that is to be
    predicted, `predict:NAME`.
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
    """What trains, what chooses the checkpoint, and what is tested once at the end."""
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
    """Rows and fingerprint."""
    texts = corpus.texts(part.split, part.labelled)
    if part.rows is None:
        return {"rows": len(texts), "sha256": corpus.fingerprint(part.split, part.labelled)}
    return {"rows": len(part.rows), "sha256": fingerprint(texts.select(part.rows))}


def _labels(corpus: Corpus, part: _Part) -> np.ndarray:
    labels = corpus.splits[part.split].select_columns("label")
    if part.rows is not None:
        return np.asarray(labels.select(part.rows)[:]["label"])
    whole: np.ndarray = corpus.once(("labels", part.split), lambda: np.asarray(labels[:]["label"]))
    return whole


def _tokens(
    corpus: Corpus, part: _Part, tokenizer: PreTrainedTokenizerBase, max_length: int, in_order: bool
) -> tuple[Dataset, np.ndarray | None]:
    """Token ids of a part; unless they are to stay in order, longest text first, and where each row was."""
    of_this = (part.split, part.labelled, tokenizer, max_length)

    def encode(rows: Dataset) -> Dataset:
        return _encode(rows, corpus.task, tokenizer, max_length)

    def sort() -> tuple[Dataset, np.ndarray]:
        # longest first: least padding, and too little memory shows at once
        order = np.argsort([-length for length in text_lengths(tokens.of(part.rows))], kind="stable")
        return tokens.of(order if part.rows is None else part.rows[order]), order

    tokens = corpus.once(("tokens", *of_this), lambda: Tokens(corpus.texts(part.split, part.labelled), encode))
    if in_order:
        return tokens.of(part.rows), None
    return corpus.once(("sorted", *of_this), sort) if part.rows is None else sort()


def load_tokenizer(
    settings: TrainingSettings, place: str, kept: Kept, **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's configuration, with these options, and its tokenizer. Raises `RunError`."""
    try:
        if PreTrainedConfig.get_config_dict(place)[0].get("auto_map"):
            raise RunError(
                f"the model {settings.model!r} comes with Python code of its own (auto_map in its config.json), which "
                "is never run here; choose another, or take auto_map out of a copy if Transformers' class is meant"
            )
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
        folder = place if os.path.isdir(place) else os.path.dirname(str(cached_file(place, "config.json")))
        tokenizer = kept.tokenizer(
            place, files_in(folder), lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        )
    except RunError:
        raise
    except (OSError, ValueError) as error:
        kind = "" if os.path.isdir(place) else ", which is no folder here"
        raise RunError(f"cannot load the model {settings.model!r}{kind}: {_first_line(error)}") from error
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit)
    if settings.max_length > limit:
        raise RunError(f"max_length is {settings.max_length}, and {settings.model} takes {limit} tokens; lower it")
    _agree_on_padding(config, tokenizer, settings.model)
    return config, tokenizer


def _agree_on_padding(config: Any, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Let the tokenizer pad with what the configuration calls padding, or the other way about if that is no token.

    A decoder's head looks for the last token of a text by that id, and some models count positions by it. GPT-2 and
    others were pretrained without one; padding is masked, so any will do. Raises `RunError`.
    """
    named = config.pad_token_id
    if named is not None and 0 <= named < len(tokenizer):
        if named != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
        return
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RunError(f"the tokenizer of {model} has neither a padding token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id


def weights_sha256(settings: TrainingSettings, place: str, kept: Kept) -> tuple[str | None, State]:
    """SHA-256 of the model's `model.safetensors`, checked against the settings, and the state of that file.

    None and an empty state if it has no such file. Raises `RunError`.
    """
    try:
        path = cached_file(place, WEIGHTS)
    except (OSError, ValueError):
        path = None
    if path is None:
        if settings.model_sha256 is not None:
            raise RunError(f"model_sha256 is given, and {settings.model} has no {WEIGHTS} to check it against")
        return None, ()
    state = state_of([path])
    sha256 = kept.sha256(path)
    if settings.model_sha256 not in (None, sha256):
        raise RunError(
            f"{path} is not the file that model_sha256 names: its SHA-256 is {sha256}, not {settings.model_sha256}; "
            "get the right model, or correct model_sha256 if you trust this one"
        )
    return sha256, state


def load_model(settings: TrainingSettings, place: str, config: Any, kind: Any) -> PreTrainedModel:
    """The pretrained model as one of a kind (an `AutoModelFor...`), with the method injected. Raises `RunError`."""
    set_seed(settings.seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report that the head starts at random, which is the point
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            place, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"cannot load the model {settings.model!r}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return unipelt.inject(model, settings.config)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _encode(split: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Texts as token ids, cut at `max_length`; padding is left to the batch."""

    def tokenize(rows: Mapping[str, list[str]]) -> Mapping[str, Any]:
        return tokenizer(*[rows[column] for column in task.columns], truncation=True, max_length=max_length)

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return split.map(
            tokenize,
            batched=True,
            remove_columns=[name for name in split.column_names if name != "label"],
            keep_in_memory=True,
            load_from_cache_file=False,
            # otherwise the tokenizer is pickled and hashed, which takes longer than its work; nothing is cached here
            new_fingerprint=f"{split._fingerprint}-tokens",
        )
    finally:
        if not bars:
            datasets.enable_progress_bars()
