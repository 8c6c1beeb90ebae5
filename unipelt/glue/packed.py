"""Several runs in one process and one pass: each ends as by itself, in a folder of its own.

Runs that share a model, a method and the shape of the head (`pack_key`) take places in a `unipelt.pack.Pack`. Each has
its own data in its own order, learning rate, optimizer, schedule, clipping, early stopping and best epoch; a run that
has ended is tested and written at once, and its place is free for the next. A run that was killed goes on from its
last checkpoint, in whatever company.

Shapes: R runs, B examples of each, T tokens, C outputs of the head.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerState,
    get_linear_schedule_with_warmup,
)

from unipelt.checkpoint import write_whole
from unipelt.glue import folder as place
from unipelt.glue.batches import Batches, default_tokens, pack_rows, pack_tokens, text_lengths
from unipelt.glue.failure import Diverged, RunFailed, check_losses, memory_named
from unipelt.glue.folder import Progress
from unipelt.glue.job import Job, RunError, precision_of, prepare
from unipelt.glue.keep import Kept, same_memory
from unipelt.glue.metric import compute_metrics_for
from unipelt.glue.result import RESULT, summary
from unipelt.glue.run import evaluated, finish, make_trainer
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import get_task
from unipelt.pack import Pack, PackError, Replica, kept_values, losses

CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints of a run: an epoch of a few-shot run takes less than writing one."""
_FORMAT = 1  # of the checkpoints here, which the trainer's own runs leave alone
_WEIGHTS, _STATE = "pack.safetensors", "pack.json"
_OWN = (
    *("task", "glue_dir", "train_samples", "dev_samples", "test_samples", "data_seed", "seed", "learning_rate"),
    *("epochs", "patience", "weight_decay", "warmup_ratio", "max_grad_norm"),
    *("output_dir", "overwrite", "do_predict", "keep_checkpoints"),
)
"""The fields in which the runs of a pack may differ."""


def pack_key(settings: RunSettings) -> str:
    """What runs must have in common to share a pack, as JSON."""
    common = {name: value for name, value in settings.to_dict().items() if name not in _OWN}
    common["method"] = settings.config.to_dict()
    task = None if settings.task is None else get_task(settings.task)
    return json.dumps([common, None if task is None else [task.num_labels, task.is_regression]], sort_keys=True)


def run_packed(
    runs: Sequence[RunSettings], places: int, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any] | str]:
    """Do these runs, `places` at a time.

    Args:
        runs: with the same `pack_key`, each with a folder of its own.
        places: how many train at once.
        say: takes the lines for the reader.

    Returns:
        By folder, the record, or in one line why there is none.

    Raises:
        RunError: the runs cannot share a pack. (What is wrong with one run fails that run alone.)
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

    train(lambda free, idle: [waiting.pop(0) for _ in range(min(free, len(waiting)))], done, places, lambda _: say)
    return outcomes


def train(
    take: Callable[[int, bool], Sequence[RunSettings]],
    done: Callable[[RunSettings, dict[str, Any] | Exception], None],
    places: int,
    voice: Callable[[RunSettings], Callable[[str], None]],
) -> None:
    """Do runs as they come.

    Args:
        take: given how many places are free, and whether all are, returns as many runs at most. When all are free,
            none means the end.
        done: told of each run's record, or of what went wrong with it.
        places: how many train at once.
        voice: takes a run's lines for the reader.
    """
    pack: Pack | None = None
    seats: list[_Seat] = []
    kept = Kept()
    equal: dict[str, Tensor] = {}
    threads = torch.get_num_threads()
    try:
        while True:
            while len(seats) < places and (new := take(places - len(seats), not seats)):
                for settings in new:
                    try:
                        seat = _sit(settings, pack, kept, equal, voice(settings))
                    except Exception as error:  # the other runs go on
                        done(settings, error)
                        continue
                    if isinstance(seat, dict):
                        done(settings, seat)
                    else:
                        if pack is None:
                            torch.manual_seed(settings.seed)  # dropout is the pack's, not the runs'
                        pack = seat.pack
                        seats.append(seat)
            if not seats or pack is None:
                return
            ended = [seat for seat in seats if seat.ended]  # at the moment of a kill
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


@dataclass(eq=False)
class _Seat:
    """A run in its place.

    Attributes:
        places: of the pack, for the record.
        best: what the replica was after the best epoch, (N,).
        waited: evaluations since then.
        losses: of the steps of this epoch, (R,) each, and which of them is this run's.
        dev: the dev set, (rows, T) and `labels` (rows,), longest texts first, on the pack's device.
        lengths: tokens of each of its rows.
        saved: when the last checkpoint was written.
    """

    job: Job
    folder: Path
    progress: Progress
    trainer: Trainer
    loader: DataLoader[Any]
    pack: Pack
    replica: Replica
    optimizer: torch.optim.Optimizer
    scheduler: Any
    state: TrainerState
    lock: contextlib.ExitStack
    say: Callable[[str], None]
    best: Tensor
    waited: int = 0
    losses: list[tuple[Tensor, int]] = field(default_factory=list)
    dev: dict[str, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    clock: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    batches: Iterator[dict[str, Tensor]] | None = None

    @property
    def steps_an_epoch(self) -> int:
        """The last, which may be smaller, included."""
        return len(self.loader)

    @property
    def epoch_is_over(self) -> bool:
        """Whether an evaluation is due."""
        return self.state.global_step % self.steps_an_epoch == 0

    @property
    def ended(self) -> bool:
        """Whether training is at its end, or stopped early."""
        patience = self.job.settings.patience
        stopped = patience is not None and self.waited >= patience
        return self.state.global_step > 0 and (stopped or self.state.global_step == self.state.max_steps)

    def spend(self, *kinds: str) -> None:
        """Count the seconds since the last call as spent on `kinds`, and in total."""
        now = time.monotonic()
        for kind in (*kinds, "total"):
            self.progress.seconds[kind] += now - self.clock
        self.clock = now

    def next_batch(self) -> dict[str, Tensor]:
        """The examples of the next step, as the trainer would take them."""
        if self.batches is None:
            set_epoch = getattr(self.loader, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.state.global_step // self.steps_an_epoch)
            self.batches = iter(self.loader)
        return dict(next(self.batches))

    def update(self, loss: Tensor, index: int) -> None:
        """A step, once the gradient is there."""
        settings = self.job.settings
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.replica.parameters, settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append((loss, index))
        self.state.global_step += 1

    def judge(self, logits: Tensor, labels: Tensor) -> None:
        """Enter an evaluation on the dev set: logits (rows, C). Raises `Diverged`."""
        task, state = self.job.task, self.state
        evaluation = EvalPrediction(predictions=logits.float().cpu().numpy(), label_ids=labels.cpu().numpy())
        loss = losses(logits[None], labels[None], torch.ones_like(labels[None], dtype=torch.bool)).item()
        train_loss = torch.stack([each[index] for each, index in self.losses]).mean().item()
        state.epoch = state.global_step / self.steps_an_epoch
        try:
            metrics = compute_metrics_for(task)(evaluation)
            check_losses(train=train_loss, dev=loss)
        except Diverged as error:
            rate = float(self.job.settings.learning_rate or 0.0)
            raise error.at(state.epoch, state.global_step, rate) from error
        at = {"epoch": state.epoch, "step": state.global_step}
        state.log_history.append({"loss": train_loss, **at})
        scores = {f"eval_{name}": value for name, value in metrics.items()}
        state.log_history.append({"eval_loss": loss, **scores, **at})
        value = metrics[task.primary]
        better = state.best_metric is None or value > state.best_metric
        if better:
            state.best_metric, state.best_global_step = value, state.global_step
            self.best = self.replica.row.clone()
        self.waited = 0 if better else self.waited + 1
        self.losses, self.batches = [], None
        self.say(
            f"epoch {state.epoch:>3.0f}  train loss {train_loss:.4f}  dev loss {loss:.4f}  "
            f"{task.primary} {value:.3f}{'  best so far' if better else ''}"
        )

    def save(self) -> None:
        """Write a checkpoint, which is complete once it is marked, and remove the one before."""
        step = self.state.global_step
        checkpoint = place.checkpoint_at(self.folder, step)
        checkpoint.mkdir(exist_ok=True)
        tensors = {"row": self.replica.row, "best": self.best}
        for index, leaf in enumerate(self.replica.parameters):
            for name, tensor in self.optimizer.state.get(leaf, {}).items():
                tensors[f"{index}.{name}"] = tensor
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(checkpoint / _WEIGHTS, dump_tensors(content))
        self.state.save_to_json(str(checkpoint / "trainer_state.json"))
        state = {"waited": self.waited, "scheduler": self.scheduler.state_dict()}
        write_whole(checkpoint / _STATE, json.dumps(state).encode())
        self.progress.write(self.folder)
        place.mark(self.folder, step, _digest(self.job), finished=self.ended)
        place.remove_checkpoints(self.folder, keep=(checkpoint,))
        self.saved = time.monotonic()

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        tensors = load_file(checkpoint / _WEIGHTS, device=str(self.pack.device))
        self.replica.row.copy_(tensors["row"])
        self.best = tensors["best"]
        for index, leaf in enumerate(self.replica.parameters):
            # the count of steps stays on the CPU, where AdamW keeps it
            found = {name: tensors[f"{index}.{name}"] for name in _ADAM if f"{index}.{name}" in tensors}
            if found:
                self.optimizer.state[leaf] = found | {"step": found["step"].cpu()}
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        self.waited = state["waited"]
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.say(f"going on from {checkpoint}")

    def fail(self, error: Exception) -> None:
        """Leave the pack with a run that cannot go on."""
        self.pack.remove(self.replica)
        self.lock.close()
        self.say(f"{type(error).__name__}: {error}")

    def finish(self, places: int) -> dict[str, Any]:
        """Leave the pack, test the best epoch and write everything; returns the record."""
        with self.lock:
            self.pack.remove(self.replica)
            own = dict(self.job.model.named_parameters())
            with torch.no_grad():
                for name, tensor in self.replica.tensors(self.best).items():
                    own[name].copy_(tensor)
            record = finish(
                self.trainer,
                self.job,
                self.folder,
                self.state,
                self.progress,
                self.spend,
                self.say,
                packed={"places": places},
            )
            self.say(summary(record, self.folder / RESULT))
        return record


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def _digest(job: Job) -> str:
    return hashlib.sha256(f"pack {_FORMAT} {job.digest}".encode()).hexdigest()


def _sit(
    settings: RunSettings, pack: Pack | None, kept: Kept, equal: dict[str, Tensor], say: Callable[[str], None]
) -> _Seat | dict[str, Any]:
    """A run in a place of the pack, which is made if there is none; or the record, if it had finished before.

    Args:
        settings: of the run.
        pack: if there is one.
        kept: what the runs of this process share.
        equal: parameters that are known to equal the pack's base, by name; more are entered.
        say: takes the run's lines for the reader.
    """
    clock = time.monotonic()
    folder = Path(str(settings.output_dir))
    if settings.gradient_checkpointing:
        raise PackError("gradient checkpointing and a pack exclude each other; pack fewer runs instead")
    if (record := place.find_finished(settings, folder)) is not None:
        return record
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with contextlib.ExitStack() as lock, torch.random.fork_rng(devices):  # seeds are the run's, dropout is the pack's
        job = prepare(settings, kept)
        lock.enter_context(place.locked(folder))
        if (record := place.find_finished(settings, folder)) is not None:  # another process may have been faster
            return record
        if pack is None:
            host: Any = copy.deepcopy(job.model)
            host.to(job.device)
            pack = Pack(host, settings.max_length, _decayed(job.model))
            host.train()
        _share_base(job.model, pack.model, equal)
        progress = place.begin(settings, folder)
        trainer = make_trainer(job, folder, evaluated(job, "dev"))
        loader: Any = trainer.get_train_dataloader()
        loader.device = None  # batches go to the GPU when they have been joined
        replica = pack.add(kept_values(job.model))
        try:
            optimizer, scheduler, steps = _optimizer(replica, trainer, len(loader))
            state = TrainerState(max_steps=steps, num_train_epochs=settings.epochs)
            seat = _Seat(
                *(job, folder, progress, trainer, loader, pack, replica, optimizer, scheduler, state),
                lock=lock,
                say=say,
                best=replica.row,
                clock=clock,
            )
            last = place.newest_checkpoint(folder, _digest(job))
            place.remove_checkpoints(folder, digest=_digest(job))
            if last is not None:
                seat.restore(last)
            seat.dev, seat.lengths = _dev_set(job, pack.device)
        except BaseException:
            pack.remove(replica)
            raise
        seat.lock = lock.pop_all()
    return seat


def _share_base(model: PreTrainedModel, host: PreTrainedModel, equal: dict[str, Tensor]) -> None:
    """Let a model's base be the host's, which holds the same numbers, so that there is one for all runs.

    What is in the memory of a tensor in `equal` is not compared again; what is found to be equal is entered there.
    """
    own, there = kept_values(model), dict(host.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in own:
            base = there[name].data
            if not same_memory(parameter.data, equal.get(name)):
                if not torch.equal(parameter.data.to(base.device), base):
                    raise RunError(f"the bases of runs in one pack must be the same, and {name} differs")
                equal[name] = parameter.data
            parameter.data = base


def _decayed(model: PreTrainedModel) -> list[str]:
    """The parameters that the trainer decays; it asks nothing else of itself."""
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]


def _optimizer(replica: Replica, trainer: Trainer, steps_an_epoch: int) -> tuple[torch.optim.Optimizer, Any, int]:
    """The trainer's optimizer and schedule over a replica's leaves, and the number of all steps."""
    arguments = trainer.args
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    decays = ((replica.decayed, arguments.weight_decay), (replica.plain, 0.0))
    groups = [{"params": [leaf], "weight_decay": decay} for leaf, decay in decays if leaf.numel()]
    optimizer = kind(groups, **options)
    steps = math.ceil(arguments.num_train_epochs * steps_an_epoch)
    return optimizer, get_linear_schedule_with_warmup(optimizer, arguments.get_warmup_steps(steps), steps), steps


def _dev_set(job: Job, device: torch.device) -> tuple[dict[str, Tensor], list[int]]:
    """The dev set, padded once to its longest text, and the tokens of each row."""
    rows = job.splits["dev"]
    whole = Batches(rows, [range(len(rows))], DataCollatorWithPadding(job.tokenizer), job.model)[0]
    return {name: tensor.to(device) for name, tensor in whole.items()}, text_lengths(rows)


def _step(pack: Pack, seats: Sequence[_Seat]) -> None:
    """One step of each run."""
    # in the pack's order: its losses are of all replicas
    batch, real = _join([seat.next_batch() for seat in seats], seats)
    labels = batch.pop("labels")
    with precision_of(seats[0].job):
        logits = pack(batch)
    each = losses(logits, labels, real)
    pack.backward(each)
    each = each.detach()
    for index, seat in enumerate(seats):
        seat.update(each, index)


def _evaluate(pack: Pack, seats: Sequence[_Seat]) -> dict[_Seat, Exception]:
    """Evaluate these runs, at the end of an epoch of theirs, on their dev sets; returns those that failed."""
    if not seats:
        return {}
    found: dict[_Seat, list[tuple[Tensor, Tensor]]] = {seat: [] for seat in seats}
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
        with torch.no_grad(), precision_of(here[0].job):
            logits = pack(batch, [seat.replica for seat in here]).float()
        for row, seat in enumerate(here):
            count = len(cuts[row]["labels"])
            found[seat].append((logits[row, :count], labels[row, :count]))
    pack.model.train()
    failures: dict[_Seat, Exception] = {}
    for seat, parts in found.items():
        try:
            seat.judge(torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts]))
            seat.spend("evaluation")
            if time.monotonic() - seat.saved >= CHECKPOINT_SECONDS:
                seat.save()
        except Exception as error:
            failures[seat] = error
    return failures


def _cut(seats: Sequence[_Seat]) -> list[range]:
    """The batches in which dev sets are evaluated together: rows of each, the same for all."""
    job = seats[0].job
    count = max(len(seat.lengths) for seat in seats)
    if job.settings.eval_tokens == 0:
        return pack_rows(count, job.settings.eval_batch_size)
    budget = job.settings.eval_tokens or default_tokens(job.device)
    if job.device == "cpu":  # what stays in its cache
        budget = max(1, budget // len(seats))
    longest = [max(seat.lengths[row] for seat in seats if row < len(seat.lengths)) for row in range(count)]
    return pack_tokens(longest, budget)


def _join(batches: Sequence[Mapping[str, Tensor]], seats: Sequence[_Seat]) -> tuple[dict[str, Tensor], Tensor]:
    """One batch of the batches of several runs.

    Args:
        batches: of each run, (B, T), and `labels`, (B,); B and T may differ.
        seats: the runs.

    Returns:
        The batch, (R, B, T) and `labels` (R, B), on the pack's device; and (R, B), whether an example is a run's own
        and not a repetition that fills the batch.
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
