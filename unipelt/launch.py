"""A run from a command line, of the kind that its configuration asks for: classification, questions or translation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from unipelt.files.messages import complain, show
from unipelt.glue.settings import RunSettings
from unipelt.packaged import find
from unipelt.runs.aliases import own_names
from unipelt.runs.options import parse, read_config
from unipelt.runs.settings import SettingsError, TrainingSettings
from unipelt.tasks.settings import QASettings, TranslationSettings

KINDS: dict[str, tuple[type[TrainingSettings], str]] = {
    "classification": (RunSettings, "Train one method on one task, test it once, and leave one result.json."),
    "questions": (
        QASettings,
        "Train one method on questions in SQuAD's format, test it once, and leave one result.json.",
    ),
    "translation": (
        TranslationSettings,
        "Train one method on texts and their translations, test it once, and leave one result.json.",
    ),
}
"""The kinds of runs: their settings, and what a run does."""

_NAMES_AND_KINDS = (
    f"\nCONFIG decides the kind of run, and so does --kind {'|'.join(KINDS)}.\n"
    "A name that `unipelt configs` lists is a CONFIG, too."
)

_OTHER_FILES = {
    "grid": "a sweep; start it by `unipelt sweep CONFIG --out DIR`",
    "methods": "a benchmark; start it by examples/benchmark.py of the repository",
}


@dataclass(frozen=True)
class _AnySettings(RunSettings, QASettings, TranslationSettings):
    """The fields of all kinds, for reading a file of which the kind is not known yet."""


def launch(program: str, argv: Sequence[str], kind: str | None = None) -> int:
    """Do a run; say in one line what is wrong with the input, or why the run failed.

    Args:
        program: what messages and `--help` call the program.
        argv: as `parse` takes it. The configuration may also be the name of one that comes with the package.
        kind: a key of `KINDS`; by default what `find_kind` says.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported
    try:
        words, what = list(argv), "" if kind is None else KINDS[kind][1]
        if words and not words[0].startswith("-"):
            words[0] = find(words[0])
        if kind is None:
            words, kind = find_kind(words)
            what = f"{KINDS[kind][1]}{_NAMES_AND_KINDS}"
        settings = parse(words, KINDS[kind][0], what, program)
    except (ValueError, OSError) as error:
        complain(program, error)
        return 2

    from unipelt.runs.errors import exit_code

    return exit_code(program, lambda: _start(settings))


def find_kind(argv: Sequence[str]) -> tuple[list[str], str]:
    """The kind of run that a command line asks for, a key of `KINDS`, and the command line without `--kind`.

    `--kind` decides; without it the name of a known task; without one, a field that only one kind has; else it is a
    classification.

    Raises:
        SettingsError: `--kind` is followed by no kind, or the file is of no run.
        ConfigError, FileNotFoundError: as `read_config`.
    """
    words, options = list(argv), _options(argv)
    if "kind" in options:
        if options["kind"] not in KINDS:
            raise SettingsError(f"--kind must be {', '.join(KINDS)}, not {show(options['kind'])}")
        place = next(index for index, word in enumerate(words) if word.partition("=")[0] == "--kind")
        del words[place : place + (1 if "=" in words[place] else 2)]
        return words, options["kind"]
    values: dict[str, Any] = {}
    if words and not words[0].startswith("-"):
        values = read_config(words[0], _AnySettings, also=("grid", "choose", "methods"))
        for key, what in _OTHER_FILES.items():
            if key in values:
                raise SettingsError(f"{words[0]} is the file of {what}")
    values |= own_names(options, _AnySettings)
    task = values.get("task")
    for kind, known in (("questions", QASettings.known), ("translation", TranslationSettings.known)):
        if task in known:
            return words, kind
    for kind in ("questions", "translation"):
        if task in (None, "null", "none") and _own_fields(kind) & values.keys():
            return words, kind
    return words, "classification"


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options of a command line and the words that follow them."""
    found = {}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            found[name.replace("-", "_")] = text if equals else following
    return found


def _own_fields(kind: str) -> set[str]:
    """The fields that no other kind has."""
    names = {name: {item.name for item in fields(settings)} for name, (settings, _) in KINDS.items()}
    return names[kind].difference(*(others for name, others in names.items() if name != kind))


def _start(settings: TrainingSettings) -> None:
    """Do the run of these settings. Raises as `unipelt.glue.run.run`."""
    if isinstance(settings, RunSettings):
        from unipelt.glue.run import run

        run(settings)
        return
    from unipelt.runs.run import run as run_task

    if isinstance(settings, QASettings):
        from unipelt.tasks import qa

        run_task(settings, qa.prepare)
    elif isinstance(settings, TranslationSettings):
        from unipelt.tasks import translation

        run_task(settings, translation.prepare)
