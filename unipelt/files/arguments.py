"""A command-line parser that reports each error in one line and suggests the correct option."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from unipelt.files.messages import show, suggest


class OneLineParser(argparse.ArgumentParser):
    """An `argparse` parser without abbreviated options. Each error is one line.

    Its only option with a single letter is `-h`.

    Attributes:
        problem: The type of the errors.
        order: The order of the words on the command line, for the error about a word that belongs to no option.
    """

    problem: type[ValueError] = ValueError
    order = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> Any:
        """Raise an error of the type `problem`."""
        raise self.problem(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments. A misspelt option is reported before any error that follows from it."""
        words = self._spell(list(sys.argv[1:] if args is None else args))
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"cannot tell what {show(rest[0])} belongs to{self.order}; see {self.prog} --help")
        return namespace, rest

    def _spell(self, words: list[str]) -> list[str]:
        """Return the words with each option spelt as it was added. A user may write - or _ in an option."""
        known = self._option_string_actions
        spelt: list[str] = []
        for number, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):  # a command parses the rest
                return [*spelt, *words[number:]]
            option, equals, value = word.partition("=")
            if word.startswith("--") and " " not in option and option not in known:
                bare = option.removeprefix("--")
                found = [
                    f"--{name}" for name in (bare.replace("-", "_"), bare.replace("_", "-")) if f"--{name}" in known
                ]
                if not found:
                    self.error(self._unknown("option", option, known))
                word = f"{found[0]}{equals}{value}"
            spelt.append(word)
        return spelt

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(self._unknown("command", value, action.choices))
        known = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(action, f"{show(value)} is not one of {', '.join(known)}")

    def _unknown(self, kind: str, name: str, known: Iterable[str]) -> str:
        guess, where = suggest(name, known), f"see {self.prog} --help"
        return f"unknown {kind} {show(name)}; {f'{guess} ({where})' if guess else where}"
