"""The check of the setting `average` of a run. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unipelt.config.schema import ConfigError
from unipelt.files.messages import show


def check_average(average: Any, epochs: int) -> dict[str, Any] | None:
    """Return an average of weights, `{"last": N}` or `{"ema": d}`, or None if there is none.

    Args:
        average: the setting. A value of None in it counts as left out.
        epochs: the largest number of epochs of the run.

    Raises:
        ConfigError: it is something else, N is not from 1 to `epochs`, or d is not between 0 and 1.
    """
    given = average
    if isinstance(average, Mapping):
        given = {name: value for name, value in average.items() if value is not None}
    if given is None or given == {}:
        return None
    if not isinstance(given, dict) or len(given) != 1 or not {*given} <= {"last", "ema"}:
        raise ConfigError(
            "average must be one of {last: N}, the mean over the last N evaluations, and {ema: d}, a moving average "
            f"over the steps, not {show(average)}"
        )
    ((kind, value),) = given.items()
    if kind == "last" and not (type(value) is int and 1 <= value <= epochs):
        raise ConfigError(f"average.last must be a whole number from 1 to epochs, {epochs}, not {show(value)}")
    if kind == "ema" and not (isinstance(value, float) and 0 < value < 1):
        raise ConfigError(f"average.ema must be above 0 and below 1, not {show(value)}")
    return given
