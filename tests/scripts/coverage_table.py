"""Count how many model types of Transformers take which method, for every type with every head, and write the page.

Usage: PYTHONPATH=tests python tests/scripts/coverage_table.py [OPTIONS] [TYPE...]

The counts are printed, with the reasons where a method fails. `--counts` writes them to a file, for another version's
page; `--others` puts such files' counts on the page.

The models are small and random. A type passes with a head if a method does all that `architecture_checks.py` checks.
The fullest method is tried first: adapter, prefix and LoRA (`unipelt-apl`), then adapter and LoRA (`unipelt-al`), then
LoRA alone, then a gated adapter alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from architecture_checks import PROPERTIES, batch_of, check, method_config

from unipelt.hosts.description import Family
from unipelt.hosts.families import family_of
from unipelt.hosts.generate import HEADS, small_of

METHODS = ("unipelt-apl", "unipelt-al", "lora", "adapter")
TITLES = {
    "CausalLM": "causal",
    "SequenceClassification": "sequence classification",
    "MaskedLM": "masked",
    "Seq2SeqLM": "sequence to sequence",
    "ImageTextToText": "images and text",
}
TAKES = {
    "unipelt-apl": "adapter, prefix, LoRA",
    "unipelt-al": "adapter, LoRA",
    "lora": "LoRA",
    "adapter": "adapter",
    "": "nothing",
}
BEHIND = {
    "feed_forward": "",
    "attention": "its layers have no feed-forward network of their own: the adapter is behind the attention",
    "mixer": "its layers have no feed-forward network: the adapter is behind the state-space layer",
}


@dataclass
class Result:
    """The result of a type with a head.

    Attributes:
        kind, head: the model type, and the end of the name of its `AutoModelFor...`.
        method: the fullest method that passes; empty if none does.
        reason: why no fuller method passes.
        remarks: facts about the places of the submodules.
        properties: the properties of `PROPERTIES` that the bare model has, and that it keeps with the method.
    """

    kind: str
    head: str
    method: str
    reason: str
    remarks: list[str] = field(default_factory=list)
    properties: list[str] = field(default_factory=list)


def try_type(kind: str, head: str) -> Result:
    """Try the methods on a small model of a type, until one passes."""
    try:
        model = small_of(kind, head)
        family = family_of(model)
    except Exception as error:
        return Result(kind, head, "", _short(str(error)))
    reasons: list[str] = []
    for method in METHODS:
        properties: list[str] = []
        reason = _refusal(family, method)
        if not reason:
            reason, properties = _try(method, kind, head, family)
        if not reason:
            return Result(kind, head, method, next(iter(reasons), ""), _remarks(family, method), properties)
        reasons.append(reason)
    return Result(kind, head, "", reasons[-1])


def _short(message: str) -> str:
    return " ".join(message.partition("Describe them by")[0].split("did not find one: ")[-1].split())[:220]


def _refusal(family: Family, method: str) -> str:
    config = method_config(method)
    return next((f"no {name}: {why}" for name, why in family.refused.items() if config.part(name) is not None), "")


def _try(method: str, kind: str, head: str, family: Family) -> tuple[str, list[str]]:
    """Return why a method fails, or an empty string for a method that passes; and the properties that it keeps."""
    try:
        model = small_of(kind, head)
        return "", check(model, small_of(kind, head), method, head, batch_of(model, head, family))
    except Exception as error:
        return f"{type(error).__name__}: {_short(str(error))}", []


def _remarks(family: Family, method: str) -> list[str]:
    """Return what a reader should know about the places of the submodules."""
    found: dict[str, None] = {}
    for stack in family.stacks:
        if method != "lora" and BEHIND[stack.adapted]:
            found[BEHIND[stack.adapted]] = None
        elif stack.missing:
            where = "in some layers" if stack.up or stack.down else ""
            why = next(iter(stack.missing.values()))
            found[" ".join(f"no LoRA in the feed-forward network {where}".split()) + f": {why}"] = None
    return list(found)


def count(results: list[Result]) -> dict[str, dict[str, int]]:
    """Return the numbers of types, by the head's title and then by the column of the summary."""
    counts = {}
    for head, title in TITLES.items():
        own = [result for result in results if result.head == head]
        found = Counter(result.method for result in own)
        counts[title] = {
            "model types": len(own),
            "adapter and LoRA": found["unipelt-apl"] + found["unipelt-al"],
            "and a prefix": found["unipelt-apl"],
            "LoRA alone": found["lora"],
            "adapter alone": found["adapter"],
            "nothing": found[""],
        } | {name: sum(name in result.properties for result in own) for name in PROPERTIES}
    return counts


def summary(version: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Return the lines of one version's table of counts."""
    columns = list(next(iter(counts.values())))
    lines = [
        f"Transformers {version}:",
        "",
        f"| head | {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * (1 + len(columns)))} |",
    ]
    return [*lines, *(f"| {title} | {' | '.join(map(str, row.values()))} |" for title, row in counts.items()), ""]


def page(results: list[Result], others: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        why = "; ".join(filter(None, (result.reason, *result.remarks)))
        rows.setdefault((result.kind, result.method, why), []).append(TITLES[result.head])
    lines = [
        "# What each architecture takes",
        "",
        "<!-- written by tests/scripts/coverage_table.py --page docs/architectures-table.md "
        "--others tests/data/architectures-5.0.0.json -->",
        "",
        f"Every architecture of Transformers {transformers.__version__}, if it reads text, is tried on a small random "
        "model. A method goes in, changes the",
        "output and gets gradients. Everything else is frozen. The method is saved, loads to the same output, and is",
        "removed bit for bit. The last three columns of the counts are numbers of models that give the same with and",
        "without padding, that are causal, and that give the same with and without a cache. A model that has such a",
        "property without the method has it with the method. The descriptions are found by",
        "[inspection](architectures.md#an-architecture-that-is-not-in-the-table). In models that also read images or",
        "sound, the text part gets the submodules.",
        "",
        *summary(transformers.__version__, count(results)),
    ]
    for version, counts in sorted(others.items()):
        lines += summary(version, counts)
    lines += ["| `model_type` | heads | takes | why not more, and remarks |", "| --- | --- | --- | --- |"]
    for (kind, method, why), heads in sorted(rows.items()):
        lines.append(f"| `{kind}` | {', '.join(heads)} | {TAKES[method]} | {why.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the types, print the results, and write the page and the counts if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="where to write the page")
    parser.add_argument("--counts", type=Path, help="where to write the counts, as JSON")
    parser.add_argument("--others", type=Path, nargs="+", default=[], help="counts of other versions, for the page")
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
            if len(results) % 20 == 0:
                gc.collect()
                gc.freeze()  # what is left is Transformers' own code, which the next collections need not look at
            if result.reason:
                print(head, kind, result.method or "nothing", result.reason, sep="\t", flush=True)
    counts = count(results)
    print("\n".join(summary(transformers.__version__, counts)))
    if arguments.counts:
        arguments.counts.write_text(json.dumps({transformers.__version__: counts}, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        others: dict[str, Any] = {}
        for file in arguments.others:
            others |= json.loads(file.read_text(encoding="utf-8"))
        arguments.page.write_text(page(results, others), encoding="utf-8")


if __name__ == "__main__":
    main()
