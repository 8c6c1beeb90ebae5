"""Progress: one line a minute in a log, a bar on a terminal, and nothing for short work."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from unipelt.files import progress as module
from unipelt.files.progress import Progress, above_bars, duration, track


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, and keeps the text that it is given."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_a_minute(clock: Clock) -> None:
    lines: list[str] = []
    with Progress("training", 300, "step", done=60, log=lines.append) as progress:
        for _ in range(180):
            clock.now += 1.0
            progress.update()
    assert lines == [
        "training: 120 of 300 steps, 1 a second, about 3 min 00 s left",
        "training: 180 of 300 steps, 1 a second, about 2 min 00 s left",
        "training: 240 of 300 steps, 1 a second, about 1 min 00 s left",
    ]


def test_work_of_less_than_a_minute_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(59), "measuring", "batch"):
        clock.now += 1.0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_without_a_function_for_lines_they_go_to_standard_error(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(track(slow(clock), "measuring", "batch")) == [0, 1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "measuring: 1 batch, 0.6 a minute\nmeasuring: 2 batches, 0.6 a minute\n"


def slow(clock: Clock) -> Iterator[int]:
    for number in range(2):
        clock.now += 100.0
        yield number


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    screen, lines = Terminal(), list[str]()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("training", 10, "step", log=lines.append, keep=True) as progress:
        progress.update(5)
        clock.now += 100
        progress.tick()
        with above_bars():
            pass
    assert "training:" in screen.getvalue()
    assert "5/10" in screen.getvalue()
    assert "step" in screen.getvalue()
    assert screen.getvalue().endswith("\n"), "a bar that stays ends its line"
    assert not lines, "a bar, or lines"


def test_a_run_of_several_has_lines_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    screen, lines = Terminal(), list[str]()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("training", 10, "step", log=lines.append, bar=False) as progress:
        clock.now += 100
        progress.update(5)
    assert (len(lines), screen.getvalue()) == (1, "")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 min 00 s"), (61.9, "1 min 01 s"), (3900, "1 h 05 min")])
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
