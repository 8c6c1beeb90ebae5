"""Read ranges of seeds, such as `6-15`, and extend the blocks of a grid by new seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SEEDS = ("seed", "data_seed")
"""The fields that take ranges. They may differ between the runs of a cell."""
MOST_SEEDS = 10_000
"""The largest number of seeds in one range. A longer range is a mistake."""
_RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")


def expand(values: Sequence[Any], name: str) -> list[Any]:
    """Return the values with each range replaced by its seeds: `["1-3", 8]` becomes `[1, 2, 3, 8]`.

    Raises:
        ValueError: a range ends before it begins, or is longer than `MOST_SEEDS`.
    """
    found: list[Any] = []
    for value in values:
        ends = _RANGE.fullmatch(value) if isinstance(value, str) else None
        if ends is None:
            found.append(value)
            continue
        first, last = int(ends[1]), int(ends[2])
        if last < first:
            raise ValueError(f"{name}: the range {value.strip()} ends before it begins; write {last}-{first}")
        if last - first >= MOST_SEEDS:
            raise ValueError(
                f"{name}: the range {value.strip()} has more than {MOST_SEEDS:,} seeds; write a shorter one"
            )
        found += range(first, last + 1)
    return found


def extend(
    blocks: Sequence[Mapping[str, Any]], common: Mapping[str, Any], wanted: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the blocks of a grid with the seeds of `wanted` that no block has.

    Args:
        blocks: the blocks; a block without `seed` has the common seed.
        common: the fields that all runs share.
        wanted: the seeds to have. Those that a block already has are not added to the other blocks.

    Returns:
        The blocks, each with its own seeds and the new ones.
    """
    own = []
    for block in blocks:
        seeds = block.get("seed", common.get("seed", 1))
        own.append(list(seeds) if isinstance(seeds, list) else [seeds])
    new = [seed for seed in wanted if not any(seed in seeds for seeds in own)]
    if not new:
        return [dict(block) for block in blocks]
    return [{**block, "seed": [*seeds, *new]} for block, seeds in zip(blocks, own, strict=True)]
