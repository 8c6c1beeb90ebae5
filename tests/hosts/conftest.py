"""Fixtures of the tests of hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _same_table() -> Iterator[None]:
    """Restore the table of families, which all tests of a process share."""
    from unipelt.hosts.families import FAMILIES

    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)
