"""Read a sweep file and return its runs: the product of its lists, each run once, narrowed to the values to keep."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from unipelt.config.schema import flatten
from unipelt.files.messages import show, suggest
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import shorten_name
from unipelt.runs.aliases import own_names
from unipelt.runs.options import lay_over, locate_path, read_config, read_option
from unipelt.runs.settings import INNER
from unipelt.sweep.seeds import SEEDS, expand, extend
from unipelt.sweep.space import OPTUNA, Search, corners, read_search, with_values

MOST_RUNS = 20_000
"""The largest number of runs in one block. A longer product is a mistake, and takes hours to build."""
_INNER = tuple(f"{name}." for name in INNER)


class SweepError(ValueError):
    """A sweep is not valid. The message says where, and lists the possible values. No run has started."""


@dataclass(frozen=True)
class Sweep:
    """The runs that a sweep file asks for.

    Attributes:
        path: the sweep file.
        runs: the runs, without duplicates, in the order of the file.
        chosen: the fields with several values in each cell. The report shows the value with the best dev score.
        search: the search for values of the chosen fields; None if the file lists the values. With a search, `runs`
            have no such values yet.
    """

    path: str
    runs: tuple[RunSettings, ...]
    chosen: tuple[str, ...] = ()
    search: Search | None = None

    def cell(self, settings: RunSettings) -> str:
        """Return the settings that all runs of a cell share, as JSON: without seeds and without chosen fields."""
        chosen = (*SEEDS, *self.chosen)
        values = {name: value for name, value in settings.identity().items() if name not in chosen}
        inside = [name.removeprefix("method.") for name in self.chosen if name.startswith("method.")]
        if inside:
            flat = flatten(values["method"])
            values["method"] = {name: value for name, value in flat.items() if name not in inside}
        for head in INNER:
            if head in values:
                inner = values[head].items()
                values[head] = {name: value for name, value in inner if f"{head}.{name}" not in chosen}
        return json.dumps(values, sort_keys=True)


def read_sweep(
    path: str | Path, narrow: Mapping[str, Sequence[str]] | None = None, override: Mapping[str, str] | None = None
) -> Sweep:
    """Read a sweep file.

    Args:
        path: a YAML or JSON file with `grid` (a list of blocks; each block is the product of its lists). Optional keys
            are `choose` (values to try in each cell, or `optuna`, with `trials` and `space`), `base`, and fields that
            all runs share.
        narrow: by field, the values to keep. A method is given by its `method_name` or by its preset. Seeds that the
            grid lacks are added to its blocks. A range such as `6-15` stands for its seeds, here and in the file.
        override: by field, the new value for all runs, as on the command line. A field that the grid lists takes the
            values to keep instead, separated by commas. `trainer.NAME` and `rates.PART` are fields too, here and in the
            grid.

    Raises:
        SweepError: a field, a value or a run is not valid, or a value to keep is not in the sweep.
    """
    try:
        return _read_sweep(Path(path), dict(narrow or {}), dict(override or {}))
    except SweepError:
        raise
    except (ValueError, OSError) as error:
        raise SweepError(str(error)) from error


def split_list(text: str) -> list[str]:
    """Split a list at its commas, except commas inside a value: `lora,prefix, prefix.length=50` has two values."""
    return re.split(r",(?!\s*[\w.]+=)(?![^\[]*\])", text)


def _read_sweep(path: Path, narrow: dict[str, Sequence[str]], override: dict[str, str]) -> Sweep:
    common = read_config(path, RunSettings, also=("grid", "choose", "trials", "space"))
    grid, choose = common.pop("grid", None), common.pop("choose", {})
    trials, space = common.pop("trials", None), common.pop("space", None)
    search = read_search(path, trials, space) if choose == OPTUNA else None
    if search is not None:
        choose = {}
    elif trials is not None or space is not None:
        raise SweepError(f"{path}: trials and space go with choose: {OPTUNA}; write that, or leave them out")
    if not isinstance(grid, list) or not grid or not all(isinstance(block, dict) and block for block in grid):
        raise SweepError(f"{path}: grid must be a list of blocks, each a mapping of fields to lists of values")
    if not isinstance(choose, dict):
        raise SweepError(
            f"{path}: choose must be a mapping of fields to lists of values or {OPTUNA}, not {show(choose)}"
        )
    grid, choose = [_own(block) for block in grid], _own(choose)
    listed = {name for block in [*grid, choose] for name in block}
    _check_fields(path, [*common, *listed])
    if any(set(block) & set(choose) for block in grid):
        raise SweepError(f"{path}: a field can stand in grid or in choose, not in both")
    for name in list(override):
        if name in listed:
            narrow[name] = [*narrow.get(name, ()), *split_list(override.pop(name))]
        elif name.startswith(_INNER) and (head := name.partition(".")[0]) in listed:
            raise SweepError(f"{path} lists {head} as a whole, so {name} cannot be given for all runs; change the file")
    common = lay_over(common, {name: read_option(name, text, RunSettings) for name, text in override.items()})
    for name in SEEDS:
        narrow[name] = [str(seed) for seed in expand(narrow.get(name, ()), name)]
    if "seed" not in choose:
        grid = extend(grid, common, [int(text) for text in narrow["seed"] if text.strip().isdigit()])

    runs: dict[str, RunSettings] = {}
    for number, block in enumerate(grid, start=1):
        for values in _product(path, {**block, **choose}):
            try:
                settings = RunSettings(**lay_over(common, values))
            except (ValueError, OSError) as error:
                raise SweepError(f"{path}, block {number} of the grid: {error}") from error
            runs.setdefault(settings.digest(), settings)
    kept = _keep(tuple(runs.values()), narrow)
    if search is not None:
        _check_search(path, search, kept, [*listed, *override])
    return Sweep(str(path), kept, tuple(choose if search is None else search.space), search)


def _check_search(path: Path, search: Search, runs: Sequence[RunSettings], given: Sequence[str]) -> None:
    """Check that every value of a search makes valid settings, with every run."""
    _check_fields(path, [name for name in search.space if not name.startswith("method.")])
    for name in search.space:
        if name in given or (name.startswith("method.") and name.count(".") < 2) or name in ("method", "task", *SEEDS):
            raise SweepError(f"{path}: space: {name} cannot be searched, as it is given, or is no rate and no size")
    for run in {run.method_name: run for run in runs}.values():
        if not search.of(run):
            raise SweepError(f"{path}: no field of space is a field of {run.method_name}; add one, or leave it out")
        for values in corners(search, run):
            try:
                with_values(run, values)
            except (ValueError, OSError) as error:
                raise SweepError(f"{path}: space: {error}") from error


def _own(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block by this library's names of fields, with its ranges of seeds expanded."""
    found = own_names(block, RunSettings)
    for name in SEEDS:
        if name in found:
            found[name] = expand(found[name] if isinstance(found[name], list) else [found[name]], name)
    return found


def _check_fields(path: Path, names: Sequence[str]) -> None:
    known = [item.name for item in fields(RunSettings) if item.name not in ("output_dir", "overwrite")]
    for name in names:
        if name not in known and not name.startswith(_INNER):
            meant = suggest(name, known, "see unipelt sweep --help")
            raise SweepError(f"{path}: unknown field {show(name)} of a sweep; {meant}")


def _product(path: Path, block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in block.values()]
    for name, values in zip(block, lists, strict=True):
        if not values:
            raise SweepError(f"{path}: the list of {name} is empty")
    if (runs := math.prod(map(len, lists))) > MOST_RUNS:
        raise SweepError(f"{path}: a block of the grid asks for {runs:,} runs; more than {MOST_RUNS:,} are not meant")
    for chosen in itertools.product(*lists):
        yield {name: _located(name, value, path) for name, value in zip(block, chosen, strict=True)}


def _located(name: str, value: Any, path: Path) -> Any:
    """Return the value. A path in a sweep file is located as in any other configuration file."""
    is_path = name.endswith(("_file", "_dir")) or (name == "method" and str(value).endswith((".json", ".yaml", ".yml")))
    return locate_path(value, path) if is_path and isinstance(value, str) else value


def _keep(runs: tuple[RunSettings, ...], narrow: Mapping[str, Sequence[str]]) -> tuple[RunSettings, ...]:
    for name, texts in narrow.items():
        if not texts:
            continue
        kept: set[int] = set()
        for text in texts:
            wanted = _wanted(name, text)
            # the whole name comes first, so that "prefix" does not also select "prefix, prefix.length=50"
            found = [id(settings) for settings in runs if _value(settings, name) == wanted] or [
                id(settings) for settings in runs if name == "method" and settings.method_name.startswith(f"{wanted},")
            ]
            if not found:
                there = dict.fromkeys(str(_shown(settings, name)) for settings in runs)
                meant = suggest(text.strip(), there, f"there is {'; '.join(there)}")
                raise SweepError(f"no run that is left has the {name} {text.strip()!r}; {meant}")
            kept.update(found)
        runs = tuple(settings for settings in runs if id(settings) in kept)
    return runs


def _shown(settings: RunSettings, name: str) -> Any:
    value = settings.method_name if name == "method" else _value(settings, name)
    return "all" if name == "train_samples" and value is None else value


def _value(settings: RunSettings, name: str) -> Any:
    if name.startswith(_INNER):
        head, _, inner = name.partition(".")
        return (getattr(settings, head) or {}).get(inner)
    return settings.method_name.replace(" ", "") if name == "method" else getattr(settings, name)


def _wanted(name: str, text: str) -> Any:
    text = text.strip()
    if name == "method":
        return text.replace(" ", "")
    if name == "task":
        return shorten_name(text)
    return None if (name, text) == ("train_samples", "all") else read_option(name, text, RunSettings)
