"""The last choices of a run, by the dev set: the average of its weights, and the subset of its submodules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState

from unipelt.gates.select import select
from unipelt.runs.averages import WeightAverage
from unipelt.runs.job import Training


def finalize(
    trainer: Trainer,
    job: Training,
    state: TrainerState,
    average: WeightAverage | None,
    log: Callable[[str], None],
    test: Callable[[], Mapping[str, Any]],
    tensors: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> dict[str, Any]:
    """Make the last choices of a run, in place, before its test.

    The averaged weights are one more candidate beside the epochs: they replace the weights of the best epoch if their
    dev score is not lower. Then the best subset of the submodules is chosen (`unipelt.select`). The model is tested
    before each choice too, so that the record tells what the choice gained. These tests choose nothing.

    Args:
        trainer: the trainer of the run, which evaluates on the dev set.
        job: the loaded run; its model has the weights of the best epoch.
        state: the state at the end of training.
        average: the average of the weights, or None without one.
        log: function that takes the lines for the reader.
        test: function that returns loss and metrics of the present model on the test set.
        tensors: function from the average to the model's parameters by name.

    Returns:
        Entries of the record: `average` and `selected`; `dev` if another model than that of the best epoch is tested;
        and `tests`, loss and metrics on the test set of the `best_epoch`, and of the `average` if there is one. Empty
        if the settings ask for neither.
    """
    if average is None and not job.settings.select:
        return {}
    found: dict[str, Any] = {}
    tests = {"best_epoch": test()}
    if average is not None:
        found |= _try_average(trainer, job, state, average, tensors(average.mean()), log, tests, test)
    if job.settings.select:
        found |= _select(trainer, job, log)
    return found | {"tests": tests}


def _try_average(
    trainer: Trainer,
    job: Training,
    state: TrainerState,
    average: WeightAverage,
    mean: Mapping[str, Tensor],
    log: Callable[[str], None],
    tests: dict[str, Any],
    test: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    own = dict(job.model.named_parameters())
    best = {name: own[name].detach().clone() for name in mean}
    _copy(mean, job.model)
    dev = _evaluate(trainer, job)
    tests["average"] = test()
    score, best_score = dev["metrics"][job.primary], state.best_metric
    taken = best_score is None or score >= best_score
    if not taken:
        _copy(best, job.model)
    log(
        f"average ({average.kind} {average.value:g})  dev loss {dev['loss']:.4f}  {job.primary} {score:.3f}  "
        f"{'taken' if taken else 'not taken: the best epoch has'} {'' if taken else f'{best_score:.3f}'}".rstrip()
    )
    entry = {average.kind: average.value, "steps": average.steps, "dev": dev, "taken": taken}
    return {"average": entry} | ({"dev": dev} if taken else {})


def _select(trainer: Trainer, job: Training, log: Callable[[str], None]) -> dict[str, Any]:
    devs: list[dict[str, Any]] = []

    def score(model: PreTrainedModel) -> float:
        devs.append(_evaluate(trainer, job))
        return float(devs[-1]["metrics"][job.primary])

    report = select(job.model, score)
    for line in str(report).splitlines():
        log(line)
    subsets = [
        {"submodules": [*subset.submodules], "dev": dev} for subset, dev in zip(report.subsets, devs, strict=True)
    ]
    return {
        "selected": {
            "chosen": [*report.chosen],
            "removed": [*report.removed],
            "subsets": subsets,
            "parameters": asdict(report.before),
        },
        "dev": next(entry["dev"] for entry in subsets if entry["submodules"] == [*report.chosen]),
    }


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _evaluate(trainer: Trainer, job: Training) -> dict[str, Any]:
    """Return loss and metrics of the present model on the dev set. Callbacks are not called: this is no epoch."""
    handler = trainer.callback_handler
    callbacks, handler.callbacks = handler.callbacks, []
    try:
        values = trainer.evaluate()
    finally:
        handler.callbacks = callbacks
    return {"loss": values["eval_loss"], "metrics": {name: values[f"eval_{name}"] for name in job.metrics}}
