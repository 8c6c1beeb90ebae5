"""The example of a submodule of one's own, and what `print` shows of a layer."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from helpers import tiny_bert

import unipelt
from unipelt.config import SUBMODULES
from unipelt.submodules.register import MODULES


def test_the_example_adds_gates_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        importlib.import_module("own_submodule").main()
    finally:
        del sys.modules["own_submodule"]  # the name is free again for other tests
        MODULES.pop(SUBMODULES.pop("shift"))
    shown = capsys.readouterr().out
    for line in ("(shift_value): FunctionTerm(", "gate=shift_down", "lora 4,096, shift 256", "shift_value 130"):
        assert line in shown


def test_a_layer_shows_all_that_is_added_in_one_block() -> None:
    model: Any = unipelt.inject(tiny_bert(), "unipelt-apl")
    lines = str(model.bert.encoder.layer[0]).splitlines()
    start = next(index for index, line in enumerate(lines) if line.strip().startswith("(unipelt): Room("))
    before, block = lines[:start], lines[start:]
    ours = ("Entry(", "Prefix(", "Adapter(", "LoRA(")
    assert not any(name in line for line in before for name in ours)
    assert all(any(name in line for line in block) for name in ours)
    assert any("rows: prefix, lora_query, lora_value, lora_query.A, lora_value.A" in line for line in block)
