"""Averages of a run's weights: the mean over its last evaluations, or an exponential moving average over its steps.

`torch.optim.swa_utils` computes both (stochastic weight averaging, Izmailov et al., 2018).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from unipelt.files.atomic import write_whole
from unipelt.runs import folder as place

FILE = "average.safetensors"
"""The file of a checkpoint that holds the state of the average."""


class WeightAverage:
    """The average of tensors that training changes. It is kept in float32 or wider.

    Attributes:
        kind: `last`, the mean of the tensors at the last N evaluations; or `ema`, `e <- d e + (1 - d) w` after every
            step, which starts at the tensors after the first step.
        value: N for `last`, d for `ema`.
        steps: for `last`, the steps of the evaluations whose tensors are in the mean.
    """

    def __init__(self, average: Mapping[str, float]) -> None:
        ((self.kind, self.value),) = average.items()
        self._ema: dict[str, Tensor] = {}
        self._update = get_ema_multi_avg_fn(self.value) if self.kind == "ema" else None
        self._last: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=int(self.value) if self.kind == "last" else 0)

    @property
    def steps(self) -> list[int]:
        """The steps of the evaluations whose tensors are in the mean; empty for `ema`."""
        return [step for step, _ in self._last]

    def after_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Enter the tensors after a training step, by name."""
        if self._update is None:
            return
        if not self._ema:
            self._ema = {name: _wide(tensor).clone() for name, tensor in tensors.items()}
            return
        held = {name: _wide(tensors[name]) for name in self._ema}
        self._ema = {name: tensor.to(held[name].device) for name, tensor in self._ema.items()}  # from a checkpoint
        self._update([*self._ema.values()], [*held.values()], 0)

    def after_evaluation(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Enter the tensors at an evaluation, after that many steps. The copies are on the CPU."""
        if self.kind == "last":
            self._last.append((step, {name: _wide(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}))

    def mean(self) -> dict[str, Tensor]:
        """Return the average by name. At least one step and one evaluation must have been entered."""
        if self.kind == "ema":
            return self._ema
        (_, first), *rest = self._last
        mean = {name: tensor.clone() for name, tensor in first.items()}
        enter: Any = get_swa_multi_avg_fn()
        for count, (_, tensors) in enumerate(rest, start=1):
            enter([*mean.values()], [tensors[name] for name in mean], count)
        return mean

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs, as tensors on the CPU by name."""
        found = {f"ema.0.{name}": tensor for name, tensor in self._ema.items()}
        for step, tensors in self._last:
            found |= {f"last.{step}.{name}": tensor for name, tensor in tensors.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of `state`. Tensors with other names are ignored."""
        self._ema = {}
        self._last.clear()
        by_step: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            step, _, name = rest.partition(".")
            if kind == self.kind == "ema":
                self._ema[name] = tensor
            elif kind == self.kind:
                by_step.setdefault(int(step), {})[name] = tensor
        self._last.extend(sorted(by_step.items()))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class AverageCallback(TrainerCallback):
    """Callback that averages the trained parameters of a run, and keeps the state in its checkpoints.

    Args:
        average: the average.
        model: the model of the run.
        folder: the folder of the run.
    """

    def __init__(self, average: WeightAverage, model: PreTrainedModel, folder: Path) -> None:
        self.average = average
        self.model = model
        self.folder = folder

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue from the checkpoint from which training continues."""
        if state.global_step:
            self.average.restore(read_average(place.checkpoint_at(self.folder, state.global_step)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Enter the weights after a step."""
        self.average.after_step(self._trained())

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Enter the weights of this checkpoint (a run writes one at every evaluation), and write the state into it."""
        self.average.after_evaluation(state.global_step, self._trained())
        checkpoint = place.checkpoint_at(self.folder, state.global_step)
        write_whole(checkpoint / FILE, dump_tensors(self.average.state()))

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def read_average(checkpoint: Path) -> dict[str, Tensor]:
    """Return the state of the average in a complete checkpoint."""
    return load_file(checkpoint / FILE)
