"""The options of `unipelt` and of its commands: each says what it takes, and the default that it has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from unipelt import cli
from unipelt.cli import main, make_parser


def commands() -> argparse._SubParsersAction[argparse.ArgumentParser]:
    [found] = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return found


def options() -> Iterator[tuple[str, argparse.Action]]:
    """Every option of every command, with a name for messages. `unipelt run` makes its own."""
    for command, parser in commands().choices.items():
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction) and command != "run":
                yield f"{command} {action.option_strings or action.dest}", action


def test_every_option_says_what_it_takes() -> None:
    for name, action in options():
        assert re.fullmatch(r"[A-Z-].*\w[)\"]?\.", action.help or "", re.DOTALL), name
        takes_a_value = action.nargs != 0
        assert bool(action.metavar or action.choices) == takes_a_value, name
        assert re.fullmatch(r"[A-Z/:]+|[a-z0-9]+(\|[a-z0-9]+)+", str(action.metavar or "X")), name


def test_the_default_of_an_option_is_the_one_that_its_help_names() -> None:
    checked = 0
    for name, action in options():
        if action.default is None or action.nargs == 0:
            continue
        said = re.search(r"Default: (\S+)\.$", action.help or "")
        assert said is not None, name
        assert said[1] == (f"{action.default:g}" if isinstance(action.default, float) else str(action.default)), name
        checked += 1
    assert checked > 5


def test_every_command_is_listed_and_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    found = commands()
    assert found.metavar == "|".join(found.choices)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: unipelt [-h] [--version] {found.metavar} ...")
    for line in found._choices_actions:
        assert f" {line.dest} {line.help} " in f"{shown} ", "each with a line of its own"
        assert re.fullmatch(r"\w.*[\w']", line.help or ""), line.dest
    for name, parser in found.choices.items():
        assert name == "run" or re.fullmatch(r"[A-Z].*[a-z)]\.", parser.description or "", re.DOTALL), name
        assert name == "run" or parser._defaults["do"] is getattr(cli, f"_{name}")


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unipelt.sweep.watch.look", interrupt)
    assert main(["status", "."]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; the same command goes on from each run's")
