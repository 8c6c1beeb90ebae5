"""Every configuration in `configs/` is parsed, and started on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import DEPTH, WITH_PREFIX
from tiny_task import save_model, write_glue, write_sentences
from transformers import AutoModelForSequenceClassification

import unipelt
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings, parse, read_config

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".json"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    save_model(folder / "model")
    write_glue(folder / "glue")
    for name, rows in (("train", 60), ("dev", 20)):
        write_sentences(folder / f"{name}.tsv", rows, seed=rows)
    return folder


def test_there_are_some() -> None:
    assert {"demo.yaml", "rte-apl.yaml"} <= set(CONFIGS)


def small(home: Path, name: str) -> list[str]:
    """Options that make a configuration's run one of a second: a tiny model, tiny data, one epoch."""
    fields = read_config(FOLDER / name)
    options = ["--model", str(home / "model"), "--model_sha256", "null", "--epochs", "1", "--threads", "1"]
    options += ["--max_length", "16", "--device", "cpu"]
    if "train_file" in fields:
        options += ["--train_file", str(home / "train.tsv"), "--dev_file", str(home / "dev.tsv")]
    else:
        options += ["--glue_dir", str(home / "glue"), *([] if "task" in fields else ["--task", "sst2"])]
    if fields.get("train_samples") is not None:
        options += ["--train_samples", "32", "--dev_samples", "16"]
    return options


@pytest.mark.parametrize("name", CONFIGS)
def test_is_parsed_and_started(name: str, home: Path, tmp_path: Path) -> None:
    settings = parse([str(FOLDER / name), *small(home, name), "--output_dir", str(tmp_path / "out")])
    record = run(settings, say=lambda line: None)
    assert record["status"] == "finished"
    assert record["method"]["config"] == settings.config.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_has_a_row_in_the_readme_and_holds_only_what_differs(name: str) -> None:
    assert f"| `{name}` |" in (FOLDER / "README.md").read_text(encoding="utf-8")
    fields = read_config(FOLDER / name)
    given = {key: value for key, value in fields.items() if key not in ("model", "method")}
    defaults = {item: getattr(RunSettings, item, None) for item in given}
    repeated = [key for key, value in given.items() if value == defaults[key] and value is not None]
    assert repeated in ([], ["dev_samples"]), f"{repeated} is the default"


@pytest.mark.parametrize("family", ["roberta", "bart", "t5", "gpt2", "albert", "deberta-v2"])
def test_a_run_with_a_model_of_another_architecture(family: str, home: Path, tmp_path: Path) -> None:
    """BART's outputs hold more than logits, GPT-2's tokenizer has no padding token, ALBERT's layers are shared."""
    model = save_model(tmp_path / family, family)
    method = "unipelt-apl" if family in WITH_PREFIX else "unipelt-al"
    name = "bart.yaml" if family == "bart" else "roberta.yaml"
    options = [*small(home, name), "--model", str(model), "--method", method, "--do_predict", "true"]
    record = run(parse([str(FOLDER / name), *options, "--output_dir", str(tmp_path / "out")]), say=lambda line: None)
    assert record["status"] == "finished"
    assert record["model"]["class"].endswith("ForSequenceClassification")
    depth = {len(gate["mean"]) for gate in record["gates"]["values"].values()}
    assert depth == {DEPTH}
    assert ("cross.lora_value" in record["gates"]["values"]) == (family in ("bart", "t5"))
    again = unipelt.load(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=2), tmp_path / "out" / "model"
    )
    assert unipelt.parameter_counts(again).trained == record["parameters"]["trained"]
