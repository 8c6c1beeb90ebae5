"""Tasks that are combined without training: the merges of task vectors, and the set that comes out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import bits, logits, shake, tiny_batch, tiny_bert
from inside import parts
from torch import Tensor

import unipelt
from unipelt import Tasks, combine_tasks
from unipelt.injection.state import injection_of
from unipelt.multitask.task_vectors import vector_merge

TRIO = ("one", "two", "sum")
LORA: dict[str, Any] = {"preset": "lora", "lora": {"rank": 3, "places": ["query", "value", "down"]}}


def two_tasks(config: Any, model: Any = None, **labels: int) -> Tasks:
    tasks = Tasks(tiny_bert() if model is None else model)
    for seed, name in enumerate(("one", "two")):
        shake(tasks.add(name, config, num_labels=labels.get(name)), seed=seed)
    return tasks


def updates(model: Any, scale: float) -> dict[str, Tensor]:
    """The update of every low-rank term."""
    found = parts(model, "lora")
    return {name: scale * found[f"{name[:-1]}B"] @ found[name] for name in found if name.endswith(".A")}


def test_the_merges_written_out() -> None:
    one, two = torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([-1.0, -2.0, 0.25, 4.0])
    generator = torch.Generator().manual_seed(0)

    def merged(method: str, weights: Any = None, density: float = 1.0, sign: str = "total") -> list[float]:
        return vector_merge(method, 2, weights, density, sign)([one, two], generator).tolist()

    assert merged("task_arithmetic") == [1.0, -1.5, 0.375, 2.0]
    assert merged("task_arithmetic", [1.0, -1.0]) == [4.0, 1.0, 0.25, -4.0]
    assert merged("ties") == [3.0, -1.5, 0.375, 4.0], "where signs disagree the larger wins; a zero has no vote"
    assert merged("ties", density=0.5) == [3.0, -1.5, 0.0, 4.0], "each vector keeps its two largest"
    assert merged("ties", [2.0, 1.0]) == [6.0, -2.0, 0.625, 4.0]
    assert merged("ties", sign="frequency")[0] == 3.0
    three = [torch.tensor([5.0]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    assert vector_merge("ties", 3, None, 1.0, "total")(three, generator).item() == 5.0
    assert vector_merge("ties", 3, None, 1.0, "frequency")(three, generator).item() == -1.5
    assert merged("dare") == merged("task_arithmetic")


def test_dare_drops_by_its_seed_and_keeps_the_mean() -> None:
    vector = torch.ones(20_000)
    merge = vector_merge("dare", 1, [1.0], 0.25, "total")
    first, again, other = (merge([vector], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.tolist()) == {0.0, 4.0}
    assert first.mean() == pytest.approx(1.0, abs=0.05)
    kept = vector_merge("dare", 1, [1.0], 0.5, "total")([vector[:12]], torch.Generator().manual_seed(0)).nonzero()
    assert kept.flatten().tolist() == [2, 6, 7, 9, 10, 11], "a seed drops the same numbers in every version"


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_the_merges_are_those_of_peft(method: str, sign: str) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils", reason="PEFT is not installed")
    vectors = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [0.5, 1.5, -0.25]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a density of 1
        if method == "ties":
            want = theirs.ties(vectors, torch.tensor(weights), 0.4, sign)
        else:
            want = theirs.task_arithmetic(vectors, torch.tensor(weights))
    density, sign = (0.4, sign) if method == "ties" else (1.0, "total")
    got = vector_merge(method, 3, weights, density, sign)(vectors, torch.Generator())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_sum_of_low_rank_updates_is_exact_in_twice_the_rank(family: str) -> None:
    tasks = two_tasks(LORA, tiny.tiny_model(family))
    config = unipelt.resolve(LORA).updated({"lora": {"rank": 6}})
    combine_tasks(tasks, "sum", ["one", "two"], weights=[0.75, -0.5], rank=6)
    assert injection_of(tasks["sum"]).config == config
    assert config.lora is not None
    one, two = (updates(tasks[name], 16 / 3) for name in ("one", "two"))
    for name, got in updates(tasks["sum"], config.lora.scale).items():
        torch.testing.assert_close(got, 0.75 * one[name] - 0.5 * two[name], atol=1e-5, rtol=1e-5)


def test_the_rank_of_the_sources_keeps_the_largest_part() -> None:
    tasks = two_tasks(LORA)
    combine_tasks(tasks, "both", ["one", "two"], "ties", density=0.3)
    one, two = (updates(tasks[name], 16 / 3) for name in ("one", "two"))
    merge = vector_merge("ties", 2, None, 0.3, "total")
    for name, got in updates(tasks["both"], 16 / 3).items():
        whole = merge([one[name], two[name]], torch.Generator())
        best = torch.linalg.svdvals(whole)[3:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.norm(whole - got), best, atol=1e-4, rtol=1e-4)


def test_a_task_by_itself_comes_out_the_same() -> None:
    tasks = two_tasks({"preset": "unipelt-apl", "lora": {"rank": 3}, "ia3": {}})
    combine_tasks(tasks, "same", ["one"], weights=[1.0])
    torch.testing.assert_close(logits(tasks["same"]), logits(tasks["one"]), atol=1e-5, rtol=1e-5)
    assert (logits(tasks["one"]) - logits(tasks["two"])).abs().max() > 1e-2


def test_the_update_of_pissa_is_that_since_its_start() -> None:
    tasks = two_tasks({"preset": "lora", "lora": {"rank": 2, "start": "pissa"}})
    combine_tasks(tasks, "same", ["one"], weights=[1.0], rank=4)
    lora = injection_of(tasks["same"]).config.lora
    assert lora is not None
    assert lora.start == "zero"
    torch.testing.assert_close(logits(tasks["same"]), logits(tasks["one"]), atol=1e-5, rtol=1e-5)


def test_adapters_are_merged_from_their_common_start() -> None:
    tasks = Tasks(tiny_bert())
    for seed, name in enumerate(("start", "one", "two")):
        torch.manual_seed(7)
        added = tasks.add(name, {"preset": "unipelt-ap", "prefix": {"length": 3, "hidden": 8}})
        if name != "start":
            shake(added, seed=seed)
    combine_tasks(tasks, "sum", ["one", "two"], weights=[0.5, 0.25], start="start")
    start, one, two, got = (parts(tasks[name]) for name in ("start", *TRIO))
    for name, tensor in got.items():
        if ".gate." in name:
            want = (2 * one[name] + two[name]) / 3
        else:
            want = start[name] + 0.5 * (one[name] - start[name]) + 0.25 * (two[name] - start[name])
        torch.testing.assert_close(tensor, want)
    base, *mine = (model.get_parameter("classifier.weight") for model in (tasks.model, *map(tasks.__getitem__, TRIO)))
    torch.testing.assert_close(mine[2], base + 0.5 * (mine[0] - base) + 0.25 * (mine[1] - base))


def test_a_combined_task_is_a_task(tmp_path: Path) -> None:
    tasks = two_tasks(LORA)
    before = {name: bits(tasks[name]) for name in tasks}
    state = torch.get_rng_state()
    model = combine_tasks(tasks, "both", ["one", "two"], "dare_ties", density=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, values in before.items():
        assert all(torch.equal(values[key], value) for key, value in bits(tasks[name]).items())
    again = combine_tasks(tasks, "again", ["one", "two"], "dare_ties", density=0.5, seed=3)
    other = combine_tasks(tasks, "other", ["one", "two"], "dare_ties", density=0.5, seed=4)
    assert torch.equal(logits(model), logits(again))
    assert not torch.equal(logits(model), logits(other))
    tasks.save("both", tmp_path / "task")
    model.save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "task", tmp_path / "model"):
        assert torch.equal(logits(unipelt.load(tiny_bert(), folder)), logits(model))
    mixed = logits(tasks, tasks=["one", "both", "two"])
    torch.testing.assert_close(mixed[1], logits(model)[1])
    model.train()
    model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert tasks.model.get_parameter("classifier.weight").grad is None


def test_a_head_is_chosen_where_labels_differ() -> None:
    tasks = two_tasks(LORA, one=3)
    with pytest.raises(ValueError, match="num_labels is 3 in task 'one' and 2 in 'two'"):
        combine_tasks(tasks, "both", ["one", "two"])
    model = combine_tasks(tasks, "both", ["one", "two"], head="one")
    assert model.config.num_labels == 3
    assert torch.equal(model.get_parameter("classifier.weight"), tasks["one"].get_parameter("classifier.weight"))
    with pytest.raises(ValueError, match=r"classifier\.\w+ of task 'one' has another shape than in the base"):
        combine_tasks(tasks, "alone", ["one"])


@pytest.fixture(scope="module")
def many() -> Tasks:
    tasks = two_tasks(LORA)
    tasks.add("adapter", "adapter")
    tasks.add("wide", {**LORA, "lora": {**LORA["lora"], "rank": 4}})
    tasks.add("dora", {"preset": "lora", "lora": {"decomposed": True}})
    with torch.no_grad():
        parts(tasks.add("broken", LORA), "lora").popitem()[1].fill_(float("inf"))
    return tasks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "no method 'tie' to merge tasks; did you mean 'ties'"),
        ({"sources": "one"}, "sources must be a list"),
        ({"sources": []}, "sources must be a list"),
        ({"sources": ["one", "one"]}, "none of them twice"),
        ({"weights": [1.0]}, "weights must be a list of 2 numbers"),
        ({"weights": [1.0, float("nan")]}, "a weight must be a finite number"),
        ({"weights": [0, 0]}, "all weights are 0"),
        ({"density": 0.5}, "task_arithmetic keeps every number"),
        ({"method": "ties", "density": 0}, "density must be above 0 and at most 1"),
        ({"sign": "frequency"}, "task_arithmetic elects no sign"),
        ({"method": "ties", "sign": "most"}, "sign must be total or frequency"),
        ({"rank": 0}, "rank must be a whole number above 0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"head": "three"}, "head must be one of the sources"),
        ({"name": "one"}, "there is a task 'one' already"),
        ({"sources": ["one", "adapter"]}, "have different methods: lora.rank is 3 in the one and None"),
        ({"sources": ["one", "wide"]}, "different methods: lora.rank is 3 in the one and 4 in the other"),
        ({"sources": ["one", "two"], "start": "wide"}, "'one' and 'wide' have different methods"),
        ({"sources": ["dora"]}, "decomposed LoRA"),
        ({"sources": ["adapter"], "rank": 4}, "rank is of LoRA"),
        ({"sources": ["one", "broken"]}, "task 'broken' holds numbers that are not finite"),
    ],
)
def test_combinations_that_are_refused_change_nothing(many: Tasks, options: dict[str, Any], message: str) -> None:
    names = list(many)
    with pytest.raises(ValueError, match=message):
        combine_tasks(many, **{"name": "both", "sources": ["one", "two"], **options})
    assert list(many) == names


def test_a_model_is_no_tasks() -> None:
    for function in (combine_tasks, unipelt.fuse_tasks):
        with pytest.raises(ValueError, match=f"{function.__name__} takes unipelt.Tasks, not BertForSequenceClassif"):
            function(tiny_bert(), "both", ["one", "two"])  # type: ignore[arg-type]


def test_a_task_that_is_not_there(many: Tasks) -> None:
    with pytest.raises(KeyError, match="no task 'nine'"):
        combine_tasks(many, "both", ["one", "nine"])
