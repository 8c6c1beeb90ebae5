"""Progress of long work: a bar on a terminal, and one line a minute where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from unipelt.files.messages import printable

LINE_SECONDS = 60.0
"""The seconds between two lines in a log. Work that takes less leaves no line."""
BAR_SECONDS = 2.0
"""The seconds after which a bar is shown. Work that takes less shows no bar."""

Item = TypeVar("Item")


class Progress:
    """The progress of one piece of work. Close it at the end, or use it in a `with` block.

    On a terminal there is a bar with the rate and the time left. Elsewhere `log` gets one line a minute. The time left
    is an estimate from the rate so far.

    Args:
        what: the name of the work, such as `training`.
        total: the number of units; None if it is unknown.
        unit: the name of one unit, such as `step`.
        done: the number of units that were done before.
        log: a function that takes a line. The default prints to standard error.
        bar: whether a terminal gets a bar. Without a bar, lines are logged there too.
        keep: whether the bar stays after its end.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        log: Callable[[str], None] | None = None,
        bar: bool = True,
        keep: bool = False,
    ) -> None:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._log = log or _complain
        self._first, self._begun = done, time.monotonic()
        self._said = self._begun
        # disable=None shows no bar in a file
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            disable=None if bar else True,
            delay=0 if keep else BAR_SECONDS,
            leave=keep,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def rate(self) -> float | None:
        """The units in a second since the beginning; None before the first unit."""
        count, seconds = self.done - self._first, time.monotonic() - self._begun
        return count / seconds if count > 0 and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """The estimated seconds to the end; None if unknown."""
        rate = self.rate
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate

    def update(self, count: int = 1) -> None:
        """Say that `count` more units are done."""
        self.done += count
        self._bar.update(count)
        self.tick()

    def tick(self) -> None:
        """Log a line if a minute has passed since the last line."""
        now = time.monotonic()
        if self._bar.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            self._log(str(self))

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def __str__(self) -> str:
        """Return the progress in words: units, rate and time left."""
        of = "" if self.total is None else f" of {self.total:,}"
        plural = "es" if self.unit.endswith("ch") else "s"
        units = self.unit if (self.total or self.done) == 1 else f"{self.unit}{plural}"
        words = [f"{self.what}: {self.done:,}{of} {units}"]
        if (rate := self.rate) is not None:
            words.append(f"{rate:.3g} a second" if rate >= 0.1 else f"{60 * rate:.3g} a minute")
        if (left := self.seconds_left) is not None:
            words.append(f"about {duration(left)} left")
        return ", ".join(words)


def track(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield the items, and show the progress through them."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Clear the bars inside the block, so that lines can be printed, and draw them again after it."""
    from tqdm.auto import tqdm

    with tqdm.external_write_mode():
        yield


def duration(seconds: float) -> str:
    """Return a time in seconds as text for people, such as `1 h 05 min`."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds % 60):02} s"


def _complain(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
