"""The record that a run leaves: one `result.json` with everything needed to trust the score."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import unipelt
from unipelt.files.atomic import write_whole
from unipelt.files.strict import PlainError, read_plain, show, show_path

RESULT = "result.json"
FORMAT = 1
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")

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
    "majority": _NUMBER,
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


def check_of_glue(record: Mapping[str, Any], path: str | Path) -> None:
    """Raise `ResultError` if a record is not of `unipelt.glue` but of another task."""
    if "floor" in record:
        raise ResultError(
            f"{path} is of a run of {record['task']['name']} and not of run_glue.py, which alone can be done again or "
            "folded from its record; give the script that did it another output_dir"
        )


def summary(record: Mapping[str, Any], path: str | Path) -> str:
    """One line about a finished run."""
    settings, primary, counts = record["settings"], record["task"]["primary"], record["parameters"]
    sample = "all data" if settings["train_samples"] is None else f"K={settings['train_samples']}"
    seed = f"seed {settings['seed']}"
    if settings["data_seed"] != settings["seed"]:
        seed += f", data seed {settings['data_seed']}"
    floor = f"{record.get('floor', 'majority')} {record['majority']:.3f}"
    return (
        f"{record['task']['name']} · {record['method']['name']} · {sample} · {seed}: "
        f"{primary} {record['test']['metrics'][primary]:.3f} ({floor}) · "
        f"dev {record['dev']['metrics'][primary]:.3f} at epoch {record['best']['epoch']:g} of "
        f"{record['evaluations'][-1]['epoch']:g} · {record['seconds']['total']:.0f} s · "
        f"trained {counts['trained']:,} (deployed {counts['deployed']:,}) + head {counts['head']:,} -> {path}"
    )


def describe_code() -> dict[str, Any]:
    """Commit of the repository that this package is a part of, and whether its files differ from it; else None."""
    home = Path(unipelt.__file__).parent
    # a package that was installed into somebody's repository is no part of it
    if _git(home, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = _git(home, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(home, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def describe_packages() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that the numbers depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "unipelt": unipelt.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def describe_hardware(device: str) -> dict[str, Any]:
    """Processor, cores, threads, memory in bytes; with `device` cuda the GPU."""
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_memory(device: str) -> dict[str, int | None]:
    """Most memory that this process has held so far, in bytes: resident, and on the GPU."""
    try:
        import resource  # not on every system
    except ImportError:
        resident = None
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "rss_bytes": resident,
        "cuda_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, or None."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
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
    for index, evaluation in enumerate([] if problem else record["evaluations"]):
        problem = problem or mismatch(evaluation, _EVALUATION, f"evaluations[{index}]")
    for part in () if problem else ("dev", "test"):
        if record["task"]["primary"] not in record[part]["metrics"]:
            problem = f"{part}.metrics lacks {record['task']['primary']}"
    if problem:
        raise ResultError(f"{path} is not a whole result: {problem}")


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Where a value read from JSON is not as it must be, in words, or None.

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
