"""The table of PEFT's types on its page is what the installed PEFT does."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
from peft_tuners import all_types
from scripts.peft_table import page, try_type

from unipelt.config.peft_types import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of types that warn
PAGE = Path(__file__).parents[2] / "docs" / "peft-table.md"


def rows() -> dict[str, str]:
    """The lines of the table by type."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` .*$", PAGE.read_text("utf-8"), re.M)}


@pytest.fixture(autouse=True)
def _of_this_version() -> None:
    if f"PEFT {peft.__version__} has" not in PAGE.read_text("utf-8"):
        pytest.skip(f"the table is of another PEFT than {peft.__version__}; tests/scripts/peft_table.py writes it")


def test_every_type_has_a_row_and_every_refusal_its_reason() -> None:
    found = rows()
    assert sorted(found) == all_types()
    for kind, line in found.items():
        assert (" | no | " in line and REFUSED[kind] in line) if kind in REFUSED else "| yes |" in line
    assert sum("` | yes |" in line for line in found.values()) >= 28


@pytest.mark.slow
def test_the_page_is_what_the_script_writes() -> None:
    assert page([try_type(kind) for kind in all_types()]) == PAGE.read_text("utf-8")
