"""Repetition of a finished run from its record, and comparison of the two outcomes.

Settings, data and model are compared with the record before training starts. A difference makes another run, so it is
an error. Then the run is done in a new folder, and every number of the outcome is compared. The differences between the
surroundings of the two runs (hardware, packages, code) are listed, because they are the likely reasons for different
numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from unipelt.checkpoint.base_model import describe_base
from unipelt.checkpoint.manifest import SAMPLE, WEIGHTS
from unipelt.config.methods import UniPELTConfig
from unipelt.config.presets import resolve
from unipelt.config.schema import ConfigError, flatten
from unipelt.files.atomic import write_whole
from unipelt.files.messages import say
from unipelt.glue.job import Job, check_of_glue
from unipelt.glue.run import run
from unipelt.glue.settings import CARRIED, MOVED, RunSettings
from unipelt.records.record import RESULT, read_result
from unipelt.runs.compare import compare, format_report, model_pairs, sha256_of, surroundings
from unipelt.runs.errors import RunError
from unipelt.runs.folder import MODEL
from unipelt.runs.pretrained import tokenizer_sha256
from unipelt.runs.processes import need_one_process
from unipelt.runs.settings import FILES, clean_name
from unipelt.runs.trainer_options import PUBLISHING
from unipelt.version import __version__

RECORD = "rerun.json"
FORMAT = 1


def rerun(
    path: str | Path,
    out: str | Path | None = None,
    *,
    tolerance: float = 0.0,
    changes: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Do the run of a record again in a new folder, and compare the two.

    A rerun that was killed continues if the function is called again with the same arguments. The folder of the record
    is only read.

    Args:
        path: the path of a `result.json`, or the folder of a run.
        out: the new folder; by default `runs/`, the name of the old folder, and `-rerun`.
        tolerance: the largest absolute difference of a number (loss, metric, mean of a gate) that counts as equal.
            Steps and counts must always be the same.
        changes: new values for fields of `MOVED` and `CARRIED`.
        log: function that takes the lines for the reader.

    Returns:
        The contents of `rerun.json` in the new folder: `equal`; the number of compared `numbers`, and their `largest`
        absolute difference; `differences` beyond the tolerance (`what`, `then`, `now`, `by`); `weights`, whether the
        weight files of the two models are the same, or None if one is absent; `surroundings` that differ (`what`,
        `then`, `now`); `notes`; and `of`, which identifies the record.

    Raises:
        FileNotFoundError: the record does not exist.
        RunError: the run cannot be repeated here, or would be another run, and nothing was trained; or the run failed.
            The message gives the reason.
        ValueError, OSError: as `unipelt.glue.run.run`.
    """
    need_one_process("a rerun")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise RunError(f"tolerance must be a number, 0 or above, not {tolerance}")
    path = Path(path)
    path = path / RESULT if path.is_dir() else path
    record = read_result(path)
    check_of_glue(record, path)
    settings, notes = settings_of(record, changes)
    out = Path("runs") / clean_name(f"{_name(path)}-rerun") if out is None else Path(out)
    settings = replace(settings, output_dir=str(out))
    of = {"path": os.path.abspath(path), "digest": record["digest"], "sha256": sha256_of(path)}
    _check_places(settings)
    _check_out(out, path, of["sha256"])

    def begin(job: Job) -> None:
        for note in check_same(job, record):
            notes.append(note)
            log(f"        {note}")
        out.mkdir(parents=True, exist_ok=True)
        _write(out, {"status": "running", "of": of})  # identifies the folder if the rerun is killed

    log(f"rerun of {path}")
    for note in notes:
        log(f"        {note}")
    try:
        again = run(settings, log, begin)
    except RuntimeError as error:
        raise RunError(str(error)) from error
    result = {
        "status": "finished",
        "of": of,
        "digest": again["digest"],
        **compare(record, again, tolerance, weights=(path.parent / MODEL / WEIGHTS, out / MODEL / WEIGHTS)),
        "surroundings": surroundings(record, again),
        "notes": notes,
    }
    _write(out, result)
    for line in format_report(result):
        log(line)
    log(f"-> {out / RECORD}")
    return result


def settings_of(record: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> tuple[RunSettings, list[str]]:
    """Return the settings that repeat the run of a record.

    If the settings leave the threads or the device open, the record's hardware sets them.

    Args:
        record: the record that `read_result` returns.
        changes: new values of fields, as in `rerun`.

    Returns:
        The settings, and notes on the differences from the run of the record.

    Raises:
        RunError: the record is of a newer version, or its settings are not the settings of the run.
        SettingsError, ConfigError: a value is invalid.
    """
    changes = dict(changes or {})
    if strange := [name for name in changes if name not in (*MOVED, *CARRIED)]:
        raise RunError(f"a rerun cannot have another {strange[0]}; it may have another {', '.join((*MOVED, *CARRIED))}")
    given, known = dict(record["settings"]), [item.name for item in fields(RunSettings)]
    theirs = f"unipelt {record['packages'].get('unipelt')}"
    if unknown := [name for name in given if name not in known]:
        raise RunError(
            f"the record's settings hold {', '.join(map(repr, unknown))}, which unipelt {__version__} does not "
            f"know: it is of a newer version ({theirs}); rerun it with that"
        )
    notes: list[str] = []
    config = _config_of(record, theirs, notes)
    if absent := [name for name in known if name not in given]:
        defaults = ", ".join(f"{item.name} {item.default!r}" for item in fields(RunSettings) if item.name in absent)
        notes.append(f"the record lacks settings that were added since, which take their defaults: {defaults}")
    try:
        meant: Any = resolve(given.get("method", {}))
    except (ConfigError, OSError):
        meant = None
    if meant != config:
        given["method"] = config.to_dict()  # a preset may have changed since the run
    _check_digest(record, RunSettings(**given), absent, notes)
    given |= {"overwrite": False, "output_dir": None} | _hardware_of(record, given, changes, notes) | changes
    options = given.get("trainer") or {}
    if sent := [name for name in options if name in PUBLISHING]:
        given["trainer"] = {name: value for name, value in options.items() if name not in sent}
        notes.append(f"a rerun reports and uploads nothing: trainer.{', trainer.'.join(sent)} left out")
    if record.get("world_size", 1) != 1:
        notes.append(
            f"it was trained in {record['world_size']!r:.60} processes and is done in one now: without dropout the "
            "numbers agree to rounding, with dropout in distribution only"
        )
    if record.get("packed") is not None:
        notes.append(
            f"it was one of a pack ({record['packed']!r:.60}) and is done by itself now: without dropout the numbers "
            "agree to rounding, with dropout in distribution only"
        )
    return RunSettings(**given), notes


def check_same(job: Job, record: Mapping[str, Any]) -> list[str]:
    """Check that a job has the data and the model of a record.

    Returns:
        Notes on the differences of the model's configuration and tokenizer. Another version of a library may write the
        same configuration or tokenizer in another way.

    Raises:
        RunError: the data, the model's class or the weights differ.
    """
    for name in dict.fromkeys((*record["data"], *job.data)):
        then, now = record["data"].get(name), job.data.get(name)
        if then != now:
            raise RunError(
                f"the {name.removeprefix('predict:')} data are not those of the record ({then} then, {now} now); give "
                "those of the run (--glue_dir, --train_file, --dev_file, --test_file)"
            )
    then, remedy = record["model"], "give the model of the run (--model)"
    if then["class"] != type(job.model).__name__:
        raise RunError(f"the model was a {then['class']}, and this is a {type(job.model).__name__}; {remedy}")
    if then["sha256"] != job.model_sha256:
        raise RunError(
            f"the model is not that of the record: the SHA-256 of its {WEIGHTS} was {then['sha256']}, and is "
            f"{job.model_sha256}; {remedy}"
        )
    covers = then["fingerprint"].get("covers", SAMPLE)
    base = describe_base(job.model, dict(job.model.named_parameters()), covers=covers)
    if then["fingerprint"] != base["fingerprint"]:
        raise RunError(
            f"the model's weights are not those of the record: their fingerprint was {then['fingerprint']}, and is "
            f"{base['fingerprint']}; {remedy}"
        )
    now = {"config": base["config"], "tokenizer": tokenizer_sha256(job.tokenizer)}
    return [f"{what} was {one!r:.70}, and is {other!r:.70}" for what, one, other in model_pairs(then, now)]


def _name(path: Path) -> str:
    """Return the name of a record's run."""
    return path.absolute().parent.name if path.name == RESULT else path.stem


def _config_of(record: Mapping[str, Any], theirs: str, notes: list[str]) -> UniPELTConfig:
    """Return the method of the run. Add a note on fields that the record lacks."""
    try:
        config = UniPELTConfig.from_dict(record["method"]["config"])
    except ConfigError as error:
        raise RunError(
            f"method.config of the record: {error}; if it is of a newer version ({theirs}), rerun it with that"
        ) from error
    now = flatten(config.to_dict())
    if absent := [f"{name} {now[name]!r}" for name in now if name not in flatten(record["method"]["config"])]:
        notes.append(f"the record's method lacks what was added since, which takes its default: {', '.join(absent)}")
    return config


def _check_digest(record: Mapping[str, Any], settings: RunSettings, absent: list[str], notes: list[str]) -> None:
    """Raise `RunError` if the record's settings do not have the record's digest."""
    identity = {name: value for name, value in settings.identity().items() if name not in absent}
    paths = {name: record["settings"].get(name) for name in (*FILES, "glue_dir") if name in identity}
    # the recorded paths, since an environment variable may have set a path
    identity |= {name: None if value is None else os.path.abspath(value) for name, value in paths.items()}
    identity["method"] = record["method"]["config"]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if digest == record["digest"]:
        return
    relative = any(value is not None and not os.path.isabs(value) for value in paths.values())
    out = str(record["settings"].get("output_dir"))
    if relative or os.path.basename(out) == out:
        notes.append(
            "the digest of the settings cannot be checked: it is of whole paths, and the record's are relative, or "
            "cut, as in records that were collected"
        )
        return
    raise RunError(
        f"the settings of the record are not those that were run: their SHA-256 is {digest}, and its digest says "
        f"{record['digest']}; get the record as the run left it"
    )


def _hardware_of(
    record: Mapping[str, Any], given: Mapping[str, Any], changes: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Return the threads and the device of the record, as far as the settings leave them open."""
    hardware, found = record["hardware"], {}
    threads, device = hardware.get("threads"), hardware.get("device")
    if given.get("threads") is None and "threads" not in changes and type(threads) is int and threads > 0:
        found["threads"] = threads
        notes.append(f"threads {threads}, as PyTorch chose then; sums are split by thread")
    if given.get("device", "auto") == "auto" and "device" not in changes and device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            found["device"] = device
        else:
            notes.append(f"it ran on a GPU ({hardware.get('gpu')!r:.60}), and there is none here")
    return found


def _check_places(settings: RunSettings) -> None:
    """Raise `RunError` if a path in the settings does not exist. A model may be a name on the hub."""
    for name in MOVED:
        value = getattr(settings, name)
        if value is not None and (name != "model" or os.path.isabs(value)) and not os.path.exists(value):
            raise RunError(f"{name} is {value}, and nothing is there; if it has moved, say where to with --{name}")


def _check_out(out: Path, path: Path, sha256: str) -> None:
    """Raise `RunError` unless the folder is new, or holds this rerun, unfinished."""
    if out.is_dir() and out.resolve() == path.resolve().parent:
        raise RunError(f"{out} is the folder of the record itself; choose another --out")
    if out.exists() and not out.is_dir():  # such as a record, which is not the rerun's
        raise RunError(f"{out} is not a folder; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        there = json.loads((out / RECORD).read_text(encoding="utf-8"))
        unfinished = there["status"] == "running" and there["of"]["sha256"] == sha256
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        unfinished = False
    if not unfinished:
        raise RunError(f"{out} is there already; remove it, or choose another --out")


def _write(out: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **content}, indent=2, allow_nan=False)
    write_whole(out / RECORD, f"{text}\n".encode())
