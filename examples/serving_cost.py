"""Count the operations of serving several tasks at once: `python examples/serving_cost.py --random 4x128`.

Each of some tasks generates tokens for its rows: with the bare base, with one task for all rows, with all tasks in one
generation (`unipelt.Tasks.generate`), and with a generation for each task. The table has operations of PyTorch and
floating-point operations for one token of all rows, after the prompt. Counts are the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decoding import load
from measuring import OperationCounter, write_record
from torch.utils.flop_counter import FlopCounterMode

import unipelt


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a name on the hub of a causal language model")
    parser.add_argument("--random", default=None, help="instead of a model: a Llama of random weights, LAYERSxWIDTH")
    parser.add_argument("--methods", default="lora,unipelt-al,unipelt", help="the methods of the tasks, in turn")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4], help="numbers of tasks")
    parser.add_argument("--rows", type=int, default=2, help="rows of each task")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each text")
    parser.add_argument("--output", type=Path, default=Path("runs/serving.json"), help="the record")
    settings = parser.parse_args(argv)
    if (settings.model is None) == (settings.random is None):
        parser.error("give a model, or --random LAYERSxWIDTH")
    if min(settings.rows, settings.prompt, *settings.tasks) < 1:
        parser.error("--tasks, --rows and --prompt must be 1 or more")
    return settings


def count(generate: Callable[[int], Any]) -> tuple[int, int]:
    """Return the operations and the floating-point operations of one token.

    Args:
        generate: generates a number of tokens; the counts of 1 token are taken from those of 5.
    """
    found = []
    for tokens in (1, 5):
        with OperationCounter() as operations, FlopCounterMode(display=False) as flops:
            generate(tokens)
        found.append((sum(operations.counts.values()), flops.get_total_flops()))
    return (found[1][0] - found[0][0]) // 4, (found[1][1] - found[0][1]) // 4


def measure(settings: argparse.Namespace) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the counts by number of tasks and by way of serving."""
    settings.dtype = "float32"
    tasks = unipelt.Tasks(load(settings).eval())
    base: Any = tasks.model
    methods = [name.strip() for name in settings.methods.split(",")]
    for index in range(max(settings.tasks)):
        torch.manual_seed(index)
        tasks.add(f"task{index}", methods[index % len(methods)])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = {}
    for number in settings.tasks:
        names = list(tasks)[:number]
        ids = torch.randint(5, base.config.vocab_size, (number * settings.rows, settings.prompt))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        own = {"input_ids": ids[: settings.rows], "attention_mask": torch.ones_like(ids[: settings.rows]), **options}
        rows = names * settings.rows

        def separately(tokens: int, names: list[str] = names, own: dict[str, Any] = own) -> None:
            for name in names:
                tasks.generate(tasks=name, **own, max_new_tokens=tokens)

        ways: dict[str, Callable[[int], Any]] = {
            "bare base": lambda tokens, batch=batch: base.generate(**batch, max_new_tokens=tokens),  # type: ignore[misc]
            **{
                f"all rows of one task, {method}": lambda tokens, batch=batch, name=name: tasks.generate(  # type: ignore[misc]
                    tasks=name, **batch, max_new_tokens=tokens
                )
                for name, method in zip(names, methods, strict=False)
            },
            "all tasks in one generation": lambda tokens, batch=batch, rows=rows: tasks.generate(  # type: ignore[misc]
                tasks=rows, **batch, max_new_tokens=tokens
            ),
            "one generation for each task": separately,
        }
        ways["all tasks in one generation"](1)  # the shared base is built here
        found[str(number)] = {way: count(generate) for way, generate in ways.items()}
    return found


def table(counts: dict[str, dict[str, tuple[int, int]]], rows: int) -> str:
    """Return a Markdown table of the counts."""
    lines = ["| tasks x rows | way | operations | beside the base | MFLOP |", "| --- | --- | ---: | ---: | ---: |"]
    for number, ways in counts.items():
        bare = ways["bare base"][0]
        for way, (operations, flops) in ways.items():
            lines.append(f"| {number} x {rows} | {way} | {operations} | {operations / bare:.2f} | {flops / 1e6:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print the table, and write the record."""
    settings = parse(argv)
    settings.device = "cpu"
    with torch.no_grad():
        counts = measure(settings)
    write_record(settings, {}, counts=counts)
    print(table(counts, settings.rows))


if __name__ == "__main__":
    main()
