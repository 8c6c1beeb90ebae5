"""A parser of command lines that says in one line what is wrong, and names the option that was meant."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unipelt.files.messages import show, suggest


class OneLineParser(argparse.ArgumentParser):
    """An `argparse` parser without abbreviated options; each error is one line.

    It has no options of a single letter but `-h`.

    Attributes:
        problem: The type of the errors.
        order: What comes where on the command line, for the error about a word that is no option's value.
    """

    problem: type[ValueError] = ValueError
    order = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> Any:
        """Raise the error."""
        raise self.problem(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; a misspelt option is the first error, before those that follow from it."""
        words = self._spell(list(sys.argv[1:] if args is None else args))
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"cannot tell what {show(rest[0])} belongs to{self.order}; see {self.prog} --help")
        return namespace, rest

    def _spell(self, words: list[str]) -> list[str]:
        """The words with each option as it was added; on a command line its words may be joined by - or by _."""
        known = self._option_string_actions
        spelt: list[str] = []
        for number, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):  # a command has its own
                return [*spelt, *words[number:]]
            option, equals, value = word.partition("=")
            if word.startswith("--") and " " not in option and option not in known:
                bare = option.removeprefix("--")
                found = [
                    f"--{name}" for name in (bare.replace("-", "_"), bare.replace("_", "-")) if f"--{name}" in known
                ]
                if not found:
                    self.error(self._unknown("option", option, list(known)))
                word = f"{found[0]}{equals}{value}"
            spelt.append(word)
        return spelt

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(self._unknown("command", value, list(action.choices)))
        known = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(action, f"{show(value)} is not one of {', '.join(known)}")

    def _unknown(self, kind: str, name: str, known: list[str]) -> str:
        guess, where = suggest(name, known), f"see {self.prog} --help"
        return f"unknown {kind} {show(name)}; {f'{guess} ({where})' if guess else where}"
