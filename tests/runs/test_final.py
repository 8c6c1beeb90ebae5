"""The last choices of a run, with scores that are made up: the average of its weights, and its submodules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import bits, trained

import unipelt
from unipelt.runs.averages import WeightAverage
from unipelt.runs.final import finalize


class Scored:
    """A trainer whose evaluations give these scores, one after the other."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.callback_handler = SimpleNamespace(callbacks=["of the run"])

    def evaluate(self) -> dict[str, float]:
        assert self.callback_handler.callbacks == [], "an evaluation that is of no epoch"
        score = self.scores.pop(0)
        if score < 0:
            raise RuntimeError("no room")
        return {"eval_loss": 1 - score, "eval_f1": score, "eval_accuracy": score / 2, "eval_runtime": 1.0}


def job_of(model: Any, *, select: bool = False) -> Any:
    settings = SimpleNamespace(select=select)
    return SimpleNamespace(model=model, settings=settings, primary="f1", metrics=("f1", "accuracy"))


def average_above(model: Any) -> WeightAverage:
    """An average of two evaluations, whose weights are 1 above the model's."""
    average = WeightAverage({"last": 2})
    for step in (10, 20):
        held = {name: each + 1 for name, each in model.named_parameters() if each.requires_grad}
        average.after_evaluation(step, held)
    return average


@pytest.mark.parametrize(
    ("score", "best", "taken", "said"),
    [
        (0.5, 0.5, True, "taken"),
        (0.75, 0.5, True, "taken"),
        (0.25, None, True, "taken"),
        (0.25, 0.5, False, "not taken: the best epoch has 0.500"),
    ],
)
def test_an_average_is_taken_if_its_score_is_not_lower(
    score: float, best: float | None, taken: bool, said: str
) -> None:
    model, lines = trained(), list[str]()
    before, trainer = bits(model), Scored(score)
    state: Any = SimpleNamespace(best_metric=best)
    mean = average_above(model).mean()
    seen: list[bool] = []  # whether the model that was tested had the averaged weights

    def test() -> dict[str, int]:
        seen.append(all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in mean.items()))
        return {"loss": len(seen)}

    found = finalize(trainer, job_of(model), state, average_above(model), lines.append, test)  # type: ignore[arg-type]
    dev = {"loss": 1 - score, "metrics": {"f1": score, "accuracy": score / 2}}
    entry = {"average": {"last": 2, "steps": [10, 20], "dev": dev, "taken": taken}}
    tests = {"tests": {"best_epoch": {"loss": 1}, "average": {"loss": 2}}}
    assert found == entry | ({"dev": dev} if taken else {}) | tests
    assert seen == [False, True]
    assert lines == [f"average (last 2)  dev loss {1 - score:.4f}  f1 {score:.3f}  {said}"]
    assert trainer.callback_handler.callbacks == ["of the run"]
    for name, parameter in model.named_parameters():
        moved = taken and parameter.requires_grad
        torch.testing.assert_close(parameter, before[name] + 1 if moved else before[name], rtol=0, atol=0)


def test_the_best_submodules_stay_and_are_named() -> None:
    model, lines = trained(), list[str]()
    counts = unipelt.parameter_counts(model)
    scores = [0.5, 0.4, 0.3, 0.9, 0.2, 0.1, 0.6]
    trainer: Any = Scored(*scores)
    state: Any = SimpleNamespace(best_metric=0.5)
    whole = [name for name, _ in model.named_parameters()]
    tested: list[bool] = []

    def test() -> dict[str, str]:
        tested.append([name for name, _ in model.named_parameters()] == whole)
        return {"of": "the whole model"}

    found = finalize(trainer, job_of(model, select=True), state, None, lines.append, test)
    assert set(found) == {"selected", "dev", "tests"}
    assert found["tests"] == {"best_epoch": {"of": "the whole model"}}
    assert tested == [True], "before a submodule leaves"
    subsets = found["selected"]["subsets"]
    assert [entry["dev"]["metrics"]["f1"] for entry in subsets] == scores
    assert found["dev"] == subsets[3]["dev"]
    chosen = found["selected"]["chosen"]
    assert chosen == subsets[3]["submodules"]
    assert sorted([*chosen, *found["selected"]["removed"]]) == ["adapter", "lora", "prefix"]
    assert found["selected"]["parameters"]["trained"] == counts.trained > unipelt.parameter_counts(model).trained
    names = " ".join(name for name, _ in model.named_parameters())
    assert [part for part in ("adapter", "prefix", "lora") if part in names] == chosen
    assert lines
    assert any("0.9" in line for line in lines)


def test_nothing_is_asked_for() -> None:
    model: Any = trained()
    trainer: Any = Scored()
    state: Any = SimpleNamespace(best_metric=0.5)
    assert finalize(trainer, job_of(model), state, None, print, pytest.fail) == {}


def test_callbacks_come_back_after_an_error() -> None:
    model: Any = trained()
    trainer: Any = Scored(-1.0)
    state: Any = SimpleNamespace(best_metric=0.5)
    with pytest.raises(RuntimeError, match="no room"):
        finalize(trainer, job_of(model), state, average_above(model), print, dict)
    assert trainer.callback_handler.callbacks == ["of the run"]
