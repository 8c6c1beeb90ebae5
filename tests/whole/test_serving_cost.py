"""The script that counts the operations of serving several tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import serving_cost


def test_one_generation_needs_fewer_operations_than_one_for_each_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    serving_cost.main(["--random", "2x64", "--tasks", "3", "--methods", "lora,unipelt-al", "--output", str(record)])
    printed = capsys.readouterr().out
    ways = json.loads(record.read_text(encoding="utf-8"))["counts"]["3"]
    assert all(way in printed for way in ways)
    bare, together = ways["bare base"], ways["all tasks in one generation"]
    separate = ways["one generation for each task"]
    assert bare[0] < ways["all rows of one task, lora"][0] < together[0] < separate[0]
    assert separate[0] > 3 * bare[0]
    assert bare[1] < together[1] == separate[1], "each row is computed once in both"


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving_cost.parse(["--random", "2x64", "--rows", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
