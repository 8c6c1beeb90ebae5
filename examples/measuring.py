"""Measure one model: time, memory and operations of a training step and of inference.

This file needs PyTorch and Transformers only. `benchmark.py` imports this file. AdapterHub's UniPELT needs another
version of Transformers. For that model, `benchmark.py` starts `python measuring.py` in another interpreter. The new
process builds the model and times one pass for each request. A request and an answer are one line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from launches import launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCounter(TorchDispatchMode):
    """A counter of the ATen operations that run inside its block, also in the backward pass. Views do not count.

    Attributes:
        counts: the number of times that an operation ran, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def is_view(operation: Any) -> bool:
    """Return whether an operation only gives its argument's memory another shape, so that it launches no kernel."""
    if operation._schema.name == "aten::_unsafe_view":  # a view, although its schema does not declare one
        return True
    aliases = [value.alias_info for value in operation._schema.returns if value.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class LiveBytes(TorchDispatchMode):
    """A counter of the bytes of live tensors, for the operations that run inside its block.

    The count is the same on every machine and at every time. Memory that an operation allocates and frees inside itself
    does not count.

    Attributes:
        live: the bytes now.
        peak: the largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once, for as long as the memory is in use."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made


class Contender:
    """A model that takes turns with others.

    Args:
        model: a model in any state. A step trains its trainable parameters.
        batch: the arguments of the model; `labels` only in training.
        settings: device, precision and compile are read.
        clock: a function that returns a time in seconds.

    Attributes:
        deployed: the model for inference: the same model, or another form that was made for inference.
    """

    def __init__(
        self,
        model: Any,
        batch: Mapping[str, Tensor],
        settings: argparse.Namespace,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings, self.clock = settings, clock
        self.model = model.to(settings.device)
        self.batch = {name: tensor.to(settings.device) for name, tensor in batch.items()}
        self.inputs = {name: tensor for name, tensor in self.batch.items() if name != "labels"}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.fast = torch.compile(self.model) if settings.compile else self.model
        self.deployed = self.fast

    def deploy(self, model: Any) -> None:
        """Use another form of the model for inference."""
        model = model.to(self.settings.device).eval()
        self.deployed = torch.compile(model) if self.settings.compile else model

    def learn(self, call: Any) -> None:
        """Do the forward and the backward pass."""
        self.loss(call).backward()

    def loss(self, call: Any) -> Tensor:
        """Do the forward pass, and return the loss."""
        with self._autocast():
            loss: Tensor = call(**self.batch).loss
        return loss

    def step(self, call: Any) -> None:
        """Do a training step: forward, backward, clip, AdamW, and removal of the gradients."""
        self.learn(call)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self, call: Any) -> None:
        """Do a forward pass without gradients."""
        with torch.no_grad(), self._autocast():
            call(**self.inputs)

    def seconds(self, kind: str) -> float:
        """Return the seconds of one pass, `train` or `inference`."""
        self.model.train(kind == "train")
        self._wait()
        start = self.clock()
        if kind == "train":
            self.step(self.fast)
        else:
            self.infer(self.deployed)
        self._wait()
        return self.clock() - start

    def operations(self, kind: str) -> int:
        """Return the number of operations of a pass.

        The pass is forward in evaluation mode (`inference`), or forward and backward in training mode (`train`).
        """
        self.model.train(kind == "train")
        with OperationCounter() as counter:
            (self.learn if kind == "train" else self.infer)(self.model)
        self.optimizer.zero_grad()
        return counter.counts.total()

    def peak_bytes(self) -> int:
        """Return the peak memory, in bytes, of a training step after the first.

        The memory is that of weights, AdamW's state, gradients, saved tensors and temporary tensors.
        """
        self.model.train()
        self.step(self.fast)  # makes AdamW's state
        live = LiveBytes()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        for tensor in (*self.model.parameters(), *self.model.buffers(), *self.batch.values(), *states):
            live.add(tensor)
        if self.settings.device == "cpu":
            with live:
                self.step(self.model)
            return live.peak
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the other models' memory too
        self.step(self.fast)
        return torch.cuda.max_memory_allocated() - before + live.live

    def synchronisations(self) -> int | None:
        """Return how often a training step waits for the GPU, or None on a CPU."""
        if self.settings.device == "cpu":
            return None
        self.model.train()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step(self.model)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in seen)

    def _autocast(self) -> Any:
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()


def make_batch(config: Any, settings: argparse.Namespace) -> dict[str, Tensor]:
    """Return random texts with their mask and labels, the same each time. A text ends with the model's end token.

    The ids and the mask have the shape (batch_size, tokens), the labels (batch_size,).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.tokens)
    ids = torch.randint(5, config.vocab_size, shape, generator=generator)
    shortest = max(1.0, settings.tokens * (1 - 2 * settings.padding))
    lengths = torch.linspace(shortest, settings.tokens, settings.batch_size).round().long()[:, None]
    places = torch.arange(settings.tokens)
    end = getattr(config, "eos_token_id", None)  # in Transformers 5.0 some configurations have no such field
    if isinstance(end, int):
        ids = torch.where(ids == end, 4, ids).masked_fill(places == lengths - 1, end)
    mask = places < lengths
    labels = torch.randint(0, 2, shape[:1], generator=generator)
    return {"input_ids": ids.masked_fill(~mask, config.pad_token_id), "attention_mask": mask.long(), "labels": labels}


def describe(model: Any, config: Any, settings: argparse.Namespace, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Change a model into a method's model. Return the contender, and its operations, kernels, memory and waits."""
    batch = make_batch(config, settings)
    bare = Contender(model, batch, settings).operations("inference")
    contender = Contender(change(model), batch, settings)
    return contender, {
        "operations": {
            "forward": contender.operations("inference"),
            "train_step": contender.operations("train"),
            "frozen_forward": bare,
        },
        "launches": launches(contender, OperationCounter),
        "peak_bytes": contender.peak_bytes(),
        "synchronisations": contender.synchronisations(),
    }


def count_foreign(model: Any, base: int) -> dict[str, int | None]:
    """Return the parameters of another library's model.

    `trained` are the trained parameters inside the base model, and `head` are those outside it.
    """
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = sum(parameter.numel() for parameter in trained if id(parameter) not in inside)
    total = sum(parameter.numel() for parameter in trained)
    return {"trained": total - head, "deployed": None, "head": head, "base": base}


def write_record(settings: argparse.Namespace, seconds: Mapping[str, Any], **more: Any) -> None:
    """Write the settings, the seconds of each turn, code, packages and hardware to `settings.output`, as JSON."""
    from unipelt.files.atomic import write_whole
    from unipelt.runs.machine import describe_code, describe_hardware, describe_packages

    record = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "seconds": seconds,
        "code": describe_code(),
        "packages": describe_packages(),
        "hardware": describe_hardware(settings.device),
        **more,
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(settings.output, (json.dumps(record, indent=1) + "\n").encode())


def prepare(settings: argparse.Namespace) -> None:
    """Set the options of the whole process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.compile:  # the models share code; beyond the limit, variants run uncompiled without a warning
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 256
    torch.manual_seed(0)


def work() -> None:
    """Run in the other interpreter: build the model, then time one pass for each request."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout
    contender: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "seconds" in message:
                answer = {"seconds": contender.seconds(message["seconds"])}
            else:
                contender, answer = _start_adapterhub(message["config"], argparse.Namespace(**message["settings"]))
        except Exception as error:  # the other side reports any error
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _start_adapterhub(values: dict[str, Any], settings: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    import adapters

    prepare(settings)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=settings.attention)
    base = sum(parameter.numel() for parameter in model.base_model.parameters())

    def change(model: Any) -> Any:
        adapters.init(model)
        model.add_adapter("unipelt", config=adapters.UniPELTConfig())
        model.train_adapter("unipelt")
        return model

    contender, described = describe(model, config, settings, change)
    versions = {package.__name__: package.__version__ for package in (adapters, transformers, torch)}
    return contender, {**described, "parameters": count_foreign(contender.model, base), "packages": versions}


if __name__ == "__main__":
    work()
