"""Every file of `configs/` is parsed, listed, and started for one step on a tiny model and tiny data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from tiny_task import save_model, write_glue, write_sentences

from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings, parse, read_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEFAULTS = {item.name: item.default for item in dataclasses.fields(RunSettings)}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "model")
    write_glue(folder / "glue")
    write_sentences(folder / "train.tsv", 60, seed=1)
    write_sentences(folder / "dev.tsv", 20, seed=2)
    return folder


def whole(config: Path) -> list[str]:
    """The words that start a configuration: a base of others needs a task."""
    needs_task = not {"task", "train_file"} & read_config(config).keys()
    return [str(config), *(["--task", "rte"] if needs_task else [])]


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 5
    assert not [path for path in (ROOT / "configs").iterdir() if path.suffix not in (".yaml", ".md")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_starts(config: Path, tiny: Path, tmp_path: Path) -> None:
    parsed = parse(whole(config))
    data = (
        ["--glue_dir", str(tiny / "glue")]
        if parsed.task is not None
        else ["--train_file", str(tiny / "train.tsv"), "--dev_file", str(tiny / "dev.tsv")]
    )
    samples = ["--train_samples", "8", "--dev_samples", "8"] if parsed.train_samples is not None else []
    sizes = ["--epochs", "1", "--batch_size", "60", "--max_length", "32", "--threads", "1", "--device", "cpu"]
    model = ["--model", str(tiny / "model"), "--model_sha256", "null"]
    chosen = parse([*whole(config), *data, *samples, *sizes, *model, "--output_dir", str(tmp_path / "run")])
    record = run(chosen, say=lambda line: None)
    assert [item["step"] for item in record["evaluations"]] == [1]
    assert record["method"] == {
        "name": parsed.method_name,
        "config": parsed.config.to_dict(),
        "learning_rate": parsed.learning_rate,
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_holds_only_what_differs(config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    bases = values.pop("base", [])
    below = dict(DEFAULTS)
    for base in [bases] if isinstance(bases, str) else bases:
        below |= read_config(config.parent / base)
    # the method may be named all the same: the file is called after it
    assert not [key for key, value in values.items() if key != "method" and below.get(key) == value]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_listed_with_its_command(config: Path) -> None:
    rows = [line for line in (ROOT / "configs" / "README.md").read_text().splitlines() if line.startswith("| [")]
    row = [line for line in rows if line.startswith(f"| [{config.name}]({config.name}) |")]
    assert len(row) == 1
    command = row[0].split("`")[-2].split()
    assert command[:3] == ["python", "examples/run_glue.py", f"configs/{config.name}"]
    assert isinstance(parse(command[2:]), RunSettings)


def test_list_names_no_other_files() -> None:
    rows = [line for line in (ROOT / "configs" / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == len(CONFIGS)


def test_demo_data_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = parse(["configs/demo.yaml"])
    assert here.train_file == "examples/demo/train.tsv"
    monkeypatch.chdir(tmp_path)
    there = parse([str(ROOT / "configs" / "demo.yaml")])
    assert there.train_file == str(ROOT / "examples" / "demo" / "train.tsv")
    assert there.output_dir == here.output_dir == str(Path("runs") / "demo")
