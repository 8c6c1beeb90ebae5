"""One run in its place of a pack: its own state, its update with a gradient, and its checkpoints.

Shapes: R runs, T tokens, C outputs of the head, N numbers of a replica.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
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

from unipelt.files.atomic import write_whole
from unipelt.glue.job import Job, prepare
from unipelt.glue.metric import compute_metrics_for
from unipelt.glue.run import evaluated, finish, make_trainer, scores
from unipelt.glue.settings import RunSettings
from unipelt.pack import Pack, PackError, Replica, kept_values, losses
from unipelt.records.record import RESULT, summary
from unipelt.runs import folder as place
from unipelt.runs.averages import WeightAverage
from unipelt.runs.batches import Batches, text_lengths
from unipelt.runs.cache import SharedCache, same_memory
from unipelt.runs.errors import Diverged, RunError, check_losses
from unipelt.runs.final import finalize
from unipelt.runs.folder import Progress
from unipelt.runs.moment import TrainingProgress
from unipelt.submodules.room import own_buffers

_FORMAT = 1  # format of the checkpoints here, which Trainer's runs do not read
_WEIGHTS, _STATE = "pack.safetensors", "pack.json"


@dataclass(eq=False)
class PackedRun:
    """A run in its place of a pack.

    Attributes:
        best: the replica after the best epoch, (N,).
        waited: the number of evaluations since the best epoch.
        losses: for each step of this epoch, the losses of all runs, (R,), and the index of this run.
        dev: the dev set, tensors (rows, T) and `labels` (rows,), longest texts first, on the pack's device.
        lengths: the number of tokens of each row of the dev set.
        clock: the time of the last call of `spend`, in seconds of `time.monotonic`.
        saved: the time of the last checkpoint, in seconds of `time.monotonic`.
        average: the average of the replica's rows, or None without one.
        shown: the progress for the reader, from the first step of this attempt on.
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
    log: Callable[[str], None]
    best: Tensor
    waited: int = 0
    losses: list[tuple[Tensor, int]] = field(default_factory=list)
    dev: dict[str, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    clock: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    batches: Iterator[dict[str, Tensor]] | None = None
    average: WeightAverage | None = None
    shown: TrainingProgress | None = None

    @property
    def steps_an_epoch(self) -> int:
        """The number of steps in an epoch. It includes the last batch, which may be smaller."""
        return len(self.loader)

    @property
    def epoch_is_over(self) -> bool:
        """Whether an evaluation is due."""
        return self.state.global_step % self.steps_an_epoch == 0

    @property
    def ended(self) -> bool:
        """Whether training has reached its end or has stopped early."""
        patience = self.job.settings.patience
        stopped = patience is not None and self.waited >= patience
        return self.state.global_step > 0 and (stopped or self.state.global_step == self.state.max_steps)

    def spend(self, *kinds: str) -> None:
        """Add the seconds since the last call to `kinds` and to the total."""
        now = time.monotonic()
        for kind in (*kinds, "total"):
            self.progress.seconds[kind] += now - self.clock
        self.clock = now

    def next_batch(self) -> dict[str, Tensor]:
        """Return the batch of the next step, with the examples that Trainer would take."""
        if self.batches is None:
            set_epoch = getattr(self.loader, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.state.global_step // self.steps_an_epoch)
            self.batches = iter(self.loader)
        return dict(next(self.batches))

    def update(self, loss: Tensor, index: int) -> None:
        """Do a step with the present gradient. `loss` (R,) holds the losses of all runs, at `index` of this run."""
        settings = self.job.settings
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.replica.parameters, settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append((loss, index))
        self.state.global_step += 1
        if self.average is not None:
            self.average.after_step({"row": self.replica.row})
        if self.shown is None:  # runs of a pack would draw several bars
            steps, epochs = self.state.max_steps, self.state.num_train_epochs
            self.shown = TrainingProgress(self.folder, self.state.global_step - 1, steps, epochs, self.log, bar=False)
        self.shown.update(self.state.global_step / self.steps_an_epoch)

    def judge(self, logits: Tensor, labels: Tensor) -> None:
        """Enter an evaluation on the dev set with logits (rows, C) and labels (rows,).

        Raises:
            Diverged: a loss is not finite, or an output is NaN.
        """
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
        if self.average is not None:
            self.average.after_evaluation(state.global_step, {"row": self.replica.row})
        self.log(
            f"epoch {state.epoch:>3.0f}  train loss {train_loss:.4f}  dev loss {loss:.4f}  "
            f"{task.primary} {value:.3f}{'  best so far' if better else ''}"
        )

    def save(self) -> None:
        """Write a checkpoint and mark it as complete, then remove the previous one."""
        step = self.state.global_step
        checkpoint = place.checkpoint_at(self.folder, step)
        checkpoint.mkdir(exist_ok=True)
        tensors = {"row": self.replica.row, "best": self.best}
        for index, leaf in enumerate(self.replica.parameters):
            for name, tensor in self.optimizer.state.get(leaf, {}).items():
                tensors[f"{index}.{name}"] = tensor
        content = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        content |= {} if self.average is None else self.average.state()
        write_whole(checkpoint / _WEIGHTS, dump_tensors(content))
        self.state.save_to_json(str(checkpoint / "trainer_state.json"))
        state = {"waited": self.waited, "scheduler": self.scheduler.state_dict()}
        write_whole(checkpoint / _STATE, json.dumps(state).encode())
        self.progress.write(self.folder)
        place.mark(self.folder, step, _digest(self.job), finished=self.ended)
        place.remove_checkpoints(self.folder, keep=(checkpoint,))
        self.saved = time.monotonic()

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""
        tensors = load_file(checkpoint / _WEIGHTS, device=str(self.pack.device))
        self.replica.row.copy_(tensors["row"])
        self.best = tensors["best"]
        if self.average is not None:
            self.average.restore(tensors)
        for index, leaf in enumerate(self.replica.parameters):
            # AdamW keeps the count of steps on the CPU
            found = {name: tensors[f"{index}.{name}"] for name in _ADAM if f"{index}.{name}" in tensors}
            if found:
                self.optimizer.state[leaf] = found | {"step": found["step"].cpu()}
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        self.waited = state["waited"]
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.log(f"going on from {checkpoint}")

    def fail(self, error: Exception) -> None:
        """Remove a run that cannot continue from the pack."""
        self.pack.remove(self.replica)
        self.lock.close()
        self.log(f"{type(error).__name__}: {error}")

    def finish(self, places: int) -> dict[str, Any]:
        """Leave the pack of `places` runs, test the best epoch, write everything, and return the record."""
        with self.lock:
            self.pack.remove(self.replica)
            own = dict(self.job.model.named_parameters())
            with torch.no_grad():
                for name, tensor in self.replica.tensors(self.best).items():
                    own[name].copy_(tensor)
            self.spend()
            final = finalize(
                *(self.trainer, self.job, self.state, self.average, self.log),
                test=lambda: scores(self.trainer, self.job),
                tensors=lambda mean: self.replica.tensors(mean["row"]),
            )
            self.spend("evaluation")
            record = finish(
                self.trainer,
                self.job,
                self.folder,
                self.state,
                self.progress,
                self.spend,
                self.log,
                packed={"places": places},
                **final,
            )
            self.log(summary(record, self.folder / RESULT))
        return record


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def _digest(job: Job) -> str:
    return hashlib.sha256(f"pack {_FORMAT} {job.digest}".encode()).hexdigest()


def sit(
    settings: RunSettings, pack: Pack | None, kept: SharedCache, equal: dict[str, Tensor], log: Callable[[str], None]
) -> PackedRun | dict[str, Any]:
    """Give a run a place in the pack, and return it. Return the record if the run has finished before.

    Args:
        settings: the settings of the run.
        pack: the pack; None makes a new one.
        kept: the cache of the runs of this process.
        equal: parameters that are known to equal the pack's base, by name. More are added.
        log: function that takes the lines of the run for the reader.
    """
    clock = time.monotonic()
    folder = Path(str(settings.output_dir))
    check_packable(settings)
    if (record := place.find_finished(settings, folder)) is not None:
        return record
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with contextlib.ExitStack() as lock, torch.random.fork_rng(devices):  # the run's seed must not change dropout
        job = prepare(settings, kept)
        lock.enter_context(place.locked(folder))
        if (record := place.find_finished(settings, folder)) is not None:  # another process may have finished it
            return record
        if pack is None:
            host: Any = copy.deepcopy(job.model)
            host.to(job.device)
            pack = Pack(host, settings.max_length, _decayed(job.model))
            host.train()
        share_base(job.model, pack.model, equal)
        progress = place.begin(settings, folder)
        trainer = make_trainer(job, folder, evaluated(job, "dev"))
        loader: Any = trainer.get_train_dataloader()
        loader.device = None  # batches go to the GPU after they are joined
        replica = pack.add(kept_values(job.model))
        try:
            optimizer, scheduler, steps = _optimizer(replica, trainer, len(loader))
            state = TrainerState(max_steps=steps, num_train_epochs=settings.epochs)
            seat = PackedRun(
                *(job, folder, progress, trainer, loader, pack, replica, optimizer, scheduler, state),
                lock=lock,
                log=log,
                best=replica.row,
                clock=clock,
                average=WeightAverage(settings.average) if settings.average else None,
            )
            last = place.newest_checkpoint(folder, _digest(job))
            if reason := place.reason_to_start_over(folder, progress, _digest(job)):
                log(f"starting over: {reason}")
            place.remove_checkpoints(folder, digest=_digest(job))
            if last is not None:
                seat.restore(last)
            seat.dev, seat.lengths = _dev_set(job, pack.device)
        except BaseException:
            pack.remove(replica)
            raise
        seat.lock = lock.pop_all()
    return seat


def check_packable(settings: RunSettings) -> None:
    """Raise `PackError` if a run cannot train in a pack."""
    if settings.gradient_checkpointing:
        raise PackError("gradient checkpointing and a pack exclude each other; pack fewer runs instead")
    if settings.train_tokens is not None:
        raise PackError("train_tokens and a pack exclude each other; a pack trains on whole batches")
    if settings.trainer is not None:
        raise PackError(
            f"trainer ({', '.join(settings.trainer)}) and a pack exclude each other; a pack has a training loop of its "
            "own, which Trainer's options do not reach"
        )
    if settings.rates is not None:
        raise PackError("rates and a pack exclude each other; all parts of a run in a pack have its learning_rate")


def share_base(model: PreTrainedModel, host: PreTrainedModel, equal: dict[str, Tensor]) -> None:
    """Replace a model's base by the host's base, which holds the same numbers, so that all runs share one base.

    Tensors in the memory of a tensor in `equal` are not compared again. Tensors that are found to be equal are added.

    Raises:
        RunError: the two bases differ.
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
    buffers = own_buffers(host)
    for name, buffer in own_buffers(model).items():
        if not torch.equal(buffer.to(buffers[name].device), buffers[name]):
            raise RunError(f"the fixed numbers of tuners of runs in one pack must be the same, and {name} differs")


def _decayed(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters with weight decay. Trainer's method does not use its `self`."""
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]


def _optimizer(replica: Replica, trainer: Trainer, steps_an_epoch: int) -> tuple[torch.optim.Optimizer, Any, int]:
    """Return Trainer's optimizer and schedule for a replica's leaves, and the number of all steps."""
    arguments = trainer.args
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    decays = ((replica.decayed, arguments.weight_decay), (replica.plain, 0.0))
    groups = [{"params": [leaf], "weight_decay": decay} for leaf, decay in decays if leaf.numel()]
    optimizer = kind(groups, **options)
    steps = math.ceil(arguments.num_train_epochs * steps_an_epoch)
    return optimizer, get_linear_schedule_with_warmup(optimizer, arguments.get_warmup_steps(steps), steps), steps


def _dev_set(job: Job, device: torch.device) -> tuple[dict[str, Tensor], list[int]]:
    """Return the dev set, padded once to its longest text, and the number of tokens of each row."""
    rows = job.splits["dev"]
    whole = Batches(rows, [range(len(rows))], DataCollatorWithPadding(job.tokenizer), job.model)[0]
    return {name: tensor.to(device) for name, tensor in whole.items()}, text_lengths(rows)
