"""Settings of a run from configuration files and the command line."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from unipelt.config.presets import PRESETS
from unipelt.config.schema import read_mapping
from unipelt.files.arguments import OneLineParser
from unipelt.files.messages import show, show_path, suggest
from unipelt.files.strict import PlainError, parse_yaml
from unipelt.runs.aliases import SWITCHES, check_needs, names_of, own_names, refuse_usual
from unipelt.runs.settings import (
    INCIDENTAL,
    INNER,
    PATHS,
    SettingsError,
    TrainingSettings,
    clean_name,
    expand_method,
    locate_file,
    with_numbers,
)

DOTTED = ("method.", *(f"{name}." for name in INNER))
"""Prefixes of the names of values inside a setting."""
_ALIASES = ("none", "null", "~")
_MOST_ABOVE = 50
_WHAT = "Train one method on one task, test it once, and leave one result.json."

GROUPS = {
    "what to run": ("task", "model", "model_sha256", "random", "random_width", "random_layers", "vocabulary", "seed"),
    "data": (
        *("glue_dir", "tasks_dir", "train_file", "dev_file", "test_file", "text_columns", "label_column", "regression"),
        *("source", "target", "source_prefix", "skip_samples", "train_samples", "dev_samples", "test_samples"),
        *("data_seed", "split_seed", "max_length", "max_target_length", "stride", "pad_to_max_length"),
    ),
    "method": ("method",),
    "training": (
        *("learning_rate", "rates", "epochs", "patience", "batch_size", "train_tokens", "weight_decay", "warmup_ratio"),
        *("max_grad_norm", "precision", "gradient_checkpointing", "trainer", "average", "select"),
    ),
    "evaluation": (
        *("eval_batch_size", "eval_tokens", "beams", "n_best", "max_answer_length", "null_threshold", "do_predict"),
    ),
    "output": ("output_dir", "overwrite", "keep_checkpoints"),
    "machine": ("device", "threads", "num_workers"),
}
"""The groups of `--help`: the title and the fields of each."""
_OTHER = "further options"

Kind = TypeVar("Kind", bound=TrainingSettings)


def parse(argv: Sequence[str], kind: type[Kind], what: str = _WHAT, program: str | None = None) -> Kind:
    """Read settings from a command line.

    Args:
        argv: the words of the command line. The first word may be a YAML or JSON file with the values that differ from
            the defaults. This file may name other files as `base`, a path or a list of paths relative to the file. A
            later base overrides an earlier one, and the file overrides its bases. The other words are `--field value`
            for any field, `--method.part.field value` for any field of the method, `--trainer.name value` for an
            option of Trainer and `--rates.part value` for the learning rate of a part. The usual names of
            `unipelt.runs.aliases` are accepted too.
        kind: the class of the settings, a dataclass.
        what: the purpose of the program, for `--help`.
        program: the name of the program, for `--help`; by default the name of the script.

    Returns:
        The settings.

    Raises:
        SettingsError, ConfigError, FileNotFoundError: a name is unknown, a value is invalid, or a file does not exist.
        SystemExit: `--help` was given, and the help was printed.
    """
    words = list(argv)
    config = words.pop(0) if words and not words[0].startswith("-") else None
    words, dotted = split_dotted(words)
    namespace = _parser(kind, what, program).parse_args(words)
    asked = {name: value for name, value in vars(namespace).items() if value is not None} | dotted
    given: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for name, value in own_names(asked, kind).items():
        (overrides if name.startswith(DOTTED) else given)[name] = read_option(name, value, kind)
    values = {} if config is None else read_config(config, kind)
    if config is not None and given.get("output_dir") is None and values.get("output_dir") is None:
        given["output_dir"] = _default_folder(config, given, overrides)
    values.update(given)
    check_needs([*asked, *({} if config is None else read_mapping(config))], values, kind)
    return kind(**lay_over(values, overrides))


def read_config(path: str | Path, kind: type[TrainingSettings], also: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of the fields that a configuration file and its bases set.

    Relative paths of data and of the method start from the current folder. If no such file exists, they start from the
    root of the file's repository, which is the nearest parent folder with a `pyproject.toml` or `.git`.
    `package:NAME/FILE` is a file inside an installed Python package.

    Args:
        path: the path of the file.
        kind: the class of the settings.
        also: further keys that the file may hold, but not its bases.

    Raises:
        SettingsError: a field is unknown, or files name each other as base in a circle.
        ConfigError, FileNotFoundError: a file cannot be read.
    """
    return _read_config(Path(path), kind, (), {}, also)


def read_option(name: str, value: Any, kind: type[TrainingSettings]) -> Any:
    """Return the value of an option from its text, or its list of texts, on the command line."""
    if name.startswith(DOTTED):
        return _read_scalar(value, name)
    hint = get_type_hints(kind)[name]
    if isinstance(value, list):
        return None if [item.lower() for item in value] in (["none"], ["null"]) else value
    if type(None) in get_args(hint) and value.lower() in _ALIASES:
        return None
    if hint is str or str in get_args(hint):
        return value
    return _read_scalar(value, name)


def locate_path(name: str, config: Path) -> str:
    """Return a path from a configuration file, starting from the current folder or the root of the file's repository.

    `package:NAME/FILE` is a file inside an installed Python package. Raise `SettingsError` if that file does not exist.
    Any other path that does not exist is returned unchanged.
    """
    if name.startswith("package:"):
        return locate_file(name)
    if os.path.isabs(name) or os.path.exists(name):
        return name
    for folder in Path(os.path.realpath(config)).parents:
        if any((folder / mark).exists() for mark in ("pyproject.toml", ".git")):
            return str(folder / name) if os.path.exists(folder / name) else name
    return name


def _read_config(
    path: Path,
    kind: type[TrainingSettings],
    above: tuple[str, ...],
    known_bases: dict[str, dict[str, Any]],
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Read a file for `read_config`. The files `above` lead to this base. A base of several files is read once."""
    try:
        place = os.path.realpath(path)
    except ValueError:
        place = str(path)  # the path holds a NUL, which `read_mapping` reports
    if place in above:
        raise SettingsError(f"{show_path(path)} names itself as its base, through {show_path(above[-1])}")
    if len(above) > _MOST_ABOVE:
        raise SettingsError(f"{show_path(path)} is the base of the base of more than {_MOST_ABOVE} files; name fewer")
    if place in known_bases:
        return known_bases[place]
    own = read_mapping(path)
    bases = own.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SettingsError(f"{show_path(path)}: base must be a path or a list of paths, not {show(bases)}")
    values: dict[str, Any] = {}
    for base in bases:
        values |= _read_config(path.parent / base, kind, (*above, place), known_bases)
    own = own_names(own, kind)
    known = [item.name for item in fields(kind)]
    overrides = {}
    for key in list(own):
        if key.startswith(DOTTED):
            overrides[key] = with_numbers(own.pop(key))
        elif key not in (*known, *also):
            refuse_usual(str(key))
            meant = suggest(key, [*also, *known])
            raise SettingsError(
                f"{show_path(path)}: unknown field {show(key)}; {f'{meant} (see --help)' if meant else 'see --help'}"
            )
    for name in (*PATHS, "method"):
        if isinstance(own.get(name), str):
            own[name] = locate_path(own[name], path)
    values |= own
    values = lay_over(values, overrides)
    known_bases[place] = values
    return values


def _read_scalar(text: str, name: str) -> Any:
    try:
        value = parse_yaml(text)
    except PlainError as error:
        raise SettingsError(f"{name}: cannot read the value {show(text)}") from error
    if text.lower() in _ALIASES:
        return None
    return with_numbers(value)


def lay_over(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of settings with overrides, such as `{"seed": 2, "trainer.logging_steps": 10}`.

    A dotted name sets a value inside a setting.

    Raises:
        SettingsError: the setting before the dot is not a mapping.
    """
    found = dict(values)
    inner: dict[str, dict[str, Any]] = {}
    for name, value in overrides.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
        else:
            found[name] = value
    if "method" in inner:
        found["method"] = _override_method(found.get("method", "unipelt-apl"), inner.pop("method"))
    for head, changes in inner.items():
        below = found.get(head)
        if below is not None and not isinstance(below, Mapping):
            raise SettingsError(f"{head} must be a mapping, not {show(below)}")
        found[head] = {**(below or {}), **changes}
    return found


def _override_method(method: Any, overrides: Mapping[str, Any]) -> Any:
    """Return a method with dotted overrides, such as `{"lora.rank": 4}`."""
    if not overrides:
        return method
    method = expand_method(method)
    merged: dict[str, Any] = {"preset": method} if isinstance(method, str) else dict(method)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = merged
        for parent in parents:
            below = place.get(parent)
            place[parent] = dict(below) if isinstance(below, Mapping) else {}
            place = place[parent]
        place[last] = value
    return merged


def split_dotted(argv: Sequence[str], heads: tuple[str, ...] = DOTTED) -> tuple[list[str], dict[str, str]]:
    """Take `--method.part.field value`, `--trainer.name value` and `--rates.part value` out of a command line.

    Args:
        argv: the words of the command line. A value may also follow after `=`.
        heads: the prefixes of the names to take.

    Returns:
        The other words, and the text of each dotted name.

    Raises:
        SettingsError: a value is missing.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith(tuple(f"--{head}" for head in heads)):
            rest.append(word)
            continue
        key, equals, text = word.partition("=")
        if not equals:
            text = next(words, "")
        if not text or text.startswith("--"):
            raise SettingsError(f"{key} needs a value")
        found[key.removeprefix("--").replace("-", "_")] = text
    return rest, found


def _default_folder(config: str, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """Return the default output folder: `runs/`, the name of the file, and the options that change the outcome."""
    options = {name: value for name, value in given.items() if name not in (*INCIDENTAL, "glue_dir", "tasks_dir")}
    options |= overrides
    parts = [Path(config).stem, *(f"{name}={_plain(value)}" for name, value in options.items())]
    return str(Path("runs") / clean_name("-".join(parts)))


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


class _Parser(OneLineParser):
    problem = SettingsError
    order = ": a configuration file comes first, then options as --field value"

    def _unknown(self, kind: str, name: str, known: Iterable[str]) -> str:
        refuse_usual(name.removeprefix("--").replace("-", "_"))
        return super()._unknown(kind, name, known)


def _parser(kind: type[TrainingSettings], what: str, program: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [CONFIG] [--FIELD VALUE ...] [--method.PART.FIELD VALUE ...] [--trainer.NAME VALUE ...]",
        description=f"{what}\n\nCONFIG is a YAML or JSON file that sets some of these fields (see configs/). An option "
        "wins over\nthe file. A field of the method has an option of its own, such as --method.lora.rank 4.",
        epilog=textwrap.fill(f"Presets: {', '.join(PRESETS)}.", 96),
    )
    add_options(parser, kind)
    group = parser.add_argument_group("the same by the names of Transformers' scripts")
    for alias, own in names_of(kind).items():
        options: dict[str, Any] = {
            "help": f"The same as --{own}." if own else "Accepted where true, since a run always does it."
        }
        switch = alias in SWITCHES or alias in ("overwrite_output_dir", "push_to_hub", "torch_compile", "fp16")
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"} if switch else {"metavar": "VALUE"}
        group.add_argument(f"--{alias}", dest=alias, **options)
    return parser


def add_options(
    parser: argparse.ArgumentParser, kind: type[TrainingSettings], dest: str = "", leave_out: Sequence[str] = ()
) -> None:
    """Add an option for each field of settings, in groups.

    Args:
        parser: The parser.
        kind: The settings.
        dest: Prefix of the names of the parsed values.
        leave_out: Fields without an option.
    """
    hints = get_type_hints(kind)
    groups: dict[str, list[Any]] = {}
    items_by_name = {item.name: item for item in fields(kind) if item.name not in leave_out}
    for title, names in GROUPS.items():
        groups[title] = [items_by_name.pop(name) for name in names if name in items_by_name]
    groups[_OTHER] = [*items_by_name.values()]
    for title, items in groups.items():
        group = parser.add_argument_group(title) if items else None
        for item in items:
            value = str(item.default).lower() if isinstance(item.default, bool) else item.default
            text = item.metadata["help"].rstrip(".") + ("." if item.default is None else f". Default: {value}.")
            options: dict[str, Any] = {"help": text.replace("%", "%%")}
            if bool in (hints[item.name], *get_args(hints[item.name])):
                options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
            elif get_origin(hints[item.name]) is Literal:
                options |= {"metavar": "|".join(get_args(hints[item.name]))}
            elif item.name == "text_columns":
                options |= {"nargs": "+", "metavar": "COLUMN"}
            else:
                options |= {"metavar": "VALUE"}
            group.add_argument(f"--{item.name}", dest=f"{dest}{item.name}", **options)  # type: ignore[union-attr]
