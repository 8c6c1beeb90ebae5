"""What one run is: a frozen dataclass, read from a configuration file and the command line, checked before anything."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from unipelt.config import PRESETS, ConfigError, UniPELTConfig, read_mapping, resolve
from unipelt.glue.tasks import get_task

GLUE_DIR = "UNIPELT_GLUE_DIR"
"""Environment variable: the default of `glue_dir`."""

# How a run is carried out, as opposed to what it computes.
_INCIDENTAL = ("output_dir", "overwrite", "keep_checkpoints", "device", "num_workers", "threads")
_FILES = ("train_file", "dev_file", "test_file")
_ALIASES = {"none": None, "null": None, "~": None}
_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")  # what YAML 1.1 takes for a string


class SettingsError(ValueError):
    """Settings that cannot be meant; the message says which, what was seen and what is possible."""


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class RunSettings:
    """Everything that one run needs to know; each field's meaning is in its `help`.

    Raises:
        SettingsError, ConfigError: a value cannot be meant, or two contradict each other.
        FileNotFoundError: the method is a path, and no file is there.
    """

    model: str = _option(
        "bert-base-uncased",
        "the pretrained model: a name on the hub, a folder, or package:NAME/FOLDER for a folder inside an installed "
        "Python package",
    )
    model_sha256: str | None = _option(
        None, "SHA-256 that the model's model.safetensors must have; checked before it is loaded"
    )
    task: str | None = _option(None, "a GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli or rte")
    glue_dir: str | None = _option(
        None,
        f"folder with GLUE data; by default that of the variable {GLUE_DIR}, else the hub's nyu-mll/glue",
    )
    train_file: str | None = _option(
        None, "instead of a task: your own training data (.tsv, .csv, .json, .jsonl or .parquet)"
    )
    dev_file: str | None = _option(
        None,
        "your own dev data; with train_samples, where dev is cut from the train file, it is the test data",
    )
    test_file: str | None = _option(
        None, "your own test data; unlabelled, it is for do_predict only. By default the dev data"
    )
    text_columns: tuple[str, ...] | None = _option(
        None, "the one or two text columns of your own files; by default those with a usual name"
    )
    label_column: str = _option("label", "the label column of your own files")
    regression: bool | None = _option(
        None, "whether your own labels are scores rather than classes; by default read from the labels"
    )
    train_samples: int | None = _option(
        None, "K: train on the first K examples of the shuffled train data; by default on all of them"
    )
    dev_samples: int = _option(1000, "with train_samples: the next that many examples are the dev set")
    data_seed: int | None = _option(None, "seed of that shuffle; by default seed")
    seed: int = _option(1, "seed of initialisation, dropout and the order of examples")
    method: str | Mapping[str, Any] = _option(
        "unipelt-apl",
        "a preset, a path to JSON or YAML, or (in a file) a mapping; single fields as --method.lora.rank 4, "
        "--method.gate.pooling mean, --method.prefix null",
    )
    learning_rate: float | None = _option(
        None,
        "peak learning rate; by default the paper's for BERT-base: fine-tuning 2e-5, adapter and bitfit 1e-4, "
        "prefix 2e-4, lora and combinations 5e-4",
    )
    epochs: int = _option(50, "at most this many passes over the train data")
    patience: int | None = _option(
        10, "stop after this many evaluations (one an epoch) without a better dev score; null: never"
    )
    batch_size: int = _option(16, "examples a step")
    eval_batch_size: int = _option(64, "examples a batch of evaluation")
    max_length: int = _option(128, "tokens, special ones included; longer texts are cut")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    warmup_ratio: float = _option(0.0, "fraction of all steps in which the learning rate rises from 0")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm; 0: never")
    precision: Literal["fp32", "bf16"] = _option("fp32", "fp32, or bf16 for bfloat16 autocast")
    gradient_checkpointing: bool = _option(False, "recompute activations to save memory")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto (a GPU where there is one), cpu or cuda")
    num_workers: int = _option(0, "processes that prepare batches; 0: the main one")
    threads: int | None = _option(None, "CPU threads; by default PyTorch's choice")
    output_dir: str | None = _option(
        None,
        "folder of the result; by default runs/ and a name made of the configuration file and the options",
    )
    overwrite: bool = _option(False, "run again although the folder holds a result, or replace another run's")
    do_predict: bool = _option(
        False, "also write predictions on the unlabelled test data (GLUE: the leaderboard's files)"
    )
    keep_checkpoints: bool = _option(False, "keep the trainer's last and best checkpoint after the run")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if name != "method":
                object.__setattr__(self, name, _convert(hint, getattr(self, name), name))
        self._check_values()
        self._check_data()
        object.__setattr__(self, "method", _expand_method(self.method))
        config = self.config
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", paper_learning_rate(config))
        if self.data_seed is None:
            object.__setattr__(self, "data_seed", self.seed)
        if self.task is not None and self.glue_dir is None and os.environ.get(GLUE_DIR):
            object.__setattr__(self, "glue_dir", os.environ[GLUE_DIR])
        if self.output_dir is None:
            name = clean_name(f"{self.task or Path(str(self.train_file)).stem}-{self.method_name}-seed={self.seed}")
            object.__setattr__(self, "output_dir", str(Path("runs") / name))

    def _check_values(self) -> None:
        for name in (
            "epochs",
            "patience",
            "batch_size",
            "eval_batch_size",
            "train_samples",
            "dev_samples",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be 1 or more, not {value}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_workers", "seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"{name} must be 0 or more, not {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value >= 2**32:
                raise SettingsError(f"{name} must be below {2**32}, not {value}")
        if self.learning_rate == 0:
            raise SettingsError("learning_rate must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise SettingsError(f"warmup_ratio is a fraction, at least 0 and below 1, not {self.warmup_ratio}")
        if self.max_length < 3:
            raise SettingsError(f"max_length must be 3 or more tokens, not {self.max_length}")
        for name in ("model", "output_dir", "label_column", *_FILES, "glue_dir"):
            if getattr(self, name) == "":
                raise SettingsError(f"{name} is empty; give a value or leave it out")
        if self.model_sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.model_sha256):
            raise SettingsError(f"model_sha256 must be 64 hexadecimal digits in lower case, not {self.model_sha256!r}")

    def _check_data(self) -> None:
        """Check that the fields which name data go together; the data themselves are not touched."""
        if self.task is not None:
            object.__setattr__(self, "task", get_task(self.task).name)
            for name in (*_FILES, "text_columns", "regression"):
                if getattr(self, name) is not None:
                    raise SettingsError(f"task and {name} exclude each other; set one of them to null")
            return
        if self.train_file is None:
            raise SettingsError("there is nothing to train on: name a task (--task rte) or a train_file")
        if self.glue_dir is not None:
            raise SettingsError("glue_dir goes with a task, not with a train_file; leave it out")
        if self.dev_file is None and (self.train_samples is None or self.test_file is None):
            wanted = "dev_file or test_file" if self.train_samples else "dev_file"
            raise SettingsError(f"there is nothing to test on: give a {wanted} beside the train_file")

    @property
    def config(self) -> UniPELTConfig:
        """The method, resolved."""
        return resolve(self.method)

    @property
    def method_name(self) -> str:
        """The preset's name, followed by what differs from it, as in `unipelt-apl, lora.rank=4`."""
        preset = self.method.get("preset", "unipelt-apl") if isinstance(self.method, Mapping) else self.method
        config = self.config
        for name, known in PRESETS.items():
            if config == known:
                return name
        before, after = _flatten(PRESETS[preset].to_dict()), _flatten(config.to_dict())
        changed = [f"{key}={_show(after[key])}" for key in after if after[key] != before.get(key, MISSING)]
        return ", ".join([preset, *changed])

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain types that JSON holds."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict[str, Any]:
        """What determines the outcome: the fields but for those of how and where the run is carried out."""
        values = {name: value for name, value in self.to_dict().items() if name not in _INCIDENTAL}
        for name in (*_FILES, "glue_dir"):
            if values[name] is not None:
                values[name] = os.path.abspath(values[name])
        values["method"] = self.config.to_dict()
        return values

    def digest(self) -> str:
        """SHA-256 of `identity`: two runs with the same digest are the same run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def paper_learning_rate(config: UniPELTConfig) -> float:
    """The learning rate of the paper's tables for a method on BERT-base (section 4.1)."""
    if config.train_base:
        return 2e-5
    parts = [name for name in ("adapter", "prefix", "lora") if getattr(config, name) is not None]
    if parts in ([], ["adapter"]):
        return 1e-4
    return 2e-4 if parts == ["prefix"] else 5e-4


def parse(argv: Sequence[str]) -> RunSettings:
    """Read settings from a command line.

    Args:
        argv: optionally a YAML or JSON file, which holds only what differs from the defaults and may name others as
            `base` (a path or a list of them, relative to the file; later ones win, and the file itself wins over
            all); then `--field value` for any field, and `--method.part.field value` for any field of the method.

    Raises:
        SettingsError, ConfigError, FileNotFoundError: something is unknown or cannot be meant.
        SystemExit: `--help` was asked for, and printed.
    """
    words = list(argv)
    config = words.pop(0) if words and not words[0].startswith("-") else None
    words, overrides = _split_method(words)
    namespace, unknown = _parser().parse_known_args(words)
    for word in unknown:
        if word.startswith("--"):
            raise SettingsError(_unknown("option", word, [f"--{item.name}" for item in fields(RunSettings)]))
        raise SettingsError(
            f"cannot tell what {word!r} belongs to: a configuration file comes first, then options as --field value"
        )
    given = {name: read_option(name, value) for name, value in vars(namespace).items() if value is not None}
    values = {} if config is None else read_config(config)
    if config is not None and given.get("output_dir") is None and values.get("output_dir") is None:
        given["output_dir"] = _default_folder(config, given, overrides)
    values.update(given)
    values["method"] = _override_method(values.get("method", "unipelt-apl"), overrides)
    return RunSettings(**values)


def read_config(path: str | Path, also: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that a configuration file sets, its bases included.

    Relative paths of data and of the method are looked for from the current folder and then from the root of the
    repository that the file lies in (the nearest folder above with a `pyproject.toml` or `.git`).

    Args:
        path: the file.
        also: keys of the file itself, not of its bases, that are no fields.

    Raises:
        SettingsError: a field is unknown, or files name each other as base in a circle.
        ConfigError, FileNotFoundError: a file cannot be read.
    """
    return _read_config(Path(path), (), also)


def locate_model(model: str) -> str:
    """The folder behind `package:NAME/FOLDER`, found without importing the package; other names as they are.

    Raises:
        SettingsError: the package is not installed, or has no such folder.
    """
    if not model.startswith("package:"):
        return model
    package, _, inside = model.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise SettingsError(f"{model!r} is not of the form package:NAME/FOLDER")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            f"the model is a part of the Python package {package!r}, which is not installed; "
            "install the extra 'demo' (pip install -e '.[demo]') or the package itself"
        )
    folders = [Path(place) / inside for place in spec.submodule_search_locations]
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise SettingsError(f"the package {package!r} holds no model at {inside!r}: {folders[0]} has no config.json")
    return str(found[0])


# Values


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Check a value against a field's type; numbers may be spelt as strings where a float is wanted."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(choice for choice in choices if choice is not type(None)), value, name)
    if origin is Literal:
        if value not in choices:
            raise SettingsError(f"{name} must be {' or '.join(map(str, choices))}, not {value!r}")
        return value
    if origin is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise SettingsError(f"{name} must be a list of names, not {value!r}")
        return tuple(items)
    if hint is float:
        value = _as_number(value)
        value = float(value) if type(value) is int else value
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        kind = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[hint]
        raise SettingsError(f"{name} must be {kind}, not {value!r}")
    return value


def _as_number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def read_option(name: str, value: Any) -> Any:
    """A value from the command line, where everything is text."""
    hint = get_type_hints(RunSettings)[name]
    if isinstance(value, list):
        return None if [item.lower() for item in value] in (["none"], ["null"]) else value
    if type(None) in get_args(hint) and value.lower() in _ALIASES:
        return None
    if hint is str or str in get_args(hint):
        return value
    return _read_scalar(value, name)


def _read_scalar(text: str, name: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{name}: cannot read the value {text!r}") from error
    if text.lower() in _ALIASES:
        return None
    return _as_number(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _with_numbers(value: Any) -> Any:
    """The same plain types, with numbers such as 5e-4, which YAML 1.1 reads as text, as numbers."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _show(value: Any) -> str:
    return json.dumps(value)


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"unknown {kind} {name!r}" + (f"; did you mean {near[0]}?" if near else ";") + f" known are {', '.join(known)}"
    )


# The method


def _expand_method(method: Any) -> str | dict[str, Any]:
    """A preset's name, or a mapping; a path is read. Raises as `resolve`."""
    if isinstance(method, (str, Path)) and str(method).endswith((".json", ".yaml", ".yml")):
        method = read_mapping(method)
    if isinstance(method, Mapping):
        method = _with_numbers(method)
    elif not isinstance(method, str):
        raise SettingsError(f"method must be a preset's name, a path or a mapping, not {method!r}")
    try:
        resolve(method)
    except ConfigError as error:
        raise ConfigError(f"method: {error}") from None
    return method


def _override_method(method: Any, overrides: Mapping[str, Any]) -> Any:
    """Lay dotted overrides over a method: `{"lora.rank": 4}`."""
    if not overrides:
        return method
    method = _expand_method(method)
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


def _split_method(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--method.part.field value` (or `=value`) out of a command line."""
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--method."):
            rest.append(word)
            continue
        key, equals, text = word.partition("=")
        if not equals:
            text = next(words, "")
        if not text or text.startswith("--"):
            raise SettingsError(f"{key} needs a value")
        overrides[key.removeprefix("--method.").replace("-", "_")] = _read_scalar(text, key)
    return rest, overrides


# Files and the command line


def _read_config(path: Path, above: tuple[Path, ...], also: Sequence[str] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise SettingsError(f"{path} names itself as its base, through {above[-1]}")
    own = read_mapping(path)
    bases = own.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SettingsError(f"{path}: base must be a path or a list of paths, not {bases!r}")
    values: dict[str, Any] = {}
    for base in bases:
        values |= _read_config(path.parent / base, (*above, path.resolve()))
    known = [item.name for item in fields(RunSettings)]
    overrides = {}
    for key in list(own):
        if key.startswith("method."):
            overrides[key.removeprefix("method.")] = _with_numbers(own.pop(key))
        elif key not in (*known, *also):
            raise SettingsError(f"{path}: {_unknown('field', key, known)}")
    for name in (*_FILES, "glue_dir", "method"):
        if isinstance(own.get(name), str):
            own[name] = locate_path(own[name], path)
    values |= own
    if overrides:
        values["method"] = _override_method(values.get("method", "unipelt-apl"), overrides)
    return values


def locate_path(name: str, config: Path) -> str:
    """A path from a configuration file: from the current folder, else from the root of the file's repository."""
    if os.path.isabs(name) or os.path.exists(name):
        return name
    for folder in config.resolve().parents:
        if any((folder / mark).exists() for mark in ("pyproject.toml", ".git")):
            return str(folder / name) if (folder / name).exists() else name
    return name


def _default_folder(config: str, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """`runs/` and a name that tells runs apart: the configuration file's, and the options that change the outcome."""
    options = {name: value for name, value in given.items() if name not in (*_INCIDENTAL, "glue_dir")}
    options |= {f"method.{key}": value for key, value in overrides.items()}
    parts = [Path(config).stem, *(f"{name}={_plain(value)}" for name, value in options.items())]
    return str(Path("runs") / clean_name("-".join(parts)))


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def clean_name(name: str) -> str:
    """A name that every file system takes."""
    clean = re.sub(r"[^\w.=+-]+", "_", name)
    return clean if len(clean) <= 120 else f"{clean[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SettingsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [CONFIG] [--FIELD VALUE ...] [--method.PART.FIELD VALUE ...]",
        description="Train one method on one task, test it once, and leave one result.json. CONFIG is a YAML or JSON "
        "file\n(see configs/); options win over it.",
        epilog=f"presets: {', '.join(PRESETS)}",
    )
    hints = get_type_hints(RunSettings)
    for item in fields(RunSettings):
        default = (
            "" if item.default is None else f" [{str(item.default).lower() if item.type == 'bool' else item.default}]"
        )
        options: dict[str, Any] = {"help": (item.metadata["help"] + default).replace("%", "%%")}
        if bool in (hints[item.name], *get_args(hints[item.name])):
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif get_origin(hints[item.name]) is Literal:
            options |= {"metavar": "|".join(get_args(hints[item.name]))}
        elif item.name == "text_columns":
            options |= {"nargs": "+", "metavar": "COLUMN"}
        else:
            options |= {"metavar": "VALUE"}
        names = dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}"))
        parser.add_argument(*names, dest=item.name, **options)
    return parser
