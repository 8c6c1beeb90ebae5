"""Several runs in one process and one pass over the model. Each run ends as it would end alone, in its own folder.

Runs with the same model, method and shape of the head (`pack_key`) take places in a `unipelt.pack.Pack`. Each run has
its own data, order of the data, learning rate, optimizer, schedule, clipping, early stopping and best epoch. A run that
has ended is tested and written at once, and the next run takes its place. A run that was killed continues from its last
checkpoint, also beside other runs than before.

Shapes: R runs, B examples of each, T tokens, C outputs of the head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unipelt.files.messages import say
from unipelt.glue.packed_run import PackedRun, sit
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import get_task
from unipelt.pack import Pack, losses
from unipelt.runs.batches import default_tokens, pack_rows, pack_tokens
from unipelt.runs.cache import SharedCache
from unipelt.runs.device import precision_of
from unipelt.runs.errors import RunError, RunFailed, memory_named
from unipelt.runs.processes import need_one_process

CHECKPOINT_SECONDS = 60.0
"""The least time between two checkpoints of a run. A checkpoint takes longer than an epoch of a few-shot run."""
_OWN = (
    *("task", "glue_dir", "train_samples", "dev_samples", "test_samples", "data_seed", "seed", "learning_rate"),
    *("epochs", "patience", "weight_decay", "warmup_ratio", "max_grad_norm"),
    *("output_dir", "overwrite", "do_predict", "keep_checkpoints"),
)
"""The fields in which the runs of a pack may differ."""


def pack_key(settings: RunSettings) -> str:
    """Return a key, as JSON, that is equal for runs that can share a pack."""
    common = {name: value for name, value in settings.to_dict().items() if name not in _OWN}
    common["method"] = settings.config.to_dict()
    task = None if settings.task is None else get_task(settings.task)
    return json.dumps([common, None if task is None else [task.num_labels, task.is_regression]], sort_keys=True)


def run_packed(
    runs: Sequence[RunSettings], places: int, log: Callable[[str], None] = say
) -> dict[str, dict[str, Any] | str]:
    """Do these runs, `places` at a time.

    Args:
        runs: the settings of the runs, which have the same `pack_key` and different folders.
        places: the number of runs that train at once.
        log: function that takes the lines for the reader.

    Returns:
        For each folder, the record of its run, or one line with the reason why there is no record.

    Raises:
        RunError: the runs cannot share a pack. (An error in one run fails only that run.)
    """
    if places < 1:
        raise RunError(f"a pack has 1 place or more, not {places}")
    if len({pack_key(settings) for settings in runs}) > 1:
        raise RunError("runs that share a pack may differ in task, data, seeds and learning rate, and in nothing else")
    outcomes: dict[str, dict[str, Any] | str] = {}
    waiting = list(runs)

    def done(settings: RunSettings, outcome: dict[str, Any] | Exception) -> None:
        line = f"{type(outcome).__name__}: {outcome}" if isinstance(outcome, Exception) else outcome
        outcomes[str(settings.output_dir)] = line

    train(lambda free, idle: [waiting.pop(0) for _ in range(min(free, len(waiting)))], done, places, lambda _: log)
    return outcomes


def train(
    take: Callable[[int, bool], Sequence[RunSettings]],
    done: Callable[[RunSettings, dict[str, Any] | Exception], None],
    places: int,
    voice: Callable[[RunSettings], Callable[[str], None]],
) -> None:
    """Do runs until `take` returns no more.

    Args:
        take: function of the number of free places, and of whether all places are free. It returns at most that number
            of runs. If all places are free and it returns no run, training ends.
        done: function that takes the settings of a run, and its record or its error.
        places: the number of runs that train at once.
        voice: function of the settings of a run. It returns the function that takes the lines of this run.

    Raises:
        RunError: this process is one of several.
    """
    need_one_process("a pack of runs")
    pack: Pack | None = None
    seats: list[PackedRun] = []
    kept = SharedCache()
    equal: dict[str, Tensor] = {}
    threads = torch.get_num_threads()
    try:
        while True:
            while len(seats) < places and (new := take(places - len(seats), not seats)):
                for settings in new:
                    try:
                        seat = sit(settings, pack, kept, equal, voice(settings))
                    except Exception as error:  # the other runs go on
                        done(settings, error)
                        continue
                    if isinstance(seat, dict):
                        done(settings, seat)
                    else:
                        if pack is None:
                            torch.manual_seed(settings.seed)  # dropout belongs to the pack, not to a run
                        pack = seat.pack
                        seats.append(seat)
            if not seats or pack is None:
                return
            ended = [seat for seat in seats if seat.ended]  # a restored run may have ended already
            if not ended:
                with memory_named(f"{len(seats)} runs trained in one pack", "pack fewer", RunFailed):
                    _step(pack, seats)
                    failed = _evaluate(pack, [seat for seat in seats if seat.epoch_is_over])
                for seat, reason in failed.items():
                    seats.remove(seat)
                    seat.fail(reason)
                    done(seat.job.settings, reason)
                ended = [seat for seat in seats if seat.ended]
            for seat in ended:
                seats.remove(seat)
                try:
                    outcome: dict[str, Any] | Exception = seat.finish(places)
                except Exception as error:
                    outcome = error
                done(seat.job.settings, outcome)
            if ended:
                pack.model.train()
    finally:
        torch.set_num_threads(threads)
        for seat in seats:
            seat.lock.close()


def _step(pack: Pack, seats: Sequence[PackedRun]) -> None:
    """Do one training step of each run."""
    # in the order of the pack, because its losses are for all replicas
    batch, real = _join([seat.next_batch() for seat in seats], seats)
    labels = batch.pop("labels")
    with precision_of(seats[0].job.device, seats[0].job.settings.precision):
        logits = pack(batch)
    each = losses(logits, labels, real)
    pack.backward(each)
    each = each.detach()
    for index, seat in enumerate(seats):
        seat.update(each, index)


def _evaluate(pack: Pack, seats: Sequence[PackedRun]) -> dict[PackedRun, Exception]:
    """Evaluate these runs on their dev sets, at the end of an epoch. Return the errors of runs that failed."""
    if not seats:
        return {}
    found: dict[PackedRun, list[tuple[Tensor, Tensor]]] = {seat: [] for seat in seats}
    for seat in seats:
        seat.spend("train")
    pack.model.eval()
    for rows in _cut(seats):
        here = [seat for seat in seats if rows.start < len(seat.lengths)]
        tokens = max(seat.lengths[rows.start] for seat in here)
        cuts = []
        for seat in here:
            cut = {name: tensor[rows.start : rows.stop] for name, tensor in seat.dev.items()}
            cuts.append({name: tensor if name == "labels" else tensor[:, :tokens] for name, tensor in cut.items()})
        batch, _ = _join(cuts, here)
        labels = batch.pop("labels")
        with torch.no_grad(), precision_of(here[0].job.device, here[0].job.settings.precision):
            logits = pack(batch, [seat.replica for seat in here]).float()
        for row, seat in enumerate(here):
            count = len(cuts[row]["labels"])
            found[seat].append((logits[row, :count], labels[row, :count]))
    pack.model.train()
    failures: dict[PackedRun, Exception] = {}
    for seat, parts in found.items():
        try:
            seat.judge(torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts]))
            seat.spend("evaluation")
            if time.monotonic() - seat.saved >= CHECKPOINT_SECONDS:
                seat.save()
        except Exception as error:
            failures[seat] = error
    return failures


def _cut(seats: Sequence[PackedRun]) -> list[range]:
    """Return the batches in which the dev sets are evaluated together, as row ranges that all runs share."""
    job = seats[0].job
    count = max(len(seat.lengths) for seat in seats)
    if job.settings.eval_tokens == 0:
        return pack_rows(count, job.settings.eval_batch_size)
    budget = job.settings.eval_tokens or default_tokens(job.device)
    if job.device == "cpu":  # so that a batch stays in the cache
        budget = max(1, budget // len(seats))
    longest = [max(seat.lengths[row] for seat in seats if row < len(seat.lengths)) for row in range(count)]
    return pack_tokens(longest, budget)


def _join(batches: Sequence[Mapping[str, Tensor]], seats: Sequence[PackedRun]) -> tuple[dict[str, Tensor], Tensor]:
    """Join the batches of several runs into one batch.

    Args:
        batches: the batch of each run, with tensors (B, T) and `labels` (B,). B and T may differ between runs.
        seats: the runs.

    Returns:
        The batch, with tensors (R, B, T) and `labels` (R, B), on the pack's device; and a mask (R, B), which is False
        for the repeated examples that fill the batch.
    """
    job, device = seats[0].job, seats[0].pack.device
    here = batches[0]["labels"].device
    padding = {"input_ids": job.tokenizer.pad_token_id, "token_type_ids": job.tokenizer.pad_token_type_id}
    rows = max(len(batch["labels"]) for batch in batches)
    tokens = max(batch["input_ids"].shape[1] for batch in batches)
    real = torch.zeros(len(batches), rows, dtype=torch.bool)
    joined: dict[str, Tensor] = {}
    for name, first in batches[0].items():
        shape = (len(batches), rows) if name == "labels" else (len(batches), rows, tokens)
        joined[name] = torch.full(shape, padding.get(name, 0), dtype=first.dtype, device=here)
    for index, batch in enumerate(batches):
        count = len(batch["labels"])
        real[index, :count] = True
        for name, tensor in batch.items():
            space = joined[name][index] if name == "labels" else joined[name][index, :, : tensor.shape[1]]
            space[:count] = tensor
            space[count:] = tensor[0]
    if device.type == "cuda" and here.type == "cpu":
        joined = {name: tensor.pin_memory() for name, tensor in joined.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in joined.items()}, real.to(device)
