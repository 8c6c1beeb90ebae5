"""Measure the time that a pack saves: `python examples/packing.py` (see `--help`).

The program times a step of R runs at once beside R steps of one run. The model is a BERT with random weights. All take
turns; a ratio is taken within a turn. From the time of a step the program estimates the hours of training for all runs
of the paper's Table 1, without evaluation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_record
from torch import Tensor, nn

SERIES, SIZES, EPOCHS = 8 * 5 * 7, (100, 500, 1000), 50
"""Of `configs/table1.yaml`: tasks times seeds times methods (without its longer prefix), numbers of texts, and most
epochs.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", default="unipelt-apl", help="a preset, or the path of a configuration")
    parser.add_argument("--runs", default="1,5,20", help="runs at once, with commas")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--hidden", type=int, default=768, help="width of the model")
    parser.add_argument("--batch_size", type=int, default=16, help="texts of one run")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text")
    parser.add_argument("--turns", type=int, default=10, help="turns that count, behind two that do not")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 is autocast")
    parser.add_argument("--output", type=Path, default=Path("runs/packing.json"), help="the record")
    settings = parser.parse_args(argv)
    for name in ("layers", "hidden", "batch_size", "tokens", "turns"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    words = settings.runs.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        parser.error("--runs are whole numbers above 0, with commas")
    settings.runs = [int(word) for word in words]
    return settings


class Steps:
    """Training steps of one model alone, and of packs of the model."""

    def __init__(self, settings: argparse.Namespace) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        import unipelt

        self.settings = settings
        torch.manual_seed(0)
        config = BertConfig(
            num_hidden_layers=settings.layers,
            hidden_size=settings.hidden,
            num_attention_heads=max(1, settings.hidden // 64),
            intermediate_size=4 * settings.hidden,
            max_position_embeddings=max(512, settings.tokens),
        )
        self.model: Any = unipelt.inject(BertForSequenceClassification(config), settings.method)
        self.model.to(settings.device).train()
        shape = (settings.batch_size, settings.tokens)
        ids = torch.randint(5, config.vocab_size, shape)
        self.batch = {"input_ids": ids.to(settings.device), "attention_mask": torch.ones_like(ids).to(settings.device)}
        self.labels = (torch.arange(settings.batch_size) % 2).to(settings.device)

    def alone(self) -> Any:
        """Return a function that does a step of one model alone."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step() -> None:
            with self._autocast():
                loss = nn.functional.cross_entropy(self.model(**self.batch).logits.float(), self.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def packed(self, runs: int) -> Any:
        """Return a function that does a step of `runs` runs at once."""
        from unipelt.pack import Pack, kept_values, losses

        pack = Pack(self.model, tokens=self.settings.tokens)
        values = kept_values(self.model)
        replicas = [pack.add(values) for _ in range(runs)]
        optimizers = [torch.optim.AdamW(replica.parameters, lr=1e-5) for replica in replicas]
        batch = {name: torch.stack([tensor] * runs) for name, tensor in self.batch.items()}
        labels: Tensor = torch.stack([self.labels] * runs)
        real = torch.ones_like(labels, dtype=torch.bool)

        def step() -> None:
            with self._autocast():
                logits = pack(batch)
            pack.backward(losses(logits, labels, real))
            for replica, optimizer in zip(replicas, optimizers, strict=True):
                nn.utils.clip_grad_norm_(replica.parameters, 1.0)
                optimizer.step()

        return step

    def seconds(self, step: Any) -> float:
        """Return the seconds of a step."""
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _autocast(self) -> Any:
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()


def measure(settings: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each turn, for `alone` and for each number of runs at once."""
    steps = Steps(settings)
    todo = {"alone": steps.alone(), **{str(runs): steps.packed(runs) for runs in settings.runs}}
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(settings.turns + 2):
        for name, step in todo.items():
            took = steps.seconds(step)
            if turn > 1:
                seconds[name].append(took)
    return seconds


def hours(step: float, batch_size: int) -> float:
    """Return the hours of training for all runs of Table 1, if a step of one run takes `step` seconds."""
    return SERIES * sum(math.ceil(size / batch_size) for size in SIZES) * EPOCHS * step / 3600


def table(seconds: dict[str, list[float]], batch_size: int) -> str:
    """Return a Markdown table: milliseconds per step of one run, the ratio to one run alone, and hours for Table 1."""
    lines = [
        "| runs at once | ms a step of one run | beside one at a time (quartiles) | hours of training, Table 1 |",
        "| --- | ---: | ---: | ---: |",
    ]
    alone = np.array(seconds["alone"])
    for name, values in seconds.items():
        each = np.array(values) / (1 if name == "alone" else int(name))
        low, median, high = np.percentile(each / alone, [25, 50, 75])
        shown = "one, without a pack" if name == "alone" else name
        step = float(np.median(each))
        lines.append(
            f"| {shown} | {1e3 * step:.1f} | {median:.2f} ({low:.2f} to {high:.2f}) | {hours(step, batch_size):.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the record."""
    settings = parse(argv)
    seconds = measure(settings)
    peak = torch.cuda.max_memory_allocated() if settings.device == "cuda" else None
    write_record(settings, seconds, peak_bytes=peak)
    print(table(seconds, settings.batch_size))
    print(f"\nthe record is {settings.output}")


if __name__ == "__main__":
    main()
