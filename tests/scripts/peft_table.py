"""Try every type of the installed PEFT as a submodule, and write the table of the page.

Usage: peft_table.py [--page PAGE]   prints the table, or writes the page

A type works if, on a tiny BERT and a tiny Llama, its logits and gradients without a gate are those of PEFT's own model
with the same numbers, and with a gate those of PEFT's layers scaled by the gate. The costs are ATen operations of a
forward pass of a BERT with one layer and the tuner at the queries, as `measuring.OperationCounter` counts them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples"), str(TESTS.parent)]

import torch  # noqa: E402
from helpers import tiny_batch, tiny_bert  # noqa: E402
from measuring import OperationCounter  # noqa: E402
from peft_tuners import all_types, gap, injected, method_of, peft_model  # noqa: E402

import unipelt  # noqa: E402
from unipelt.config.peft_types import MIXES_ROWS, REFUSED  # noqa: E402
from unipelt.pack import Pack, PackError  # noqa: E402
from unipelt.submodules.room import placed_terms  # noqa: E402

TOLERANCE = 1e-6
GATE = 0.3


@dataclass
class Row:
    """The result for one type. The field `reason` is empty if the type works."""

    kind: str
    reason: str = ""
    merges: bool = False
    packs: bool = False
    operations: int = 0
    of_gate: int = 0


def try_type(kind: str) -> Row:
    """Try one type of PEFT's."""
    if kind in REFUSED:
        return Row(kind, REFUSED[kind])
    try:
        for family, gate in (("bert", None), ("llama", None), ("bert", GATE)):
            model = injected(kind, family, gate=gate)
            found = gap(model, peft_model(kind, family, model, gate=1.0 if gate is None else gate), family)
            if max(found) > TOLERANCE * (1 if gate is None else 10):  # the gate rounds once more
                return Row(kind, f"its numbers differ from PEFT's by {max(found):.0e} on {family}")
    except Exception as error:
        return Row(kind, " ".join(str(error).split())[:200])
    merges = all(placed.term.can_merge for placed in placed_terms(model))
    bare, plain, gated = (count_operations(kind, form) for form in ("bare", "plain", "gated"))
    return Row(kind, "", merges, packs(model), plain - bare, gated - plain)


def one_layer(kind: str, form: str) -> Any:
    """A BERT with one layer: `bare`, or with the tuner at the queries, `plain` or `gated`."""
    model = tiny_bert(num_hidden_layers=1)
    if form != "bare":
        method = method_of(kind, gated=form == "gated")
        method["peft"]["places"] = ["query"]
        unipelt.inject(model, method)
    return model.eval()


def count_operations(kind: str, form: str) -> int:
    """ATen operations of a forward pass without gradients."""
    model = one_layer(kind, form)
    with torch.no_grad():
        model(**tiny_batch())  # tuners may keep what a first pass computes
        with OperationCounter() as counting:
            model(**tiny_batch())
    return counting.counts.total()


def packs(model: Any) -> bool:
    """Whether runs with this tuner can train in one pack."""
    try:
        Pack(model, 9)
    except PackError:
        return False
    return True


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| type | works | merges | packs | operations | of a gate | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.reason:
            lines.append(f"| `{row.kind}` | no | | | | | {row.reason} |")
            continue
        notes = [f"it {MIXES_ROWS[row.kind]}"] if row.kind in MIXES_ROWS else []
        numbers = f"{row.operations} | {row.of_gate}"
        lines.append(
            f"| `{row.kind}` | yes | {_yes(row.merges)} | {_yes(row.packs)} | {numbers} | {'; '.join(notes)} |"
        )
    return "\n".join(lines)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def page(rows: Sequence[Row]) -> str:
    """The page of the table."""
    import peft

    working = [row for row in rows if not row.reason]
    return f"""# PEFT's types as submodules

<!-- written by tests/scripts/peft_table.py --page docs/peft-table.md -->

PEFT {peft.__version__} has {len(rows)} types, and {len(working)} of them work as [submodules](peft.md). On a tiny
BERT and a tiny Llama, their logits and gradients are those of PEFT's own model with the same numbers, to {TOLERANCE:g}.

- **merges**: `unipelt.merge` merges the tuner into the weights, and `unipelt.fold` does so with a constant gate.
- **packs**: several runs can train in [one pack](speed.md).
- **operations**: ATen operations that the tuner adds to a forward pass at one projection, without a gate.
- **of a gate**: operations that a gate adds to these. Its parameters are I + 1 at a projection with I inputs.

{table(rows)}
"""


def main() -> None:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [try_type(kind) for kind in all_types()]
    if options.page is None:
        print(table(rows))
    else:
        options.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
