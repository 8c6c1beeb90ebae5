"""Numbers as a report prints them."""

from __future__ import annotations

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def k_name(k: int | None) -> str:
    """How a K is called."""
    return "all data" if k is None else f"K = {k}"


def number(value: float) -> str:
    """A fraction in percent, with a true minus."""
    return f"{100 * value:.2f}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    """An interval of differences, in points."""
    return f"{signed(100 * low)} to {signed(100 * high)}"


def percent(value: float, std: float | None = None) -> str:
    """A fraction in percent, with its standard deviation."""
    return number(value) + ("" if std is None else f" ± {100 * std:.2f}")


def signed(value: float) -> str:
    """A difference, of two digits, with a true minus."""
    return f"{value:+.2f}".replace("-", MINUS)
