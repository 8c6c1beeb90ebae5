"""The space of a search: which fields it varies, between which values, and in how many trials."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from unipelt.files.messages import show, suggest
from unipelt.glue.settings import RunSettings
from unipelt.runs.options import lay_over
from unipelt.runs.settings import with_numbers

OPTUNA = "optuna"
"""The value of `choose` in a sweep file that asks for a search."""
_LIMITS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Dimension:
    """The values of one field: a list of choices, or a range of numbers.

    Attributes:
        choices: the values to choose from; empty for a range.
        low: the least value of a range. Two whole numbers make a range of whole numbers.
        high: the largest value of a range.
        log: whether values are drawn evenly by their logarithm.
        step: the distance of the values of a range; None for any value.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to check before a search: all choices, or both ends of a range."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that a trial of Optuna suggests."""
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log, step=int(self.step or 1))
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Search:
    """A search for the values of some fields, in each cell of a sweep.

    Attributes:
        trials: the number of trials in each cell. A trial runs all seeds of the cell with the same values.
        space: the values of each field.
    """

    trials: int
    space: Mapping[str, Dimension]

    def of(self, settings: RunSettings) -> dict[str, Dimension]:
        """Return the fields that a run has. A field of a part that the method lacks is left out."""
        return {name: dimension for name, dimension in self.space.items() if _has(settings, name)}

    def digest(self) -> str:
        """Return the SHA-256 of the space, in hexadecimal. Trials of another space do not count."""
        return hashlib.sha256(
            json.dumps([[name, asdict(one)] for name, one in self.space.items()]).encode()
        ).hexdigest()


def read_search(path: object, trials: Any, space: Any) -> Search:
    """Return the search that a sweep file asks for.

    Args:
        path: the sweep file, for messages.
        trials: the content of `trials`.
        space: the content of `space`.

    Raises:
        ValueError: a value is invalid.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"{path}: choose: optuna needs trials, a whole number of 1 or more, not {show(trials)}")
    space = with_numbers(space)
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"{path}: choose: optuna needs space, a mapping of fields to values, not {show(space)}")
    return Search(trials, {str(name): _dimension(f"{path}: space: {name}", values) for name, values in space.items()})


def with_values(settings: RunSettings, values: Mapping[str, Any]) -> RunSettings:
    """Return the settings with values of some fields. `method.PART.FIELD` and `rates.PART` are fields, too."""
    return RunSettings(**lay_over(settings.to_dict(), values))


def corners(search: Search, settings: RunSettings) -> Iterator[dict[str, Any]]:
    """Yield the values to check before a search: each end of each field, beside the first ends of the others."""
    space = search.of(settings)
    first = {name: dimension.ends[0] for name, dimension in space.items()}
    for name, dimension in space.items():
        yield from ({**first, name: value} for value in dimension.ends)


def _dimension(where: str, values: Any) -> Dimension:
    if isinstance(values, list):
        if not values or not all(isinstance(value, (int, float, str, bool)) for value in values):
            raise ValueError(f"{where} must be a list of numbers or texts, not {show(values)}")
        return Dimension(choices=tuple(values))
    if not isinstance(values, Mapping) or not {"low", "high"} <= values.keys():
        raise ValueError(f"{where} must be a list of values or a range as {{low: 1, high: 8}}, not {show(values)}")
    for key, value in values.items():
        if key not in _LIMITS:
            meant = suggest(key, _LIMITS, f"a range has {', '.join(_LIMITS)}")
            raise ValueError(f"{where}: unknown {show(key)}; {meant}")
        if key == "log" and not isinstance(value, bool):
            raise ValueError(f"{where}: log must be true or false, not {show(value)}")
        if key != "log" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{where}: {key} must be a number, not {show(value)}")
    found = Dimension(**values)
    if not found.low < found.high:
        raise ValueError(f"{where}: low must be below high, and {show(found.low)} is not below {show(found.high)}")
    if found.log and (found.low <= 0 or found.step is not None):
        raise ValueError(f"{where}: a range with log needs a low above 0 and no step")
    if found.step is not None and found.step <= 0:
        raise ValueError(f"{where}: step must be above 0, not {show(found.step)}")
    return found


def _has(settings: RunSettings, name: str) -> bool:
    """Return whether a run has this field, which may be inside a part of its method."""
    head, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    if head == "method" and "." in rest:
        return part == "gate" or settings.config.part(part) is not None
    if head == "rates":
        return part in ("gate", "head") or settings.config.part("lora" if part == "lora_b" else part) is not None
    return True
