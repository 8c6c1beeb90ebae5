"""The settings that every run has, in a frozen dataclass. The fields are checked before a run starts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from unipelt.config.methods import UniPELTConfig
from unipelt.config.peft import PeftTermConfig
from unipelt.config.peft_types import check_tuner
from unipelt.config.presets import PRESETS, resolve
from unipelt.config.schema import ConfigError, convert, flatten, read_mapping, type_hints
from unipelt.config.subsets import refusal_of_select
from unipelt.files.messages import show
from unipelt.files.strict import PlainError, parse_yaml
from unipelt.runs.average_options import check_average
from unipelt.runs.trainer_options import check_options

INCIDENTAL = ("output_dir", "overwrite", "keep_checkpoints", "device", "num_workers", "threads", "eval_tokens")
"""Fields that set how a run is carried out. They are not a part of the run's identity."""


FILES = ("train_file", "dev_file", "test_file")


PATHS = (*FILES, "glue_dir", "tasks_dir")
"""Fields that are paths of data, for all kinds of tasks."""


INNER = ("trainer", "rates", "average")
"""Fields that are mappings from names to values. Each name is an option of its own: `trainer.NAME`."""


_POSITIVE = (
    *("epochs", "patience", "batch_size", "eval_batch_size", "train_samples", "dev_samples", "test_samples", "threads"),
    "train_tokens",
    *("n_best", "max_answer_length", "beams", "max_target_length", "random_width", "random_layers", "vocabulary"),
)


_NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "num_workers", "eval_tokens", "seed", "data_seed"),
    *("split_seed", "stride", "skip_samples"),
)


LATER: dict[str, Any] = {
    **dict.fromkeys(("test_samples", "train_tokens", "trainer", "rates", "average")),
    **dict.fromkeys(("pad_to_max_length", "select"), False),
}
"""Fields that were added later, each with a value that leaves a run as it was before the field was added."""


_NAMES = ("label_column", "source", "target")


_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")  # YAML 1.1 reads these numbers as strings


class SettingsError(ValueError):
    """Error of invalid settings. The message names the setting, its value and the possible values."""


def option(default: Any, help_: str) -> Any:
    """Return a dataclass field with a default value and a text for `--help`."""
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run of any task. The `help` of each field says its meaning.

    A kind of task adds its fields in a subclass, and checks them in `_check_data`.

    Raises:
        SettingsError, ConfigError: a value is invalid, or two values contradict each other.
        FileNotFoundError: the method is a path, and the file does not exist.
    """

    arguments: ClassVar[str] = "TrainingArguments"  # the class of Trainer's arguments in transformers
    alias_needs: ClassVar[Mapping[str, str]] = {}  # usual option: the setting that it has no effect without

    model: str = option(
        "bert-base-uncased",
        "Pretrained model: a name on the hub, a folder, or package:NAME/FOLDER for a folder in an installed Python "
        "package",
    )
    model_sha256: str | None = option(
        None, "SHA-256 of the model's model.safetensors. A file with another one is refused"
    )
    task: str | None = option(None, "Name of a known task")
    train_file: str | None = option(None, "Your own training data, in place of a task")
    dev_file: str | None = option(None, "Your own dev data")
    test_file: str | None = option(None, "Your own test data")
    train_samples: int | None = option(
        None, "K, the number of training examples: the first K of the shuffled train data"
    )
    dev_samples: int = option(1000, "Number of examples in the dev set")
    data_seed: int | None = option(None, "Seed of the shuffle of the train data. Default: the value of seed")
    test_samples: int | None = option(
        None, "Number of test rows. They are the same rows in every run and for every seed. Default: all"
    )
    seed: int = option(1, "Seed of initialisation, dropout and the order of examples")
    method: str | Mapping[str, Any] = option(
        "unipelt-apl",
        "Method: the name of a preset, the path of a JSON or YAML file, or a mapping, on the command line as JSON. "
        "--method.lora.rank 4 sets a field of it, and --method.prefix null leaves the prefix out",
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate. Default: the paper's for BERT-base, which is 2e-5 for fine-tuning, 1e-4 for adapter and "
        "bitfit, 2e-4 for prefix, and 5e-4 for lora and combinations",
    )
    rates: Mapping[str, float] | None = option(
        None,
        "Peak learning rates of parts that learning_rate is not for. In CONFIG it is a mapping. --rates.lora 1e-3 sets "
        "one. Parts are those of the method, gate, head and lora_b",
    )
    epochs: int = option(50, "Largest number of passes over the train data")
    patience: int | None = option(
        10, "Number of epochs without a better dev score after which training stops. null means never"
    )
    batch_size: int = option(16, "Number of examples in a training step")
    eval_batch_size: int = option(64, "Number of examples in a batch of evaluation")
    max_length: int = option(128, "Largest number of tokens of a text, special tokens included. Longer texts are cut")
    weight_decay: float = option(0.0, "Weight decay of AdamW")
    warmup_ratio: float = option(0.0, "Fraction of all steps in which the learning rate rises from 0")
    max_grad_norm: float = option(
        1.0, "Largest norm of the gradients. Larger ones are scaled down to it. 0 means no limit"
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "Number format of training: fp32, or bf16 for bfloat16 autocast"
    )
    gradient_checkpointing: bool = option(
        False, "Activations are computed again in the backward pass. This saves memory and costs time"
    )
    trainer: Mapping[str, Any] | None = option(
        None,
        "Further options for Transformers' Trainer. In CONFIG it is a mapping. --trainer.lr_scheduler_type cosine sets "
        "one",
    )
    average: Mapping[str, float] | None = option(
        None,
        "Average of the trained weights, one more candidate beside the epochs: tested if its dev score is not lower. "
        "In CONFIG it is a mapping. --average.last 5 is the mean over the last 5 evaluations (epochs), --average.ema "
        "0.99 a moving average over the steps",
    )
    select: bool = option(
        False,
        "After training, the subset of the submodules with the best dev score is chosen, and the others are removed. "
        "This takes 7 passes over the dev data for three submodules",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device: auto, cpu or cuda. auto takes a GPU where there is one"
    )
    num_workers: int = option(0, "Number of processes that prepare batches. 0 means the main process")
    threads: int | None = option(None, "Number of CPU threads. Default: the choice of PyTorch")
    output_dir: str | None = option(
        None,
        "Folder of the result. Default: runs/ and a name made of the configuration file and the options",
    )
    overwrite: bool = option(False, "A result in the folder is replaced, of this run or of another")
    keep_checkpoints: bool = option(False, "The last and the best checkpoint of training are kept after the run")

    def __post_init__(self) -> None:
        self._check_types()
        self._check_values()
        self._check_trainer()
        self._check_data()
        object.__setattr__(self, "method", expand_method(self.method))
        self._check_tuners()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", paper_learning_rate(self.config))
        self._check_rates()
        try:
            object.__setattr__(self, "average", check_average(with_numbers(self.average), self.epochs))
        except ConfigError as error:
            raise SettingsError(str(error)) from None
        if self.select and (problem := refusal_of_select(self.config)):
            raise SettingsError(f"{problem}; or leave select out")
        if self.data_seed is None:
            object.__setattr__(self, "data_seed", self.seed)
        if self.output_dir is None:
            name = clean_name(f"{self._data_name()}-{self.method_name}-seed={self.seed}")
            object.__setattr__(self, "output_dir", str(Path("runs") / name))

    def _check_data(self) -> None:
        """Check that the fields that name data do not contradict each other. The data are not read."""

    def _check_trainer(self) -> None:
        """Check the options for Trainer, and that they do not contradict other settings."""
        try:
            options = check_options(with_numbers(self.trainer), self.arguments)
        except ConfigError as error:
            raise SettingsError(str(error)) from None
        object.__setattr__(self, "trainer", options)
        if options is None:
            return
        if self.warmup_ratio and options.get("warmup_steps"):
            raise SettingsError("warmup_ratio and trainer.warmup_steps exclude each other; leave one of them out")
        if options.get("fp16") and self.precision != "fp32":
            raise SettingsError("precision bf16 and trainer.fp16 exclude each other; leave one of them out")
        if options.get("fp16") and self.device == "cpu":
            raise SettingsError("trainer.fp16 needs a GPU, and device is cpu; leave it out, or take precision bf16")

    def _check_tuners(self) -> None:
        """Check the types and the options of PEFT's tuners, which needs PEFT."""
        for part in self.config.more:
            if isinstance(part, PeftTermConfig):
                try:
                    check_tuner(part)
                except (ConfigError, ImportError) as error:
                    raise SettingsError(f"method: {error}") from error

    def _check_rates(self) -> None:
        """Check that the method has the parts in `rates`, and that each rate is a valid learning rate."""
        rates = with_numbers(self.rates)
        if rates is not None and not isinstance(rates, Mapping):
            raise SettingsError(f"rates must be a mapping of parts to learning rates, not {show(rates)}")
        rates = {name: rate for name, rate in (rates or {}).items() if rate is not None}
        object.__setattr__(self, "rates", rates or None)
        if not rates:
            return
        config = self.config
        parts = [*config.submodule_names, *(["tokens"] if config.tokens is not None else [])]
        known = dict.fromkeys(parts)
        if any(getattr(config.part(name), "gate", False) for name in parts):
            known["gate"] = None
        if config.train_head:
            known["head"] = None
        if "lora" in known:
            known["lora_b"] = None
        for name, rate in rates.items():
            if name not in known:
                raise SettingsError(
                    f"rates.{name}: {self.method_name} trains no such part; its parts are {', '.join(known) or 'none'}"
                )
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e6:
                raise SettingsError(f"rates.{name} must be a learning rate above 0, not {show(rate)}")

    def _data_name(self) -> str:
        """Return the name of the data, for the name of the output folder."""
        return self.task or Path(str(self.train_file)).stem

    def _check_types(self) -> None:
        hints = type_hints(type(self))
        for name, hint in ((item.name, hints[item.name]) for item in fields(self)):
            if name in ("method", *INNER):
                continue
            value = getattr(self, name)
            if float in (hint, *get_args(hint)):
                value = _as_number(value)
            try:
                object.__setattr__(self, name, convert(hint, value, name))
            except ConfigError as error:
                raise SettingsError(str(error)) from None

    def _check_values(self) -> None:
        for name, least in (*dict.fromkeys(_POSITIVE, 1).items(), *dict.fromkeys(_NOT_NEGATIVE, 0).items()):
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise SettingsError(f"{name} must be {least} or more, not {show(value)}")
        for item in fields(self):  # a seed has 32 bits, and no other field needs a larger number
            value = getattr(self, item.name)
            if type(value) is int and value >= 2**32:
                raise SettingsError(f"{item.name} must be below {2**32}, not {show(value)}")
        if self.learning_rate == 0:
            raise SettingsError("learning_rate must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise SettingsError(f"warmup_ratio is a fraction, at least 0 and below 1, not {self.warmup_ratio}")
        if self.max_length < 3:
            raise SettingsError(f"max_length must be 3 or more tokens, not {show(self.max_length)}")
        for name in ("model", "output_dir", *PATHS, *_NAMES):
            if getattr(self, name, None) == "":
                raise SettingsError(f"{name} is empty; give a value or leave it out")
        if self.model_sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.model_sha256):
            raise SettingsError(
                f"model_sha256 must be 64 hexadecimal digits in lower case, not {show(self.model_sha256)}"
            )

    @property
    def config(self) -> UniPELTConfig:
        """The resolved configuration of the method."""
        return resolve(self.method)

    @property
    def method_name(self) -> str:
        """The name of the preset and the fields that differ from the preset, as in `unipelt-apl, lora.rank=4`."""
        preset = (self.method.get("preset") or "unipelt-apl") if isinstance(self.method, Mapping) else self.method
        config = self.config
        for name, known in PRESETS.items():
            if config == known:
                return name
        before, after = flatten(PRESETS[preset].to_dict()), flatten(config.to_dict())
        changed = [f"{key}={json.dumps(after[key])}" for key in after if after[key] != before.get(key, MISSING)]
        return ", ".join([preset, *changed])

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain types that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Return the fields that determine the outcome, without the fields of `INCIDENTAL`. Paths are absolute."""
        values = {name: value for name, value in self.to_dict().items() if name not in INCIDENTAL}
        for name in PATHS:
            if values.get(name) is not None:
                values[name] = os.path.abspath(values[name])
        for name, default in LATER.items():  # the digest of an older run must not change
            if values.get(name, MISSING) is default:
                del values[name]
        values["method"] = self.config.to_dict()
        return values

    def digest(self) -> str:
        """Return the SHA-256 of `identity`, in hexadecimal. Two runs with the same digest are the same run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def paper_learning_rate(config: UniPELTConfig) -> float:
    """Return the learning rate of the paper for a method on BERT-base (section 4.1).

    A submodule or a combination that the paper lacks gets the learning rate of UniPELT, 5e-4.
    """
    if config.train_base:
        return 2e-5
    parts = config.submodule_names
    if parts in ([], ["adapter"]):
        return 1e-4
    return 2e-4 if parts == ["prefix"] else 5e-4


def expand_method(method: Any) -> str | dict[str, Any]:
    """Return a method as the name of a preset or as a mapping. A path, and a text that holds a mapping, are read.

    Raises:
        SettingsError, ConfigError: the method is invalid.
        FileNotFoundError: the method is a path, and the file does not exist.
    """
    if isinstance(method, (str, Path)) and str(method).endswith((".json", ".yaml", ".yml")):
        method = read_mapping(method)
    elif isinstance(method, str) and method.lstrip().startswith("{"):
        try:
            method = parse_yaml(method)
        except PlainError as error:
            raise SettingsError(f"method: cannot read the mapping {show(method)}: {error}") from error
    if isinstance(method, Mapping):
        method = with_numbers(method)
    elif not isinstance(method, str):
        raise SettingsError(f"method must be a preset's name, a path or a mapping, not {show(method)}")
    try:
        resolve(method)
    except ConfigError as error:
        raise ConfigError(f"method: {error}") from None
    return method


def with_numbers(value: Any) -> Any:
    """Return the same value with texts such as `5e-4`, which YAML 1.1 reads as text, turned into numbers."""
    if isinstance(value, Mapping):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _as_number(value: Any) -> Any:
    """Return the number that a text spells. Return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def clean_name(name: str) -> str:
    """Return a form of the name that every file system accepts, with at most 120 characters."""
    clean = re.sub(r"[^\w.=+-]+", "_", name)
    return clean if len(clean) <= 120 else f"{clean[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def locate_model(model: str) -> str:
    """Return the folder of `package:NAME/FOLDER` without importing the package. Return other names unchanged.

    Raises:
        SettingsError: the package is not installed, or has no such folder.
    """
    if not model.startswith("package:"):
        return model
    package, inside, folders = _in_package(model, "the model", "FOLDER")
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise SettingsError(f"the package {package!r} holds no model at {inside!r}: {folders[0]} has no config.json")
    return str(found[0])


def locate_file(name: str) -> str:
    """Return the path of the file `package:NAME/FILE` without importing the package.

    Raises:
        SettingsError: the package is not installed, or has no such file.
    """
    package, inside, places = _in_package(name, "the file", "FILE")
    found = [place for place in places if place.is_file()]
    if not found:
        raise SettingsError(f"the package {package!r} holds no file {inside!r}: there is no {places[0]}")
    return str(found[0])


def _in_package(name: str, what: str, form: str) -> tuple[str, str, list[Path]]:
    """Return the package of `package:NAME/PATH`, the path inside the package, and the places where the path may be.

    Raises:
        SettingsError: the name has another form, or the package is not installed.
    """
    package, _, inside = name.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise SettingsError(f"{show(name)} is not of the form package:NAME/{form}")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            f"{what} is a part of the Python package {package!r}, which is not installed; "
            f"install the extra 'demo' or the package itself (pip install {package.replace('_', '-')})"
        )
    return package, inside, [Path(place) / inside for place in spec.submodule_search_locations]
