"""Start of a run from a command line. The configuration decides its kind: classification, questions or translation."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from unipelt.files.messages import complain, show
from unipelt.glue.settings import RunSettings
from unipelt.packaged import find
from unipelt.runs import processes
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
"""The kinds of runs: for each, the class of its settings, and the description of a run."""

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
    """The fields of all kinds, to read a file before its kind is known."""


def launch(program: str, argv: Sequence[str], kind: str | None = None) -> int:
    """Do a run, and print one line if the input is wrong or the run fails.

    Args:
        program: the name of the program in messages and `--help`.
        argv: the words of the command line, as for `parse`. The configuration may also be the name of one that comes
            with the package.
        kind: a key of `KINDS`; by default the result of `find_kind`.

    Returns:
        The exit code: 0 for success, 1 for a failed run, 2 for bad input, 130 for an interrupt.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the libraries read this when they are imported
    try:
        words, what = list(argv), "" if kind is None else KINDS[kind][1]
        if words and not words[0].startswith("-"):
            words[0] = find(words[0])
        if kind is None:
            words, kind = find_kind(words)
            what = f"{KINDS[kind][1]}{_NAMES_AND_KINDS}"
        settings = parse(words, KINDS[kind][0], what, program)
    except (ValueError, OSError) as error:
        if processes.has_to_report():
            complain(program, error)
        processes.leave(2)
        return 2

    from unipelt.runs.errors import exit_code

    try:
        code = exit_code(program, lambda: _start(settings), processes.has_to_report)
    except Exception:
        if processes.world_size() == 1:
            raise
        traceback.print_exc()
        code = 1
    processes.leave(code)
    return code


def find_kind(argv: Sequence[str]) -> tuple[list[str], str]:
    """Return the command line without `--kind`, and the kind of its run, a key of `KINDS`.

    The kind is the value of `--kind`. Without this option, the name of a known task decides. Without such a name, a
    field that only one kind has decides. Otherwise the run is a classification.

    Raises:
        SettingsError: the value of `--kind` is not a kind, or the file is not the configuration of a run.
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
        values = read_config(words[0], _AnySettings, also=("grid", "choose", "trials", "space", "methods"))
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
    """Return the options of a command line, each with the word that follows."""
    found = {}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            found[name.replace("-", "_")] = text if equals else following
    return found


def _own_fields(kind: str) -> set[str]:
    """Return the names of the fields that no other kind has."""
    names = {name: {item.name for item in fields(settings)} for name, (settings, _) in KINDS.items()}
    return names[kind].difference(*(others for name, others in names.items() if name != kind))


def _start(settings: TrainingSettings) -> None:
    """Do the run of these settings. Raise as `unipelt.glue.run.run`."""
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
