"""The record of a run: one `result.json` with the score and all facts that are needed to check the score."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.files.messages import show, show_path
from unipelt.files.strict import PlainError, read_plain

RESULT = "result.json"
FORMAT = 1

# The type of each part of a record; a nested mapping has the types of that part's own parts.
_NUMBER = (int, float)
_OPTIONAL_TEXT = (str, type(None))
_SHAPE: dict[str, Any] = {
    "format": int,
    "status": str,
    "settings": dict,
    "digest": str,
    "method": {"name": str, "config": dict, "learning_rate": _NUMBER},
    "task": {"name": str, "columns": list, "labels": list, "metrics": list, "primary": str, "notes": list},
    "evaluations": list,
    "best": {"epoch": _NUMBER, "step": int},
    "dev": {"loss": _NUMBER, "metrics": dict},
    "test": {"loss": _NUMBER, "metrics": dict},
    "majority": (*_NUMBER, type(None)),
    "seeds": {"run": int, "data": int},
    "data": dict,
    "model": {"name": str, "class": str, "sha256": _OPTIONAL_TEXT, "fingerprint": dict},
    "parameters": {"trained": int, "deployed": int, "head": int, "base": int},
    "gates": (dict, type(None)),
    "seconds": {"train": _NUMBER, "evaluation": _NUMBER, "total": _NUMBER},
    "memory": {"rss_bytes": (int, type(None)), "cuda_bytes": (int, type(None))},
    "hardware": dict,
    "packages": dict,
    "code": {"commit": _OPTIONAL_TEXT, "dirty": (bool, type(None))},
    "attempts": int,
    "files": dict,
}
_EVALUATION: dict[str, Any] = {"epoch": _NUMBER, "step": int, "loss": _NUMBER, "metrics": dict}


class ResultError(ValueError):
    """A record is damaged, incomplete or of another kind. The message names the file and the reason."""


def write_result(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a record to `folder/result.json`, completely or not at all. Return the path of the file.

    Raises:
        ResultError: a part of the record is missing, has a wrong type or is not a finite number. Nothing is written.
        OSError: the file cannot be written.
    """
    path = Path(folder) / RESULT
    _check_record(record, path)
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultError(f"the record for {path} cannot be written as JSON: {error}") from error
    write_whole(path, f"{text}\n".encode())
    return path


def read_result(path: str | Path) -> dict[str, Any]:
    """Read and check a record.

    Args:
        path: path of a `result.json`, or of a run's folder.

    Raises:
        FileNotFoundError: there is no record at the path.
        ResultError: the file is damaged, is not a record, or has an unknown format.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / RESULT
    if not os.path.isfile(path):  # unlike Path.is_file, this returns False for a name that is too long
        raise FileNotFoundError(f"there is no result at {show_path(path)}")
    try:
        record = read_plain(path)
    except PlainError as error:
        raise ResultError(f"{path} is not valid JSON: {error}") from error
    _check_record(record, path)
    return record


def summary(record: Mapping[str, Any], path: str | Path) -> str:
    """Return one line about a finished run: task, method, scores, time and numbers of parameters."""
    settings, primary, counts = record["settings"], record["task"]["primary"], record["parameters"]
    sample = "all data" if settings["train_samples"] is None else f"K={settings['train_samples']}"
    seed = f"seed {settings['seed']}"
    if settings["data_seed"] != settings["seed"]:
        seed += f", data seed {settings['data_seed']}"
    found = floor(record)
    beside = "" if found.score is None else f" ({found.name} {found.score:.3f})"
    return (
        f"{record['task']['name']} · {record['method']['name']} · {sample} · {seed}: "
        f"{primary} {record['test']['metrics'][primary]:.3f}{beside} · "
        f"dev {record['dev']['metrics'][primary]:.3f} {_tested(record)} of "
        f"{record['evaluations'][-1]['epoch']:g} · {record['seconds']['total']:.0f} s · "
        f"trained {counts['trained']:,} (deployed {counts['deployed']:,}) + head {counts['head']:,} -> {path}"
    )


def _tested(record: Mapping[str, Any]) -> str:
    """Return in words which weights and submodules of a run were tested."""
    averaged = (record.get("average") or {}).get("taken")
    moment = "with averaged weights" if averaged else f"at epoch {record['best']['epoch']:g}"
    removed = (record.get("selected") or {}).get("removed")
    return f"{moment}, without {', '.join(removed)}," if removed else moment


@dataclass(frozen=True)
class Floor:
    """The score of a baseline that needs no model.

    Attributes:
        score: The score, as a fraction; None for a regression, which has no classes.
        name: The baseline's name, in a few words.
        of_test: Whether the baseline is the test split's most frequent class. False for the baseline of a task without
            classes. Also False for an older record with only the score of the train split's most frequent class, if
            the score of the test split's class cannot be computed from that score.
    """

    score: float | None
    name: str = "majority"
    of_test: bool = True


def floor(record: Mapping[str, Any]) -> Floor:
    """Return the baseline that a run is compared with.

    For a task with classes, the baseline always answers the most frequent class of the test split. Older records
    without `majority_of` hold the test score of the train split's most frequent class. From this score, the score of
    the test split's most frequent class is computed if possible. This is always possible for the accuracy of two
    classes and for Matthews' correlation.
    """
    score = record["majority"]
    if "floor" in record:  # only a task without classes has this part
        return Floor(score, f"{record['floor']!s:.60}", of_test=False)
    if score is None or not record["task"]["labels"]:
        return Floor(None)
    known = score if record.get("majority_of") == "test" else _from_train(record["task"], score)
    return Floor(score, "train set's majority", of_test=False) if known is None else Floor(known)


def _from_train(task: Mapping[str, Any], score: float) -> float | None:
    """Compute the score of the test split's most frequent class from the score of the train split's.

    Return None if the score cannot be known.
    """
    two, metric = len(task["labels"]) == 2, task["primary"]
    if metric == "matthews_correlation":  # a constant answer scores 0
        return 0.0
    if metric == "accuracy" and (two or score >= 0.5):
        return max(score, 1 - score) if two else score
    if (
        metric == "f1" and 0 < score <= 1
    ):  # the answer is class 1; if p is the fraction of class 1 in the split, F1 is 2p / (1 + p)
        return score if score / (2 - score) > 0.5 else 0.0
    return None


def _check_record(record: Any, path: Path) -> None:
    """Raise `ResultError` unless a value is a complete record of the known format."""
    if not isinstance(record, Mapping) or "format" not in record or "digest" not in record:
        raise ResultError(f"{path} is not the result of a run")
    if record["format"] != FORMAT:
        raise ResultError(
            f"{path} has the format {show(record['format'])}, and this version reads {FORMAT}; a newer one may read it"
        )
    problem = mismatch(record, _SHAPE, "")
    if problem is None and not record["evaluations"]:
        problem = "evaluations is empty"
    if problem is None and record["majority"] is None and (record["task"]["labels"] or "floor" in record):
        problem = "majority is None, which is for tasks without classes"
    for index, evaluation in enumerate([] if problem else record["evaluations"]):
        problem = problem or mismatch(evaluation, _EVALUATION, f"evaluations[{index}]")
    for part in () if problem else ("dev", "test"):
        if record["task"]["primary"] not in record[part]["metrics"]:
            problem = f"{part}.metrics lacks {record['task']['primary']}"
    if problem:
        raise ResultError(f"{path} is not a whole result: {problem}")


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Return the first difference between a value from JSON and the required shape, in words, or None.

    Args:
        value: the value from JSON.
        shape: a type, a tuple of types, or a mapping with the shape of each required key. Further keys are allowed. A
            number must be finite and not too large for a float.
        where: the name of the value.
    """
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{where or 'it'} is not a mapping"
        for key, inner in shape.items():
            name = f"{where}.{key}" if where else key
            if key not in value:
                return f"{name} is missing"
            if problem := mismatch(value[key], inner, name):
                return problem
        return None
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return f"{where} is {show(value):.60}"
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:  # the comparison also refuses NaN
        return f"{where} is {show(value):.60}"
    return None
