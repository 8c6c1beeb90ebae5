"""Folding of a finished run's model, with a comparison of scores, logits and time before and after."""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from unipelt.checkpoint.load import load
from unipelt.checkpoint.save import save
from unipelt.files.atomic import write_whole
from unipelt.files.messages import say
from unipelt.files.progress import track
from unipelt.gates.fold import FoldReport, fold
from unipelt.glue.job import Job, check_of_glue, prepare
from unipelt.glue.metric import compute_metrics_for
from unipelt.glue.run import evaluated
from unipelt.glue.settings import RunSettings
from unipelt.injection.inject import remove
from unipelt.records.record import read_result
from unipelt.runs.batches import Batch, materialize
from unipelt.runs.device import precision_of
from unipelt.runs.errors import RunError
from unipelt.runs.folder import FOLDED, MODEL
from unipelt.runs.machine import describe_code, describe_hardware, describe_packages
from unipelt.runs.processes import need_one_process

RECORD = "fold.json"
FORMAT = 1
FORMS = ("trained", "deployed", "folded", "base")
"""The model as trained; without the prefix's network; with folded gates; and the base alone, the fastest form."""
TIMED_BATCHES = 4
"""The largest number of test batches to time. They are evenly spaced, so they hold short and long texts."""

Batches = Sequence[Batch]


def fold_run(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    tolerance: float | None = None,
    closed: float | None = None,
    rounds: int = 7,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Fold the model of a finished run on its dev set, and compare the forms of the model on its test set.

    The folded model (for `unipelt.from_pretrained`) and `fold.json` (all figures) are written into one folder, whole or
    not at all.

    Args:
        folder: the folder of the run.
        out: the new folder; by default `folded` in the folder of the run.
        tolerance: as in `unipelt.fold`, with the same default.
        closed: as in `unipelt.fold`, with the same default.
        rounds: the number of times that each form is timed on each timed batch. The forms take turns.
        log: function that takes the lines for the reader.

    Returns:
        The contents of `fold.json`: `gates` (each with its statistics and outcome), `outcomes`, `merged` (low-rank
        terms), `parameters` (before and after), `test` (metrics by form), `changed` (by form, against the trained
        form: the `largest` change of a logit, and the number of `predictions` that differ, None for a regression),
        `seconds` (by form, the seconds of a batch, `rounds` times for each timed batch), `ratios` (by form, the median
        ratio of its time to the trained form's time for the same batch in the same round), the run, machine and
        versions.

    Raises:
        FileNotFoundError: there is no finished run.
        RunError: this process is one of several, `out` exists already, or the data are not the data of the run.
        ValueError, OSError: an argument is invalid, or the model cannot be folded. Nothing was written.
    """
    folder = Path(folder)
    out = folder / FOLDED if out is None else Path(out)
    need_one_process("folding a run")
    if rounds < 1:
        raise RunError(f"rounds must be 1 or more, not {rounds}")
    if out.exists():
        raise RunError(f"{out} is there already; remove it, or choose another --out")
    record = read_result(folder)
    check_of_glue(record, folder)
    try:
        settings = replace(RunSettings(**record["settings"]), output_dir=str(folder))
    except TypeError as error:
        raise RunError(f"the run in {folder} is of another version of unipelt: {error}") from error
    threads = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        job = prepare(settings)
        for split in ("dev", "test"):
            if job.data[split] != record["data"][split]:
                raise RunError(f"the {split} set is not the one of the run in {folder}: its rows differ")
        options = {name: value for name, value in (("tolerance", tolerance), ("closed", closed)) if value is not None}
        models, report = _forms(job, folder / MODEL, options)
        for line in str(report).splitlines():
            log(line)
        figures = _compare(job, models, rounds)
    finally:
        torch.set_num_threads(threads)
    result = {
        "format": FORMAT,
        "run": {"digest": record["digest"], "test": record["test"]},
        "tolerance": report.tolerance,
        "closed": report.closed,
        "examples": report.examples,
        "gates": [asdict(gate) for gate in report.gates],
        "outcomes": report.outcomes,
        "merged": report.merged,
        "parameters": {"before": asdict(report.before), "after": asdict(report.after)},
        **figures,
        "hardware": describe_hardware(job.device),
        "packages": describe_packages(),
        "code": describe_code(),
    }
    for line in _table(result, job.task.primary):
        log(line)
    _write(models["folded"], result, out)
    log(f"-> {out}")
    return result


def _forms(job: Job, checkpoint: Path, options: Mapping[str, float]) -> tuple[dict[str, PreTrainedModel], FoldReport]:
    """Return the model of the run in every form, on the device, in evaluation mode; and the report of folding."""
    trained: Any = load(remove(job.model), checkpoint)
    trained.to(job.device).eval()
    base = remove(copy.deepcopy(trained))
    with tempfile.TemporaryDirectory() as draft:
        save(trained, draft, deploy=True)
        deployed = load(copy.deepcopy(base), draft).eval()
    folded = copy.deepcopy(trained)
    with precision_of(job.device, job.settings.precision):
        report = fold(folded, _batches(job, "dev"), **options)
    return dict(zip(FORMS, (trained, deployed, folded, base), strict=True)), report


def _batches(job: Job, split: str) -> Batches:
    """Return a split in the batches of its evaluation, on the device, without labels."""
    return [
        {name: tensor.to(job.device) for name, tensor in batch.items() if name != "labels"}
        for batch in materialize(evaluated(job, split), job.device)
    ]


def _compare(job: Job, models: Mapping[str, PreTrainedModel], rounds: int) -> dict[str, Any]:
    """Compute the scores, changes and times of the forms on the test set."""
    batches = _batches(job, "test")
    labels = job.splits["test"].with_format("numpy")["label"][:]
    metrics, measure = {}, compute_metrics_for(job.task)
    logits = {
        name: _logits(job, model, track(batches, f"evaluation of the {name} form", "batch"))
        for name, model in models.items()
        if name != "base"
    }
    for name, values in logits.items():
        metrics[name] = measure(EvalPrediction(values.numpy(), labels))
    changed = {
        name: {
            "largest": float((values - logits["trained"]).abs().max()),
            "predictions": None
            if job.task.is_regression
            else int((values.argmax(-1) != logits["trained"].argmax(-1)).sum()),
        }
        for name, values in logits.items()
        if name != "trained"
    }
    seconds = _times(job, models, batches[:: -(-len(batches) // TIMED_BATCHES)], rounds)
    ratios = {
        name: statistics.median(own / first for own, first in zip(values, seconds["trained"], strict=True))
        for name, values in seconds.items()
    }
    return {"test": metrics, "changed": changed, "seconds": seconds, "ratios": ratios}


def _times(job: Job, models: Mapping[str, PreTrainedModel], batches: Batches, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each form for each batch of each round. The first form changes each time."""
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # the first pass of a model is slower
        _logits(job, models[name], batches[:1])
    for turn in track(range(rounds * len(batches)), "timing", "round"):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            begun = time.perf_counter()
            _logits(job, models[name], [batches[turn // rounds]])  # the logits come to the CPU, so a GPU has finished
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _logits(job: Job, model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    with torch.no_grad(), precision_of(job.device, job.settings.precision):
        found = [model(**batch).logits for batch in batches]
    return torch.cat(found).float().cpu()


def _table(result: Mapping[str, Any], primary: str) -> list[str]:
    """Return the lines of a table of the forms."""
    lines = [
        f"{'form':<9} {primary:>10} {'seconds':>9} {'ratio':>7} {'largest change of a logit':>26} {'predictions':>12}"
    ]
    for name in FORMS:
        score = f"{result['test'][name][primary]:.3f}" if name in result["test"] else ""
        change = result["changed"].get(name)
        told = (
            f"{change['largest']:>26.2e} {'' if change['predictions'] is None else change['predictions']:>12}"
            if change
            else ""
        )
        seconds = statistics.median(result["seconds"][name])
        lines.append(f"{name:<9} {score:>10} {seconds:>9.3f} {result['ratios'][name]:>7.3f} {told}".rstrip())
    return lines


def _write(model: PreTrainedModel, result: Mapping[str, Any], out: Path) -> None:
    """Write model and figures into one folder, whole or not at all."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save(model, draft)
        write_whole(draft / RECORD, f"{json.dumps(result, indent=2, allow_nan=False)}\n".encode())
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
