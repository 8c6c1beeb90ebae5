"""The record that a run leaves: one `result.json` with everything needed to trust the score."""

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

# What each part of a record must be; a nested mapping lists the parts of that part.
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
    """A file that is not a record, or not a whole one; the message says where and why."""


def write_result(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a record as `folder/result.json`, whole or not at all.

    Raises:
        ResultError: the record lacks a part or holds something that is not a finite number; nothing is written.
        OSError: the folder cannot be written.
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
        path: a `result.json`, or the folder of a run.

    Raises:
        FileNotFoundError: there is none.
        ResultError: the file is damaged, of another kind, or of a format that is not known.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / RESULT
    if not os.path.isfile(path):  # which, unlike that of a Path, takes a name too long for one that is not there
        raise FileNotFoundError(f"there is no result at {show_path(path)}")
    try:
        record = read_plain(path)
    except PlainError as error:
        raise ResultError(f"{path} is not valid JSON: {error}") from error
    _check_record(record, path)
    return record


def summary(record: Mapping[str, Any], path: str | Path) -> str:
    """One line about a finished run."""
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
        f"dev {record['dev']['metrics'][primary]:.3f} at epoch {record['best']['epoch']:g} of "
        f"{record['evaluations'][-1]['epoch']:g} · {record['seconds']['total']:.0f} s · "
        f"trained {counts['trained']:,} (deployed {counts['deployed']:,}) + head {counts['head']:,} -> {path}"
    )


@dataclass(frozen=True)
class Floor:
    """The score of an answer that needs no model.

    Attributes:
        score: A fraction; None for a regression, which has no classes.
        name: What answers, in a few words.
        of_test: Whether it is the score of the test set's most frequent class. False where an older record holds only
            the score of the train set's most frequent class, and the other cannot be computed from it.
    """

    score: float | None
    name: str = "majority"
    of_test: bool = True


def floor(record: Mapping[str, Any]) -> Floor:
    """The score that a run is compared with: for classes, that of always answering the test set's most frequent one.

    Records from before `majority_of` hold the test score of the train set's most frequent class. From it the test
    set's own is computed where that is possible: always for the accuracy of two classes and for Matthews' correlation.
    """
    score = record["majority"]
    if "floor" in record:  # a task without classes
        return Floor(score, f"{record['floor']!s:.60}", of_test=False)
    if score is None or not record["task"]["labels"]:
        return Floor(None)
    known = score if record.get("majority_of") == "test" else _from_train(record["task"], score)
    return Floor(score, "train set's majority", of_test=False) if known is None else Floor(known)


def _from_train(task: Mapping[str, Any], score: float) -> float | None:
    """The score of the test set's most frequent class from that of the train set's; None where it cannot be known."""
    two, metric = len(task["labels"]) == 2, task["primary"]
    if metric == "matthews_correlation":  # of a constant answer it is 0
        return 0.0
    if metric == "accuracy" and (two or score >= 0.5):
        return max(score, 1 - score) if two else score
    if (
        metric == "f1" and 0 < score <= 1
    ):  # the answer is class 1, and with a share p of it among the rows F1 is 2p / (1 + p)
        return score if score / (2 - score) > 0.5 else 0.0
    return None


def _check_record(record: Any, path: Path) -> None:
    """Raise `ResultError` unless this is a whole record of the known format."""
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
    """The first place where a value read from JSON has not the shape it must have, in words, or None.

    Args:
        value: what was read.
        shape: a type, a tuple of types, or by key the shape of what a mapping holds; other keys are let pass. A
            number must be finite, and not too large for a float.
        where: what the value is called.
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
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:  # NaN is not, either
        return f"{where} is {show(value):.60}"
    return None
