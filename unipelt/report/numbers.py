"""Format numbers for a report."""

from __future__ import annotations

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def k_name(k: int | None) -> str:
    """Return the name of a K, such as `K = 100`. None gives `all data`."""
    return "all data" if k is None else f"K = {k}"


def number(value: float) -> str:
    """Return a fraction in percent, with a true minus sign."""
    return f"{100 * value:.2f}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    """Return an interval of differences in points. The bounds are fractions."""
    return f"{signed(100 * low)} to {signed(100 * high)}"


def percent(value: float, std: float | None = None) -> str:
    """Return a fraction in percent, with its standard deviation, if given. The deviation is also a fraction."""
    return number(value) + ("" if std is None else f" ± {100 * std:.2f}")


def signed(value: float) -> str:
    """Return a difference with its sign and two decimals. The minus is a true minus sign."""
    return f"{value:+.2f}".replace("-", MINUS)
