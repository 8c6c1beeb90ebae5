"""The processes of one run: what they send each other, whose error is raised, and who reports and leaves.

Two threads stand for two processes. What one sends to the other is pickled, as between processes.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert
from torch import distributed
from transformers import TrainingArguments

from unipelt.runs import joint_trainer, processes
from unipelt.runs.batches import Batches, pack_rows
from unipelt.runs.errors import RunError
from unipelt.runs.joint_trainer import WEIGHT, JointTrainer, join_rows, own_indices
from unipelt.runs.trainer import BatchTrainer

InTwo = Callable[[Callable[[], Any]], list[Any]]


@pytest.fixture
def in_two(monkeypatch: pytest.MonkeyPatch) -> InTwo:
    """A function that calls another one in two processes, and returns what each returns or raises."""
    own = threading.local()

    def exchange(value: Any) -> list[Any]:
        own.sends.put(pickle.dumps(value))
        answer = own.receives.get(timeout=20)
        assert answer is not None, "the other process has ended"
        values = value, pickle.loads(answer)
        return [*values] if own.rank == 0 else [*reversed(values)]

    def gather(found: list[Any], value: Any) -> None:
        found[:] = exchange(value)

    def broadcast(values: list[Any], src: int) -> None:
        values[:] = exchange([*values])[src]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(processes, "world_size", lambda: 2 if hasattr(own, "rank") else 1)
    monkeypatch.setattr(processes, "rank", lambda: getattr(own, "rank", 0))

    def call(do: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None, None]
        ways: list[Queue[bytes | None]] = [Queue(), Queue()]

        def work(rank: int) -> None:
            own.rank, own.sends, own.receives = rank, ways[rank], ways[1 - rank]
            try:
                results[rank] = do()
            except Exception as error:
                results[rank] = error
                own.sends.put(None)  # the other one does not wait for this one

        threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return call


# What they send each other


def test_values_are_gathered_in_the_order_of_the_ranks(in_two: InTwo) -> None:
    assert in_two(lambda: processes.gather({"from": processes.rank()})) == [[{"from": 0}, {"from": 1}]] * 2


def test_the_first_process_does_it_for_all(in_two: InTwo) -> None:
    did: list[int] = []

    def do() -> str:
        did.append(processes.rank())
        return "made"

    assert in_two(lambda: processes.on_first(do)) == ["made", "made"]
    assert did == [0]


class Own(Exception):
    """An error that cannot be made from its arguments alone."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def refuse(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RunError("too large"), RunError, "too large"),
        (FileNotFoundError(2, "No such file", "a.tsv"), FileNotFoundError, "[Errno 2] No such file: 'a.tsv'"),
        (Own("this", "that"), RuntimeError, "Own: this and that"),
        (KeyError(lambda: None), RuntimeError, "KeyError: <function "),
    ],
)
def test_an_error_of_the_first_is_the_error_of_all(
    in_two: InTwo, error: Exception, kind: type[Exception], said: str
) -> None:
    first, other = in_two(lambda: processes.on_first(lambda: refuse(error)))
    assert first is error, "with its traceback"
    assert type(other) is kind
    assert str(other).startswith(said)


def test_the_others_begin_when_the_first_is_done(in_two: InTwo) -> None:
    events: list[str] = []

    def do() -> int:
        events.append(f"{processes.rank()} begins")
        time.sleep(0.02)
        events.append(f"{processes.rank()} ends")
        return processes.rank()

    assert in_two(lambda: processes.first_then_others(do)) == [0, 1]
    assert events == ["0 begins", "0 ends", "1 begins", "1 ends"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_raised_in_all(in_two: InTwo, failing: int) -> None:
    began: list[int] = []

    def do() -> int:
        began.append(processes.rank())
        return refuse(RunError("no room")) if processes.rank() == failing else 1

    for error in in_two(lambda: processes.first_then_others(do)):
        assert (type(error), str(error)) == (RunError, "no room")
    assert began == [0, 1][: failing + 1], "after an error of the first, the other does not begin"


# What a launcher has made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets variables of the environment, of two processes unless others are given."""

    def tell(**variables: Any) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return tell


LAUNCHED = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}


def test_ranks_and_lines(told: Callable[..., None]) -> None:
    lines: list[str] = []
    processes.only_first(lines.append)("of one")
    told(RANK=1)
    assert (processes.world_size(), processes.rank()) == (1, 0), "a rank among no others"
    told(WORLD_SIZE="", RANK="")
    assert (processes.world_size(), processes.rank()) == (1, 0)
    told(WORLD_SIZE=2, RANK="")
    assert (processes.world_size(), processes.rank(), processes.is_first()) == (2, 0, True)
    processes.only_first(lines.append)("of the first")
    told(RANK=1)
    assert (processes.rank(), processes.is_first()) == (1, False)
    processes.only_first(lines.append)("of the second")
    assert lines == ["of one", "of the first"]


@pytest.mark.parametrize(
    ("variables", "precision", "trainer", "said"),
    [
        ({}, "fp32", {}, None),
        (LAUNCHED, "fp32", {}, None),
        ({**LAUNCHED, "MASTER_PORT": None}, "fp32", {}, "WORLD_SIZE is 2, and MASTER_PORT is not set"),
        ({"WORLD_SIZE": 1}, "fp32", {}, None),
        ({"OMPI_COMM_WORLD_SIZE": 1}, "fp32", {}, None),
        ({"OMPI_COMM_WORLD_SIZE": 2}, "fp32", {}, "OMPI_COMM_WORLD_SIZE is above 1, and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 1, "PMI_SIZE": 2}, "fp32", {}, None),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "fp32", {}, "asks for Megatron-LM; choose MULTI_GPU"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "True"}, "fp32", {}, "asks for a parallelism_config"),
        ({"ACCELERATE_USE_FSDP": "false"}, "fp32", {}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16", {}, None),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16", {}, None),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp32", {"fp16": True}, None),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16", {}, "asks for mixed_precision fp16, and the run is to train"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", {"fp16": True}, "asks for mixed_precision bf16"),
    ],
)
def test_what_a_launcher_asks_for(
    told: Callable[..., None], variables: dict[str, Any], precision: str, trainer: dict[str, Any], said: str | None
) -> None:
    told(**{name: value for name, value in variables.items() if value is not None})
    if said is None:
        processes.check_launcher(precision, trainer)
    else:
        with pytest.raises(RunError, match=said):
            processes.check_launcher(precision, trainer)


def test_the_processes_share_a_batch_equally(told: Callable[..., None]) -> None:
    processes.check_batch_size(13)
    processes.need_one_process("a rerun")
    told(**LAUNCHED)
    processes.check_batch_size(14)
    with pytest.raises(RunError, match="batch_size is 13, which 2 processes cannot share equally"):
        processes.check_batch_size(13)
    with pytest.raises(RunError, match="a rerun is one process, and WORLD_SIZE is 2"):
        processes.need_one_process("a rerun")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for `torch.distributed` that waits for no process."""
    asked: list[Any] = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: bool(asked))
    monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: iter([("store", 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **options: asked.append((backend, options)))
    monkeypatch.setattr(torch.serialization, "register_package", lambda order, tagger, restore: None)
    monkeypatch.setattr(processes, "_store", None)
    return asked


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_a_process_joins_once(
    told: Callable[..., None], group: list[Any], monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    processes.join(device)
    assert not group, "one process has no others"
    told(**LAUNCHED)
    processes.join(device)
    processes.join(device)
    ((made, options),) = group
    assert (made, options["rank"], options["world_size"], options["store"]) == (backend, 1, 2, "store")
    assert taken == ([] if device == "cpu" else [1, 1])


def test_a_process_without_a_gpu(told: Callable[..., None], group: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told(**LAUNCHED)
    with pytest.raises(RunError, match="this machine has 1 GPUs, and a process for GPU number 1"):
        processes.join("cuda")
    assert not group


def test_a_storage_of_a_cpu_with_a_number(tmp_path: Path) -> None:
    """As accelerate names the CPU of a process. PyTorch itself knows no such place."""
    storage = torch.UntypedStorage(3)
    assert processes._restore_numbered_cpu(storage, "cpu:1") is storage
    assert processes._restore_numbered_cpu(storage, "cuda:1") is None


# Who reports, and the end


class Store:
    """A store that counts, or that has gone with its process."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def add(self, key: str, number: int) -> int:
        if self.count is None:
            raise RuntimeError("connection reset")
        self.count += number
        return self.count


@pytest.mark.parametrize(
    ("variables", "store", "reports"),
    [
        ({}, None, True),
        (LAUNCHED, None, False),
        ({**LAUNCHED, "RANK": 0}, None, True),
        (LAUNCHED, Store(0), True),
        ({**LAUNCHED, "RANK": 0}, Store(1), False),
        ({**LAUNCHED, "RANK": 0}, Store(None), False),
    ],
)
def test_one_process_reports_a_failure(
    told: Callable[..., None], monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], store: Any, reports: bool
) -> None:
    monkeypatch.setattr(processes, "_store", store)
    monkeypatch.setattr(processes, "_reports", not reports)
    told(**variables)
    assert processes.has_to_report() is reports
    assert processes._reports is reports


@pytest.mark.parametrize(
    ("joined", "reports", "code", "happens"),
    [
        (False, False, 0, []),
        (True, False, 0, ["waits", "leaves"]),
        (True, True, 2, ["exit 2"]),
        (True, False, 1, ["sleeps 30", "exit 1"]),
        (False, True, 2, ["exit 2"]),
    ],
)
def test_the_end_of_a_process(
    told: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    joined: bool,
    reports: bool,
    code: int,
    happens: list[str],
) -> None:
    """A launcher ends the others when one has ended, so the reporting one ends first."""
    did: list[str] = []
    monkeypatch.setattr(processes, "_store", Store(0) if joined else None)
    monkeypatch.setattr(processes, "_reports", reports)
    monkeypatch.setattr(processes, "gather", lambda value: did.append("waits"))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: did.append("leaves"))
    monkeypatch.setattr(time, "sleep", lambda seconds: did.append(f"sleeps {seconds}"))
    monkeypatch.setattr(os, "_exit", lambda code: did.append(f"exit {code}"))
    processes.leave(code)
    assert did == [], "one process ends by itself"
    told(**LAUNCHED)
    processes.leave(code)
    assert did == happens


# The trainer


def make_rows(count: int) -> Dataset:
    """Labelled texts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(5, 60, (3 + row % 4,), generator=generator).tolist() for row in range(count)]
    return Dataset.from_dict({"input_ids": ids, "label": [row % 2 for row in range(count)]})


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def make_trainer(folder: Path, kind: type[JointTrainer], train: int, evaluated: Any, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        per_device_eval_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return kind(
        model=tiny_bert(),
        args=arguments,
        data_collator=collate,
        train_dataset=make_rows(train),
        eval_dataset=evaluated,
        compute_metrics=lambda found: {"count": len(found.label_ids)},
        **options,
    )


def in_batches(rows: Dataset) -> Batches:
    return Batches(rows, pack_rows(len(rows), 4), collate, tiny_bert())


@pytest.mark.parametrize("count", [8, 9, 3], ids=lambda count: f"{-(-count // 4)} batches")
@pytest.mark.parametrize("kind", [JointTrainer, BatchTrainer])
def test_an_evaluation_together_is_that_of_one(
    in_two: InTwo, tmp_path: Path, kind: type[JointTrainer], count: int
) -> None:
    rows: Any = make_rows(count) if kind is JointTrainer else in_batches(make_rows(count))

    few: Any = make_rows(2) if kind is JointTrainer else in_batches(make_rows(2))

    def both(trainer: Any) -> tuple[Any, dict[str, float]]:
        assert trainer.evaluate(few)["eval_count"] == 2, "of other rows than its own"
        return trainer.predict(rows), trainer.evaluate()

    alone, dev = both(make_trainer(tmp_path, kind, 6, rows))
    trainers = iter([make_trainer(tmp_path, kind, 6, rows) for _ in range(2)])
    for result in in_two(lambda: both(next(trainers))):
        assert not isinstance(result, Exception), result
        found, own = result
        assert own["eval_loss"] == pytest.approx(dev["eval_loss"], rel=1e-5)
        assert own["eval_count"] == dev["eval_count"] == count
        torch.testing.assert_close(torch.tensor(found.predictions), torch.tensor(alone.predictions))
        assert found.label_ids.tolist() == alone.label_ids.tolist() == [row % 2 for row in range(count)]
        assert found.metrics["test_loss"] == pytest.approx(alone.metrics["test_loss"], rel=1e-5)
        assert found.metrics["test_count"] == count
        rate = found.metrics["test_samples_per_second"] * found.metrics["test_runtime"]
        assert rate == pytest.approx(count, rel=0.05)


def test_processes_draw_the_same_rows_and_dropout_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def drawn(rank: int) -> tuple[list[Any], float]:
        monkeypatch.setattr(processes, "world_size", lambda: 3)
        monkeypatch.setattr(processes, "rank", lambda: rank)
        trainer = make_trainer(tmp_path, JointTrainer, 20, None)  # sets the seed
        loader = trainer.get_train_dataloader()
        number = torch.rand(1).item()
        return [batch["input_ids"].tolist() for batch in loader], number

    found = [drawn(rank) for rank in (0, 1, 2, 1)]
    assert all(rows == found[0][0] for rows, _ in found)
    assert [len(rows) for rows in found[0][0]] == [6, 6, 6, 2], "the last batch is not filled"
    assert len({number for _, number in found}) == 3
    assert found[1] == found[3]
    torch.manual_seed(42 + 2 * 1000003)
    assert found[2][1] == torch.rand(1).item(), "a run that was begun by an older version draws the same dropout"


@pytest.mark.parametrize("rows", [6, 5, 1])
@pytest.mark.parametrize("tokens", [None, 12])
def test_a_step_together_is_that_of_one(in_two: InTwo, tmp_path: Path, rows: int, tokens: int | None) -> None:
    """The mean of the gradients of two processes, of which one may have more rows or no row."""

    def step(trainer: Any) -> dict[str, torch.Tensor]:
        trainer.current_gradient_accumulation_steps = 1  # which train() sets
        batches, count = trainer.get_batch_samples(iter([collate(make_rows(rows).to_list())]), 1, torch.device("cpu"))
        trainer.training_step(trainer.model, batches[0], count)
        assert trainer._weight == 1.0
        return {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}

    def make() -> Any:
        return make_trainer(tmp_path, BatchTrainer, rows, None, train_tokens=tokens)

    alone = step(make())
    both = iter([make(), make()])
    one, other = in_two(lambda: step(next(both)))
    assert one.keys() == other.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close((one[name] + other[name]) / 2, gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_rows_that_do_not_count_are_left_out_of_all_outputs(in_two: InTwo, tmp_path: Path) -> None:
    """The second process has computed a row more than it has."""
    trainers = [make_trainer(tmp_path, JointTrainer, 6, None) for _ in range(2)]

    def gathered() -> Any:
        rank = processes.rank()
        trainers[rank]._rows = 2 - rank
        return trainers[rank]._gather_rows((torch.full((2, 1), rank), {"more": torch.full((2,), 10 * rank)}))

    for first, more in in_two(gathered):
        assert first.tolist() == [[0], [0], [1]]
        assert more["more"].tolist() == [0, 0, 10]


def test_outputs_are_sent_from_the_cpu() -> None:
    on_gpu = SimpleNamespace(cpu=lambda: "on the CPU")
    assert joint_trainer._to_cpu((on_gpu, {"more": [on_gpu]})) == ("on the CPU", {"more": ["on the CPU"]})


def test_a_mean_over_tokens_is_weighted_by_tokens(in_two: InTwo) -> None:
    batch = {
        "input_ids": torch.arange(6).reshape(3, 2),
        "labels": torch.tensor([[7, -100], [7, 7], [7, 7]]),
    }
    one, other = in_two(lambda: joint_trainer._own_rows(batch))
    assert (one["labels"].tolist(), one[WEIGHT]) == ([[7, -100]], pytest.approx(2 * 1 / 5))
    assert (other["labels"].tolist(), other[WEIGHT]) == ([[7, 7], [7, 7]], pytest.approx(2 * 4 / 5))


def test_rows_of_batches_are_joined_in_their_order(in_two: InTwo) -> None:
    sizes = [2, 3, 1, 2, 4]
    rows = torch.arange(sum(sizes)).reshape(-1, 1)
    batches = rows.split(sizes)

    def own() -> torch.Tensor:
        held = torch.cat([batches[index] for index in own_indices(len(sizes))])
        surplus = torch.full((2 * processes.rank(), 1), -1)  # of a batch that was computed once more
        return join_rows(torch.cat([held, surplus]), sizes)

    assert join_rows(rows, sizes) is rows
    for found in in_two(own):
        assert found.tolist() == rows.tolist()
