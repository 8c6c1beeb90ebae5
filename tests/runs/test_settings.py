"""Settings: from files and the command line, checked before anything."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from unipelt.config.presets import PRESETS
from unipelt.glue.settings import RunSettings
from unipelt.runs.options import GROUPS, parse, read_config
from unipelt.runs.settings import SettingsError, TrainingSettings, clean_name, locate_model, paper_learning_rate
from unipelt.tasks.settings import QASettings, TranslationSettings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


# The command line


def test_every_field_is_an_option_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], RunSettings)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for item in dataclasses.fields(RunSettings):
        assert f"--{item.name}" in shown
        assert len(item.metadata["help"]) > 10
    assert "unipelt-apl-nogate" in shown
    assert "further options" not in shown


def test_the_groups_of_options_are_those_of_the_fields() -> None:
    """Each field of each kind of task is in one group."""
    kinds = (RunSettings, QASettings, TranslationSettings)
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted({item.name for kind in kinds for item in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", [RunSettings, QASettings, TranslationSettings])
def test_the_help_of_a_field_is_a_phrase_without_its_last_stop(kind: type[TrainingSettings]) -> None:
    """The default and the stop are added to it."""
    for item in dataclasses.fields(kind):
        said = item.metadata["help"]
        assert re.fullmatch(r"[A-Z].*[\w)\"]", said), f"{item.name}: {said}"


def test_options_of_every_kind() -> None:
    words = (
        "--train_file a.tsv --dev-file=b.tsv --text_columns premise hypothesis --regression false --train_samples none "
        "--seed 3 --learning_rate 5e-4 --warmup_ratio .1 --epochs=7 --patience null --precision bf16 --overwrite "
        "--keep_checkpoints false --label_column 7 --gradient_checkpointing true --output_dir out"
    )
    settings = parse(words.split(), RunSettings)
    wanted: dict[str, Any] = {
        "train_file": "a.tsv",
        "dev_file": "b.tsv",
        "text_columns": ("premise", "hypothesis"),
        "regression": False,
        "train_samples": None,
        "seed": 3,
        "data_seed": 3,
        "learning_rate": 5e-4,
        "warmup_ratio": 0.1,
        "epochs": 7,
        "patience": None,
        "precision": "bf16",
        "overwrite": True,
        "keep_checkpoints": False,
        "label_column": "7",
        "gradient_checkpointing": True,
        "output_dir": "out",
    }
    assert {name: getattr(settings, name) for name in wanted} == wanted


def test_one_text_is_one_column_whatever_it_says() -> None:
    for name in ("all", "0-3", "sentence"):
        settings = RunSettings(train_file="a.tsv", dev_file="b.tsv", text_columns=name)  # type: ignore[arg-type]
        assert settings.text_columns == (name,)


def test_method_options() -> None:
    words = (
        "--task rte --method unipelt-ap --method.adapter.bottleneck 7 --method.gate.pooling=mean --method.prefix null "
        "--method.train_head false --method.lora.alpha 1e1 --method.layers [0,2]"
    )
    config = parse(words.split(), RunSettings).config
    assert config.adapter is not None
    assert config.adapter.bottleneck == 7
    assert config.gate.pooling == "mean"
    assert config.prefix is None
    assert config.lora is not None, "a part that is absent starts from its defaults"
    assert config.lora.alpha == 10.0
    assert config.train_head is False
    assert config.layers == (0, 2)
    assert parse(["--task", "rte", "--method", "unipelt-ap"], RunSettings).config == PRESETS["unipelt-ap"]


def test_method_from_a_file() -> None:
    path = write("small.yaml", "preset: adapter\nadapter: {bottleneck: 4}\n")
    settings = parse(["--task", "rte", "--method", path, "--method.adapter.gate", "true"], RunSettings)
    assert settings.method == {"preset": "adapter", "adapter": {"bottleneck": 4, "gate": True}}
    Path(path).unlink()
    assert settings.config.adapter is not None, "the settings hold what the file said"


def test_method_has_a_name() -> None:
    names = {
        "unipelt-al": parse(["--task", "rte", "--method", "unipelt-al"], RunSettings),
        "unipelt-apl, lora.rank=4": parse(["--task", "rte", "--method.lora.rank", "4"], RunSettings),
        "unipelt-ap": parse(["--task", "rte", "--method.lora", "null"], RunSettings),
        'lora, gate.pooling="mean"': parse(
            ["--task", "rte", "--method", "lora", "--method.gate.pooling", "mean"], RunSettings
        ),
    }
    assert {name: settings.method_name for name, settings in names.items()} == {name: name for name in names}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--task rte --lerning_rate 1", "unknown option '--lerning_rate'; did you mean '--learning_rate'? (see "),
        ("--task rte --epoch 1", "unknown option '--epoch'; did you mean '--epochs'? (see "),
        ("--task rte extra.yaml", "a configuration file comes first"),
        ("--task", "expected one argument"),
        ("--task boolq", "unknown task 'boolq'; choose one of cola, sst2"),
        ("--task rt", "unknown task 'rt'; did you mean 'rte'?"),
        ("--task mrcp", "unknown task 'mrcp'; did you mean 'mrpc'?"),
        ("--task rte --method unipel", "method: there is no preset 'unipel'; did you mean 'unipelt'"),
        ("--task rte --method.lora.rnak 4", "method: unknown key 'lora.rnak'; did you mean 'rank'?"),
        ("--task rte --method.lora.rank four", "method: lora.rank must be a whole number, not 'four'"),
        ("--task rte --method.lora.rank", "--method.lora.rank needs a value"),
        ("--task rte --method.lora.rank --seed 1", "--method.lora.rank needs a value"),
        ("--task rte --epochs 1.5", "epochs must be a whole number, not 1.5"),
        ("--task rte --epochs 0", "epochs must be 1 or more, not 0"),
        ("--task rte --learning_rate fast", "learning_rate must be a finite number, not 'fast'"),
        ("--task rte --learning_rate nan", "learning_rate must be a finite number"),
        ("--task rte --learning_rate 0", "learning_rate must be above 0"),
        ("--task rte --warmup_ratio 1", "warmup_ratio is a fraction, at least 0 and below 1"),
        ("--task rte --overwrite maybe", "overwrite must be true or false, not 'maybe'"),
        ("--task rte --precision fp16", "precision must be fp32 or bf16, not 'fp16'"),
        ("--task rte --seed -1", "seed must be 0 or more, not -1"),
        ("--task rte --model_sha256 53aa", "model_sha256 must be 64 hexadecimal digits"),
        ("--task rte --train_file a.tsv", "task and train_file exclude each other"),
        ("--seed 1", "there is nothing to train on: name a task (--task rte) or a train_file"),
        ("--train_file a.tsv", "there is nothing to test on: give a dev_file beside the train_file"),
        ("--train_file a.tsv --train_samples 9", "give a dev_file or test_file beside the train_file"),
        ("--train_file a.tsv --dev_file b.tsv --glue_dir c", "glue_dir goes with a task"),
        ("nowhere.yaml", "there is no configuration file at nowhere.yaml"),
    ],
)
def test_bad_words(words: str, sentence: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        parse(words.split(), RunSettings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(Path().iterdir()) == []


ONE = ("epochs", "patience", "batch_size", "eval_batch_size", "train_samples", "dev_samples", "threads", "train_tokens")
NONE = ("weight_decay", "max_grad_norm", "num_workers", "eval_tokens", "seed", "data_seed", "warmup_ratio")


def rte(**changes: Any) -> RunSettings:
    return RunSettings(task="rte", **changes)


@pytest.mark.parametrize(
    ("name", "least", "below"),
    [*((name, 1, 0) for name in ONE), *((name, 0, -1) for name in NONE), ("max_length", 3, 2)],
)
def test_the_least_that_is_possible(name: str, least: int, below: int) -> None:
    value = getattr(rte(**{name: least}), name)
    assert value == least
    with pytest.raises(SettingsError, match=f"^{name} .*, not {below}"):
        rte(**{name: below})


@pytest.mark.parametrize("name", ["seed", "data_seed"])
def test_the_largest_seed(name: str) -> None:
    assert getattr(rte(**{name: 2**32 - 1}), name) == 2**32 - 1
    with pytest.raises(SettingsError, match=f"{name} must be below 4294967296, not 4294967296"):
        rte(**{name: 2**32})


@pytest.mark.parametrize(
    "name", ["model", "output_dir", "label_column", "train_file", "dev_file", "test_file", "glue_dir"]
)
def test_a_name_is_not_empty(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is empty"):
        rte(**{name: ""})


def test_dev_is_cut_from_the_train_file_only_with_train_samples() -> None:
    assert RunSettings(train_file="a.tsv", test_file="c.tsv", train_samples=9).dev_file is None
    with pytest.raises(SettingsError, match="give a dev_file beside"):
        RunSettings(train_file="a.tsv", test_file="c.tsv")


# Files


def test_file_bases_and_options_in_order() -> None:
    write("c/common.yaml", "epochs: 5\nseed: 4\nlearning_rate: 5e-4\n")
    write("c/large.json", '{"batch_size": 32, "seed": 5}')
    path = write("c/mine.yaml", "base: [common.yaml, large.json]\ntask: rte\nmethod: lora\nepochs: 6\n")
    settings = parse([path, "--batch_size", "8", "--method.lora.rank", "2"], RunSettings)
    assert (settings.learning_rate, settings.seed, settings.epochs, settings.batch_size) == (5e-4, 5, 6, 8)
    assert settings.method == {"preset": "lora", "lora": {"rank": 2}}
    write("c/above.yaml", "base: mine.yaml\nmethod.lora.alpha: 1e0\n")
    above = parse(["c/above.yaml"], RunSettings)
    assert above.epochs == 6
    assert above.config.lora is not None
    assert above.config.lora.alpha == 1.0
    assert above.config.prefix is None, "it starts from the base's method"


def test_method_in_a_file_replaces_that_of_its_base() -> None:
    write("base.yaml", "task: rte\nmethod: {preset: lora, lora: {rank: 2}}\n")
    settings = parse(
        [write("mine.yaml", "base: base.yaml\nmethod: {preset: adapter, adapter: {bottleneck: 3}}\n")], RunSettings
    )
    assert settings.config.lora is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("task: rte\nlerning_rate: 1\n", "unknown field 'lerning_rate'; did you mean 'learning_rate'? (see --help)"),
        ("task: rte\nepochs: '7'\n", "epochs must be a whole number, not '7'"),
        ("task: rte\nmodel: 7\n", "model must be a text, not 7"),
        ("task: rte\nlearning_rate: 1" + "0" * 400, "learning_rate must be a finite number, not 1000"),
        ("train_file: a.tsv\ntext_columns: [a, 7]\n", "text_columns must be a text, not 7"),
        ("train_file: a.tsv\ntext_columns: {a: b}\n", "text_columns must be a list, not {'a': 'b'}"),
        ("task: rte\nmethod: 7\n", "method must be a preset's name, a path or a mapping, not 7"),
        ("task: rte\nmethod: {adaptor: null}\n", "method: unknown key 'adaptor'"),
        ("task: rte\nbase: 7\n", "base must be a path or a list of paths, not 7"),
        ("task: rte\nbase: mine.yaml\n", "names itself as its base"),
        ("task: [rte\n", "is not valid YAML"),
        ("- task\n", "must hold one mapping"),
    ],
)
def test_bad_files(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is looked at below)
        parse([write("mine.yaml", text)], RunSettings)
    assert sentence in str(caught.value)
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_paths_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("repo/pyproject.toml", "")
    write("repo/data/train.tsv", "")
    write("repo/data/small.yaml", "preset: lora\n")
    text = "train_file: data/train.tsv\ndev_file: data/dev.tsv\nmethod: data/small.yaml\n"
    config = str(tmp_path / write("repo/configs/mine.yaml", text))
    values = read_config(config, RunSettings)
    assert values["train_file"] == str(tmp_path / "repo" / "data" / "train.tsv"), "from the repository's root"
    assert values["dev_file"] == "data/dev.tsv", "it is in neither place, so it stays as it was written"
    assert values["method"] == str(tmp_path / "repo" / "data" / "small.yaml")
    write("data/train.tsv", "")
    assert read_config(config, RunSettings)["train_file"] == "data/train.tsv", "the current folder comes first"


def test_a_configuration_s_data_may_lie_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site/data_package/__init__.py", "raise RuntimeError('imported')\n")
    write("site/data_package/data/train.tsv", "")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config = write("a.yaml", "train_file: package:data_package/data/train.tsv\n")
    place = str(tmp_path / "site" / "data_package" / "data" / "train.tsv")
    assert read_config(config, RunSettings) == {"train_file": place}
    for name, said in (
        ("data_package/dev.tsv", "'data_package' holds no file 'dev.tsv': there is no "),
        (
            "no_such_package/dev.tsv",
            r"the file is a part of .* which is not installed; .* \(pip install no-such-package\)",
        ),
        ("", "is not of the form package:NAME/FILE"),
    ):
        with pytest.raises(SettingsError, match=said):
            read_config(write("b.yaml", f"dev_file: 'package:{name}'\n"), RunSettings)


def test_default_folder_tells_runs_apart() -> None:
    config = write("c/rte-apl.yaml", "task: rte\n")

    def folder(*words: str) -> str | None:
        return parse([config, *words], RunSettings).output_dir

    assert folder() == str(Path("runs") / "rte-apl")
    assert folder("--seed", "3") == str(Path("runs") / "rte-apl-seed=3")
    assert folder("--seed", "3", "--overwrite", "--device", "cpu", "--threads", "2") == folder("--seed", "3")
    assert folder("--method.lora.rank", "4") == str(Path("runs") / "rte-apl-method.lora.rank=4")
    assert folder("--model", "some/where else") == str(Path("runs") / "rte-apl-model=some_where_else")
    assert folder("--output_dir", "x") == "x"
    assert parse([write("d.yaml", "task: rte\noutput_dir: y\n")], RunSettings).output_dir == "y"
    long = [str(parse([config, "--model", f"{letter * 200}"], RunSettings).output_dir) for letter in "ab"]
    assert long[0] != long[1]
    assert max(map(len, long)) < 140
    assert parse(["--task", "rte", "--method", "lora"], RunSettings).output_dir == str(Path("runs") / "rte-lora-seed=1")


def test_names_for_every_file_system() -> None:
    assert clean_name("some/where  else, lora.rank=4+x-y_z") == "some_where_else_lora.rank=4+x-y_z"
    assert clean_name("a" * 120) == "a" * 120
    assert len(clean_name("a" * 121)) == 119


# What follows from the rest


def test_defaults() -> None:
    expected = {
        **dict.fromkeys(("model_sha256", "glue_dir", "train_file", "dev_file", "test_file", "text_columns")),
        **dict.fromkeys(("regression", "train_samples", "train_tokens", "eval_tokens", "threads")),
        **dict.fromkeys(
            ("gradient_checkpointing", "overwrite", "do_predict", "keep_checkpoints", "pad_to_max_length"), False
        ),
        "model": "bert-base-uncased",
        "task": "rte",
        "label_column": "label",
        "dev_samples": 1000,
        "data_seed": 1,
        "seed": 1,
        "method": "unipelt-apl",
        "learning_rate": 5e-4,
        "epochs": 50,
        "patience": 10,
        "batch_size": 16,
        "eval_batch_size": 64,
        "max_length": 128,
        "weight_decay": 0.0,
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "precision": "fp32",
        "device": "auto",
        "num_workers": 0,
    }
    values = RunSettings(task="rte").to_dict()
    assert {name: values[name] for name in expected} == expected


def test_learning_rates_of_the_paper() -> None:
    rates = {name: paper_learning_rate(config) for name, config in PRESETS.items()}
    assert rates.pop("fine-tuning") == 2e-5
    assert (rates.pop("adapter"), rates.pop("bitfit"), rates.pop("prefix")) == (1e-4, 1e-4, 2e-4)
    assert set(rates.values()) == {5e-4}, "UniPELT's, which what is not in the paper has too"
    assert len(rates) == 20
    assert parse(["--task", "rte", "--method", "prefix"], RunSettings).learning_rate == 2e-4
    assert parse(["--task", "rte", "--method", "prefix", "--learning_rate", "1e-3"], RunSettings).learning_rate == 1e-3


def test_glue_dir_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIPELT_GLUE_DIR", "/data/glue")
    assert RunSettings(task="SST-2").glue_dir == "/data/glue"
    assert RunSettings(task="SST-2").task == "sst2"
    assert RunSettings(task="rte", glue_dir="here").glue_dir == "here"
    assert RunSettings(train_file="a.tsv", dev_file="b.tsv").glue_dir is None


def test_digest_is_of_what_determines_the_outcome() -> None:
    plain = RunSettings(task="rte")
    same = (
        RunSettings(task="RTE", output_dir="x", overwrite=True, threads=2, device="cpu", num_workers=2),
        RunSettings(task="rte", keep_checkpoints=True, eval_tokens=512),
        RunSettings(task="rte", method={"preset": "unipelt-apl", "lora": {"rank": 8}}, learning_rate=5e-4, data_seed=1),
    )
    other = (
        RunSettings(task="sst2"),
        RunSettings(task="rte", seed=2, data_seed=1),
        RunSettings(task="rte", data_seed=2),
        RunSettings(task="rte", method={"lora": {"rank": 4}}),
        RunSettings(task="rte", learning_rate=1e-3),
        RunSettings(task="rte", do_predict=True),
        RunSettings(task="rte", train_tokens=512),
    )
    assert {settings.digest() for settings in same} == {plain.digest()}
    assert len({settings.digest() for settings in (plain, *other)}) == 1 + len(other)
    assert len(plain.digest()) == 64


def test_a_new_field_at_its_default_changes_no_digest() -> None:
    """A run that was begun or finished by an older version is the same run."""
    older = {
        "e6c31669b440ee957d7aa0570604b45657929d3a6d93e37e8daf4c72ec091190": RunSettings(task="rte"),
        "77ecd8bcda4872a81501aea0d19a5688a6a01be1404bb3abb85a2d8663e27e24": QASettings(train_file="/a"),
        "e198f66fc8a298caf9ec86da20340f71ca58f355a54f54c5bb30ce63e5345a89": TranslationSettings(
            train_file="/a", dev_file="/b"
        ),
    }
    assert {settings.digest(): settings for settings in older.values()} == older


def test_digest_does_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RunSettings(train_file="a.tsv", dev_file="b.tsv").digest()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert RunSettings(train_file="../a.tsv", dev_file=str(tmp_path / "b.tsv")).digest() == here
    assert RunSettings(train_file="a.tsv", dev_file="b.tsv").digest() != here


def test_settings_are_plain_and_come_back() -> None:
    settings = parse(
        ["--train_file", "a.tsv", "--dev_file", "b.tsv", "--text_columns", "x", "--method.lora.rank", "2"], RunSettings
    )
    assert RunSettings(**settings.to_dict()) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 2  # type: ignore[misc]


# The model


def test_model_inside_a_package_that_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site/some_package/__init__.py", "raise RuntimeError('imported')\n")
    write("site/some_package/model/config.json", "{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate_model("package:some_package/model") == str(tmp_path / "site" / "some_package" / "model")
    assert "some_package" not in sys.modules
    with pytest.raises(ValueError, match=r"'some_package' holds no model at 'weights'"):
        locate_model("package:some_package/weights")


def test_model_that_is_not_in_a_package() -> None:
    assert locate_model("bert-base-uncased") == "bert-base-uncased"
    with pytest.raises(ValueError, match=r"'no_such_package', which is not installed; install the extra 'demo'"):
        locate_model("package:no_such_package/model")
    with pytest.raises(ValueError, match="is not of the form package:NAME/FOLDER"):
        locate_model("package:")
