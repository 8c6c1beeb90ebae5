"""Count how many model types of Transformers take which method, for every type with every head, and write the page.

Usage: coverage_table.py [--page PAGE] [TYPE...]   prints the counts, and the reasons where a method fails

The models are small and random. A type passes with a head if a method can be injected, changes the output, gets
gradients everywhere, can be saved, loads to the same output, and can be removed bit for bit. The fullest method is
tried first: adapter, prefix and LoRA (`unipelt-apl`), then adapter and LoRA (`unipelt-al`), then LoRA alone.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import unipelt
from unipelt.hosts.description import Family
from unipelt.hosts.families import family_of
from unipelt.hosts.generate import HEADS, small_of
from unipelt.hosts.probe import text_batch
from unipelt.submodules.room import own_parameters

PARTS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3, "alpha": 6.0},
}
METHODS = ("unipelt-apl", "unipelt-al", "lora")
TITLES = {
    "CausalLM": "causal",
    "SequenceClassification": "sequence classification",
    "MaskedLM": "masked",
    "Seq2SeqLM": "sequence to sequence",
}


@dataclass
class Result:
    """The result of a type with a head: the fullest method that passes ("" if none), and why no fuller one passes."""

    kind: str
    head: str
    method: str
    reason: str


def try_type(kind: str, head: str) -> Result:
    """Try the methods on a small model of a type, until one passes."""
    try:
        model = small_of(kind, head)
        family = family_of(model)
    except Exception as error:
        return Result(kind, head, "", _short(str(error)))
    reasons: list[str] = []
    for method in METHODS:
        reason = _refusal(family, method) or _try(method, kind, head, family)
        if not reason:
            return Result(kind, head, method, next(iter(reasons), ""))
        reasons.append(reason)
    return Result(kind, head, "", reasons[-1])


def _short(message: str) -> str:
    return " ".join(message.partition("Describe them by")[0].split("did not find one: ")[-1].split())[:220]


def _refusal(family: Family, method: str) -> str:
    config = unipelt.resolve(method)
    return next((f"no {name}: {why}" for name, why in family.refused.items() if config.part(name) is not None), "")


def _try(method: str, kind: str, head: str, family: Family) -> str:
    """Return why a method fails, or an empty string for a method that passes."""
    try:
        model = small_of(kind, head)
        _check(model, small_of(kind, head), method, _batch(model, head, family))
    except Exception as error:
        return f"{type(error).__name__}: {_short(str(error))}"
    return ""


def _batch(model: Any, head: str, family: Family) -> dict[str, Any]:
    signature = inspect.signature(model.forward).parameters
    stack = family.stacks[0]
    crosses = len(family.stacks) == 1 and stack.cross is not None and "input_ids" in signature
    there = crosses and any(stack.cross is not None and stack.cross.path in name for name, _ in model.named_modules())
    return text_batch(model, crossing=there, two=head in ("Seq2SeqLM", "MaskedLM"))


def _check(model: Any, other: Any, method: str, batch: dict[str, Any]) -> None:
    """Raise an error unless a method does everything that the page says."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = _output(model, batch)
    if not bare.isfinite().all():
        raise AssertionError("the small model's own output is not finite")
    config = unipelt.resolve(method)
    unipelt.inject(model, config.updated({name: part for name, part in PARTS.items() if config.part(name)}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    out = _first(model, batch)
    if torch.allclose(out, bare):
        raise AssertionError("the output does not change")
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    for name, parameter in own_parameters(model).items():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise AssertionError(f"{name} gets no gradient")
    want = _output(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        unipelt.save(model, folder)
        unipelt.load(other, folder)
    if not torch.equal(_output(other, batch), want):
        raise AssertionError("what was loaded gives another output")
    unipelt.remove(model)
    after = model.state_dict()
    if list(after) != list(before) or not all(torch.equal(tensor, before[name]) for name, tensor in after.items()):
        raise AssertionError("the model is another after removal")
    if not torch.equal(_output(model, batch), bare):
        raise AssertionError("the output is another after removal")


def _first(model: Any, batch: dict[str, Any]) -> Tensor:
    out = model(**batch)
    logits: Tensor = out["logits"] if "logits" in out else out[0]
    return logits


@torch.no_grad()
def _output(model: Any, batch: dict[str, Any]) -> Tensor:
    return _first(model, batch)


def summary(results: list[Result]) -> list[str]:
    """Return a line for each head, with the number of types that take each method."""
    lines = []
    for head, title in TITLES.items():
        found = Counter(result.method for result in results if result.head == head)
        total = sum(found.values())
        both = found["unipelt-apl"] + found["unipelt-al"]
        lines.append(f"| {title} | {total} | {both} | {found['unipelt-apl']} | {found['lora']} | {found['']} |")
    return lines


def page(results: list[Result]) -> str:
    """Return the page of the documentation."""
    takes = {
        "unipelt-apl": "adapter, prefix, LoRA",
        "unipelt-al": "adapter, LoRA",
        "lora": "LoRA",
        "": "nothing",
    }
    rows: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        rows.setdefault((result.kind, result.method, result.reason), []).append(TITLES[result.head])
    lines = [
        "# What each architecture takes",
        "",
        "<!-- written by tests/scripts/coverage_table.py --page docs/architectures-table.md -->",
        "",
        f"Every text architecture of Transformers {transformers.__version__}, tried on a small random model: a method "
        "goes in, moves the output,",
        "gets gradients, saves, loads to the same output, and comes out again bit for bit. The descriptions are",
        "found by [inspection](architectures.md#an-architecture-that-is-not-in-the-table).",
        "",
        "| head | model types | adapter and LoRA | and a prefix | LoRA alone | nothing |",
        "| --- | --- | --- | --- | --- | --- |",
        *summary(results),
        "",
        "| `model_type` | heads | takes | why not more |",
        "| --- | --- | --- | --- |",
    ]
    for (kind, method, reason), heads in sorted(rows.items()):
        lines.append(f"| `{kind}` | {', '.join(heads)} | {takes[method]} | {reason.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the types, print the results, and write the page if `--page` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="where to write the page")
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = []
    for head, kinds in HEADS.items():
        for kind in kinds:
            if arguments.types and kind not in arguments.types:
                continue
            result = try_type(kind, head)
            results.append(result)
            gc.collect()
            if result.reason:
                print(head, kind, result.method or "nothing", result.reason, sep="\t", flush=True)
    print("\n".join(summary(results)))
    if arguments.page:
        arguments.page.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
