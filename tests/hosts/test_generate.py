"""The command that writes the table of families."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from unipelt.hosts import generate, table
from unipelt.hosts.description import OWN_ATTENTION
from unipelt.hosts.table import read_table


def test_the_command_writes_the_types_that_it_describes_and_the_reasons_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    monkeypatch.setattr(generate, "TABLE", file)
    monkeypatch.setattr(table, "TABLE", file)
    monkeypatch.setattr(generate, "text_types", lambda: ["rwkv", "roformer"])
    monkeypatch.setattr(sys, "argv", ["generate"])
    generate.main()
    written = file.read_text(encoding="utf-8")
    data = json.loads(written)
    assert written.endswith("}\n")
    assert data["transformers"] == transformers.__version__
    assert data["without"] == {
        "rwkv": "RwkvForCausalLM has no attention: no softmax over tokens was found in its layers"
    }
    found = read_table()
    assert list(found) == ["roformer"]
    roformer = found["roformer"]
    assert roformer.stacks[0].cross is not None, "the attention to an encoder is in another configuration"
    assert roformer.refused == {"prefix": OWN_ATTENTION}
    assert capsys.readouterr().out == f"1 families, 1 without a description: {file}\n"
