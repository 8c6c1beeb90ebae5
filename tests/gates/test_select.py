"""The best subset of submodules: each pass is of the smaller model itself, and what is not chosen leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, bits, logits, read, shake, small, tiny_batch, tiny_bert, trained, what_is_there
from tiny import tiny_batch as batch_of
from tiny import tiny_model

import unipelt
from unipelt.gates.select import ScoredSubset, SelectReport, best_subset
from unipelt.injection.state import injection_of
from unipelt.submodules.room import own_parts

ALL = ("adapter", "prefix", "lora")


def names(model: Any) -> tuple[str, ...]:
    """The submodules that are in the model's rooms."""
    kinds = {own.part.kind for own in own_parts(model)} - {"gate"}
    return tuple(name for name in (*ALL, "prompt", "ia3", "parallel", "houlsby") if name in kinds)


def by_table(scores: dict[tuple[str, ...], float], seen: list[tuple[str, ...]]) -> Callable[[Any], float]:
    """A score by a table; other subsets have 0."""

    def evaluate(model: Any) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(names(model))
        return scores.get(seen[-1], 0.0)

    return evaluate


def without(family: str, chosen: Sequence[str], full: Any, config: unipelt.UniPELTConfig) -> Any:
    """The smaller method in the same base, with the values of the full model."""
    gone = {name: None for name in names(full) if name not in chosen}
    model = unipelt.inject(tiny_model(family), config.updated(gone))
    model.load_state_dict({k: v for k, v in full.state_dict().items() if "unipelt" not in k}, strict=False)
    values = {(own.path, own.part.name): own.tensor for own in own_parts(full)}
    for own in own_parts(model):
        own.tensor.copy_(values[own.path, own.part.name])
    return model


@pytest.mark.parametrize(
    ("family", "chosen", "changes"),
    [
        ("bert", ("adapter", "lora"), {}),
        ("bert", ("prefix",), {"gate": {"shared": True}}),
        ("bert", ("lora",), {"gate": {"pooling": "static", "dropout": 0.3}, "lora": {"start": "pissa"}}),
        ("bart", ("prefix", "lora"), {"gate": {"network": "mlp", "hidden": 3}}),
        ("mpnet", ("adapter",), {}),
        ("mpnet", ("prefix", "lora"), {}),
        ("gpt2", ALL, {}),
    ],
    ids=str,
)
def test_the_chosen_is_left_and_travels(
    family: str, chosen: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    base, batch, config = tiny_model(family), batch_of(family), small("unipelt-apl", **changes)
    former = bits(base)
    model = unipelt.inject(base, config)
    shake(model)
    want = without(family, chosen, model, config)
    seen: list[tuple[str, ...]] = []
    report = unipelt.select(model, by_table({chosen: 0.9, ("adapter", "prefix"): 0.8}, seen))
    assert len(seen) == 7
    assert seen[0] == ALL
    assert set(seen) == {subset.submodules for subset in report.subsets}
    assert report.chosen == chosen
    assert report.removed == tuple(name for name in ALL if name not in chosen)
    assert report.score == 0.9
    assert names(model) == chosen
    assert report.after == unipelt.parameter_counts(model) == unipelt.parameter_counts(want)
    assert (report.before.deployed > report.after.deployed) == (chosen != ALL)
    assert torch.equal(logits(model, batch), logits(want, batch))
    assert f"{', '.join(chosen)}" in str(report)

    model.save_pretrained(tmp_path)
    manifest = read(tmp_path)["unipelt"]
    assert [name for name in ALL if manifest[name] is not None] == [*chosen]
    back = unipelt.load(tiny_model(family), tmp_path)
    assert torch.equal(logits(back, batch), logits(model, batch))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in want.named_parameters() if p.requires_grad
    }
    unipelt.remove(model)
    for name, value in bits(model).items():
        assert torch.equal(value, former[name]), name


def test_a_score_is_that_of_the_smaller_model_on_data() -> None:
    model = trained()
    alone = trained()
    unipelt.select(alone, by_table({("prefix", "lora"): 1.0}, []))
    report = unipelt.select(model, lambda now: now(**tiny_batch()).logits.sum().item())
    scores = {subset.submodules: subset.score for subset in report.subsets}
    assert scores["prefix", "lora"] == logits(alone).sum().item()
    assert len(set(scores.values())) == 7
    assert report.score == max(scores.values())


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({}, ("adapter",)),
        ({("prefix", "lora"): 0.5, ALL: 0.5}, ("prefix", "lora")),
        ({("prefix",): 0.5, ("lora",): 0.5}, ("prefix",)),
        ({ALL: 0.5, ("lora",): 0.4}, ALL),
    ],
)
def test_of_equal_scores_fewer_submodules_win(scores: dict[tuple[str, ...], float], chosen: tuple[str, ...]) -> None:
    assert best_subset(ALL, lambda subset: scores.get(subset, 0.0)) == chosen


def test_of_four_submodules_one_leaves_at_a_time() -> None:
    four = (*ALL, "ia3")
    seen: list[tuple[str, ...]] = []
    scores = {four: 0.5, ("adapter", "prefix", "ia3"): 0.6, ("prefix", "ia3"): 0.6, ("lora",): 0.9, ("ia3",): 0.59}
    report = unipelt.select(trained(ia3={}), by_table(scores, seen))
    assert report.chosen == ("prefix", "ia3"), "LoRA alone is never tried"
    assert len(seen) == 1 + 4 + 3 + 2
    seen.clear()
    assert unipelt.select(trained(ia3={}), by_table({four: 0.5}, seen)).chosen == four
    assert len(seen) == 5


def test_one_submodule_is_always_left() -> None:
    asked: list[tuple[str, ...]] = []
    four = (*ALL, "ia3")

    def score(subset: tuple[str, ...]) -> float:
        asked.append(subset)
        return 0.0

    assert best_subset(four, score) == ("adapter",)
    assert {len(subset) for subset in asked} == {4, 3, 2, 1}
    assert asked[0] == four


def test_the_report_is_a_table() -> None:
    counts = unipelt.parameter_counts(trained())
    subsets = (ScoredSubset(("adapter", "lora"), 0.5), ScoredSubset(("adapter",), 2 / 3), ScoredSubset(("lora",), -1.0))
    report = SelectReport(
        subsets, ("adapter",), ("lora",), replace(counts, deployed=5000), replace(counts, deployed=700)
    )
    assert str(report).splitlines() == [
        "adapter, lora  0.5000",
        "adapter        0.6667  chosen",
        "lora           -1.0000",
        "3 passes; removed lora; beside the base 5,000 parameters before (deployed), 700 after",
    ]
    assert "; removed nothing; " in str(replace(report, chosen=("adapter", "lora"), removed=()))


def test_of_a_prompt_and_further_submodules() -> None:
    model = trained("lora", prompt={"length": 3}, gate={"dropout": 0.5})
    want = unipelt.inject(tiny_bert(), {"preset": "prompt", "prompt": {"length": 3}})
    seen: list[tuple[str, ...]] = []
    assert unipelt.select(model, by_table({("prompt",): 1.0}, seen)).chosen == ("prompt",)
    assert len(seen) == 3
    assert names(model) == names(want) == ("prompt",)
    assert injection_of(model).config.gate.dropout == 0.0


@pytest.mark.parametrize("score", [float("nan"), "0.5", True, None])
def test_a_score_that_is_no_number_leaves_the_model_as_it_was(score: Any) -> None:
    model = trained().train()
    before, want = what_is_there(model), logits(model)
    calls = iter([0.9, 0.1, score])

    def evaluate(now: Any) -> float:
        assert not any(module.training for module in now.modules())
        found: float = next(calls)
        return found

    with pytest.raises(unipelt.SelectError, match="evaluate must return a finite number, not"):
        unipelt.select(model, evaluate)
    assert all(module.training for module in model.modules())
    assert_same(what_is_there(model), before)
    assert torch.equal(logits(model), want)

    def fail(now: Any) -> float:
        raise KeyError

    with pytest.raises(KeyError):
        unipelt.select(model, fail)
    assert torch.equal(logits(model), want)


def test_of_a_base_in_half_precision(tmp_path: Path) -> None:
    """Its head trains in float32, behind a hook."""
    base: Any = tiny_bert()
    model = unipelt.inject(base.to(torch.bfloat16), small())
    shake(model)
    full = copy.deepcopy(model)
    unipelt.select(model, by_table({ALL: 1.0}, []))
    assert torch.equal(logits(model), logits(full))
    unipelt.save(model, tmp_path)
    other: Any = tiny_bert()
    assert torch.equal(logits(unipelt.load(other.to(torch.bfloat16), tmp_path)), logits(full))


def test_draws_no_number_and_keeps_what_the_caller_froze() -> None:
    model = trained()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    model.classifier.bias.requires_grad_(False)
    state = torch.get_rng_state()
    unipelt.select(model, by_table({}, []))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bert.embeddings.word_embeddings.weight.requires_grad
    assert not model.classifier.bias.requires_grad


def test_what_has_nothing_to_choose_is_refused() -> None:
    def never(model: Any) -> float:
        raise AssertionError

    cases: list[tuple[Any, str]] = [
        (trained("lora"), "this method has lora"),
        (unipelt.inject(tiny_bert(), "bitfit"), "this method has none"),
        (trained(gate={"shared": True, "activation": "softmax"}), "take sigmoid or tanh"),
    ]
    folded = trained()
    unipelt.fold(folded, [tiny_batch()], tolerance=1.0)
    cases.append((folded, "this model is folded"))
    tasks = unipelt.Tasks(tiny_bert())
    cases.append((tasks.add("one", small(), num_labels=2), "shares its base with other tasks"))
    cases.append((trained().to("meta"), r"some parameters are not in memory \(offloaded\)"))
    for model, reason in cases:
        with pytest.raises(unipelt.SelectError, match=reason):
            unipelt.select(model, never)
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.select(tiny_bert(), never)
