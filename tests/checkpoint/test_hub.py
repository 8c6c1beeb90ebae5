"""Onto a hub and back: real files over real HTTP, against the stand-in of `hub_server.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import trained
from hub_server import READER, Hub, only_hub
from huggingface_hub import ModelCard, constants
from records.test_record import make_record
from tiny import tiny_batch
from tiny_task import make_quick, quick, save_model
from torch import Tensor
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments

import unipelt
from unipelt.checkpoint.manifest import CheckpointError
from unipelt.checkpoint.model_card import model_card, task_of
from unipelt.cli import main
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import ResultError, read_result, write_result

BASE = "owner/tiny"
NAME = "somebody/sentiment"
TEXTS = ["the cat was lovely", "a dull grey dog sat on the mat"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with only_hub(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model: configuration, weights, tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.id2label = {0: "bad", 1: "good"}
    torch.manual_seed(3)
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(hub: Hub, base_files: dict[str, bytes]) -> Any:
    """A trained model whose base is on the hub."""
    hub.publish(BASE, base_files)
    return trained(model=BertForSequenceClassification.from_pretrained(BASE))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch()).logits
    return found


def batch() -> dict[str, Tensor]:
    made = tiny_batch("bert")
    return {**made, "input_ids": made["input_ids"] % 20}


def read_by(hub: Hub, name: str) -> set[str]:
    """The files of a repository that were asked for."""
    found = (re.fullmatch(rf"(?:GET|HEAD) /{name}/resolve/[^/]+/(.*)", line) for line in hub.requests)
    return {match[1] for match in found if match}


def test_there_and_back(hub: Hub, model: Any) -> None:
    address = unipelt.push_to_hub(model, NAME, message="the third epoch")
    repository = hub.repositories[NAME]
    sha = repository.branches["main"]
    assert address == f"{hub.endpoint}/{NAME}/commit/{sha}"
    assert repository.messages == ["initial commit", "the third epoch"], "one commit"
    assert sorted(repository.commits[sha]) == [".gitattributes", "README.md", "model.safetensors", "unipelt.json"]
    assert not repository.private
    again: Any = unipelt.from_pretrained(NAME)
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert again.config.id2label == {0: "bad", 1: "good"}
    assert again.unipelt_injection.deployed, "the smaller form, unless the other is asked for"
    assert read_by(hub, NAME) == {"unipelt.json", "model.safetensors"}


def test_the_training_form(hub: Hub, model: Any) -> None:
    unipelt.push_to_hub(model, NAME, deploy=False)
    again: Any = unipelt.from_pretrained(NAME)
    assert not again.unipelt_injection.deployed
    assert torch.equal(logits(again), logits(model))


def test_the_models_own_method(hub: Hub, model: Any) -> None:
    """What Transformers calls `push_to_hub` uploads ours too, and is Transformers' own again without submodules."""
    assert model.push_to_hub(NAME, private=True).startswith(f"{hub.endpoint}/{NAME}/commit/")
    assert hub.repositories[NAME].private
    assert f'model = unipelt.from_pretrained("{NAME}")' in published_card(hub)
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    unipelt.remove(model)
    assert "push_to_hub" not in vars(model)


def test_the_base_is_the_commit_that_was_trained_on(hub: Hub, model: Any, base_files: dict[str, bytes]) -> None:
    sha = hub.repositories[BASE].branches["main"]
    unipelt.push_to_hub(model, NAME)
    manifest = json.loads(hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]["unipelt.json"])
    assert (manifest["base"]["name_or_path"], manifest["base"]["revision"]) == (BASE, sha)
    weights = base_files["model.safetensors"]
    hub.publish(BASE, {"model.safetensors": weights[:-400] + weights[-100:] + weights[-300:]})
    hub.repositories[BASE].commit("broken", {**base_files, "model.safetensors": b""}, "by hand")
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    with pytest.raises(CheckpointError, match="its weights differ"):
        unipelt.from_pretrained(NAME, base_revision=hub.repositories[BASE].branches["main"])
    with pytest.raises(CheckpointError, match="cannot be built"):
        unipelt.from_pretrained(NAME, base_revision="broken")


def test_another_base_is_refused(hub: Hub, model: Any, base_files: dict[str, bytes], tmp_path: Path) -> None:
    unipelt.push_to_hub(model, NAME)
    other = BertForSequenceClassification.from_pretrained(BASE)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="its weights differ"):
        unipelt.from_pretrained(NAME, base=tmp_path / "other")


def test_without_the_hub_from_the_cache(hub: Hub, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unipelt.push_to_hub(model, NAME)
    unipelt.from_pretrained(NAME)
    asked = len(hub.requests)
    assert torch.equal(logits(unipelt.from_pretrained(NAME, local_files_only=True)), logits(model))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    assert len(hub.requests) == asked
    with pytest.raises(unipelt.HubError, match=r"no folder 'somebody/else' here; .*HF_HUB_OFFLINE is set"):
        unipelt.from_pretrained("somebody/else")
    with pytest.raises(unipelt.HubError, match=r"only that was looked into"):
        unipelt.from_pretrained("somebody/else", local_files_only=True)
    with pytest.raises(unipelt.HubError, match="HF_HUB_OFFLINE is set"):
        unipelt.push_to_hub(model, NAME)


def test_branches_and_pull_requests(hub: Hub, model: Any) -> None:
    unipelt.push_to_hub(model, NAME)
    first = logits(model)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    unipelt.push_to_hub(model, NAME, revision="v2")
    address = unipelt.push_to_hub(model, NAME, create_pr=True)
    assert address.endswith("/discussions/1")
    repository = hub.repositories[NAME]
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), first)
    for revision in ("v2", repository.branches["v2"], "refs/pr/1"):
        assert torch.equal(logits(unipelt.from_pretrained(NAME, revision=revision)), logits(model)), revision
    with pytest.raises(unipelt.HubError, match="it has no revision 'v3'"):
        unipelt.from_pretrained(NAME, revision="v3")


def test_a_private_repository(hub: Hub, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unipelt.push_to_hub(model, NAME, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(unipelt.HubError, match=r"not there, or is not for everybody .* pass token"):
        unipelt.from_pretrained(NAME)
    assert torch.equal(logits(unipelt.from_pretrained(NAME, token=READER)), logits(model))
    with pytest.raises(unipelt.HubError, match=r"writing to 'somebody/sentiment' .* does not allow it \(403\)"):
        unipelt.push_to_hub(model, NAME, token=READER)
    with pytest.raises(unipelt.HubError, match=r"does not allow it \(401\); log in \(hf auth login\)"):
        unipelt.push_to_hub(model, NAME)


def test_a_hub_that_is_broken_or_gone(hub: Hub, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fails = 418
    with pytest.raises(unipelt.HubError, match="418"):
        unipelt.push_to_hub(model, NAME)
    with pytest.raises(unipelt.HubError, match="418"):
        unipelt.from_pretrained(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(unipelt.HubError, match="the hub was not reached"):
        unipelt.push_to_hub(model, NAME)
    with pytest.raises(unipelt.HubError, match="the hub was not reached"):
        unipelt.from_pretrained(NAME)


def test_other_files_are_not_read(hub: Hub, model: Any, tmp_path: Path) -> None:
    """Whatever a stranger put beside the two that count: a pickle, code, a configuration that names code."""
    unipelt.push_to_hub(model, NAME)
    bad = {"pytorch_model.bin": b"cos\nsystem\n.", "modeling.py": b"1/0", "config.json": b'{"auto_map": {}}'}
    hub.publish(NAME, {**bad, "adapter_model.bin": b"", "weights/model.safetensors": b""})
    unipelt.from_pretrained(NAME)
    unipelt.load_tokenizer(NAME)
    assert read_by(hub, NAME) == {"unipelt.json", "model.safetensors"}
    assert not [
        path for path in (tmp_path / "cache" / "models--somebody--sentiment").rglob("*") if path.suffix == ".py"
    ]


def test_a_repository_that_is_no_checkpoint(hub: Hub, model: Any) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'owner/tiny' on the hub is not a checkpoint of unipelt: .*unipelt.json"
    ):
        unipelt.from_pretrained(BASE)
    unipelt.push_to_hub(model, NAME)
    hub.publish(NAME, {"model.safetensors": b"other"})
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        unipelt.from_pretrained(NAME)


def test_a_stranger_names_no_folder_here(hub: Hub, model: Any, tmp_path: Path) -> None:
    unipelt.push_to_hub(model, NAME)
    model.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "unipelt.json").read_text())
    for place in ("/etc/models", "../models", "C:\\models", "a/b/c"):
        manifest["base"]["name_or_path"] = place
        hub.publish(
            NAME,
            {
                "unipelt.json": json.dumps(manifest).encode(),
                "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
            },
        )
        with pytest.raises(CheckpointError, match=r"its base was in a folder .* say base="):
            unipelt.from_pretrained(NAME)
        with pytest.raises(CheckpointError, match=r"say base="):
            unipelt.load_tokenizer(NAME)
    assert torch.equal(logits(unipelt.from_pretrained(NAME, base=BASE)), logits(model))


def test_folders_come_first(hub: Hub, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unipelt.save(model, NAME)
    asked = sum(NAME in line for line in hub.requests)
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    assert sum(NAME in line for line in hub.requests) == asked
    with pytest.raises(ValueError, match="is a folder, which has no revisions"):
        unipelt.from_pretrained(NAME, revision="main")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        unipelt.from_pretrained(Path("somebody/nothing"))  # a path is one, and is looked for nowhere else


@pytest.mark.parametrize("deploy", [False, True])
def test_a_folded_model(hub: Hub, model: Any, deploy: bool) -> None:
    unipelt.fold(model, [batch()], tolerance=1.0)
    unipelt.push_to_hub(model, NAME, deploy=deploy)
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    assert "(folded)" in published_card(hub)


def test_what_trainer_uploads(hub: Hub, model: Any, tmp_path: Path) -> None:
    """`Trainer.push_to_hub` writes its own card; what it puts beside it is read all the same."""
    options: dict[str, Any] = {"hub_model_id": NAME, "use_cpu": True, "report_to": "none"}
    Trainer(model, TrainingArguments(output_dir=str(tmp_path / "out"), **options)).push_to_hub()
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))


def published_card(hub: Hub) -> str:
    """The model card that is on the hub now."""
    repository = hub.repositories[NAME]
    return repository.commits[repository.branches["main"]]["README.md"].decode()


# --- a base that was in a folder


def test_a_base_of_a_folder_must_have_a_name(hub: Hub, base_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.publish(BASE, base_files)
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in base_files.items():
        (folder / name).write_bytes(content)
    model = trained(model=BertForSequenceClassification.from_pretrained(folder))
    before = list(hub.requests)
    with pytest.raises(ValueError, match=r"came from .*base, where nobody else can get it; say base='user/name'"):
        unipelt.push_to_hub(model, NAME)
    with pytest.raises(ValueError, match="nobody else can get it"):
        unipelt.push_to_hub(model, NAME, base=str(folder))
    assert hub.requests == before, "nothing was asked, still less uploaded"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unipelt.push_to_hub(model, NAME, base=BASE, base_revision="main", tokenizer=tokenizer)
    repository = hub.repositories[NAME]
    files = repository.commits[repository.branches["main"]]
    described = json.loads(files["unipelt.json"])["base"]
    assert (described["name_or_path"], described["revision"]) == (BASE, "main")
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content], "no path of this machine"
    assert torch.equal(logits(unipelt.from_pretrained(NAME)), logits(model))
    read: Any = unipelt.load_tokenizer(NAME)
    assert read(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert "tokenizer.json" in read_by(hub, NAME)


def test_a_base_that_was_built_in_memory(hub: Hub) -> None:
    with pytest.raises(ValueError, match="was built in memory"):
        unipelt.push_to_hub(trained(), NAME)


@pytest.mark.parametrize("name", ["", "x", "a/b/c", "/a/b", "../b", "a/", "a b/c", "a--b/c", None, Path("a/b")])
def test_names_that_are_none(hub: Hub, model: Any, name: Any) -> None:
    with pytest.raises(ValueError, match=r"called 'user/name', not"):
        unipelt.push_to_hub(model, name)
    assert not [line for line in hub.requests if line.startswith("POST")]


def test_the_tokenizer_of_the_base(hub: Hub, model: Any) -> None:
    unipelt.push_to_hub(model, NAME)
    read: Any = unipelt.load_tokenizer(NAME)
    assert read(TEXTS)["input_ids"] == AutoTokenizer.from_pretrained(BASE)(TEXTS)["input_ids"]
    with pytest.raises(ValueError, match="tokenizer must be one of Transformers, not str"):
        unipelt.push_to_hub(model, NAME, tokenizer="bert")  # type: ignore[arg-type]


def test_nothing_was_injected(hub: Hub) -> None:
    with pytest.raises(ValueError, match="carries no submodules"):
        unipelt.push_to_hub(trained("lora").base_model, NAME)


# --- a run, its scores and its gates


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`."""
    folder = make_quick(tmp_path_factory.mktemp("home"))
    run(RunSettings(**quick(folder, method="unipelt-apl", output_dir=str(folder / "run"))), log=lambda line: None)
    return folder


@pytest.fixture
def published(hub: Hub, home: Path) -> None:
    hub.publish(BASE, {path.name: path.read_bytes() for path in (home / "model").iterdir()})


@pytest.mark.usefixtures("published")
def test_a_run_with_its_scores(hub: Hub, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["push", str(home / "run"), NAME, "--base", BASE, "--license", "apache-2.0", "--message", "hello"]
    assert main(command) == 0
    repository = hub.repositories[NAME]
    assert f"{hub.endpoint}/{NAME}/commit/{repository.branches['main']}" in capsys.readouterr().out
    assert repository.messages[-1] == "hello"
    files = repository.commits[repository.branches["main"]]
    assert not [name for name, content in files.items() if str(home).encode() in content], "no path of this machine"

    record = read_result(home / "run")
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    data: Any = card.data
    assert data.license == "apache-2.0"
    assert data.base_model == BASE
    assert data.library_name == "unipelt"
    assert data.pipeline_tag == "text-classification"
    assert data.model_name == NAME
    results = {result.metric_type: result for result in data.eval_results or []}
    assert results.keys() == record["test"]["metrics"].keys()
    for name, value in record["test"]["metrics"].items():
        assert results[name].metric_value == round(value, 4)
        assert (results[name].task_type, results[name].dataset_type) == ("text-classification", "custom")

    body = files["README.md"].decode().split("---\n", 2)[2]
    rows = data_rows(body)
    metrics = record["test"]["metrics"]
    assert rows["test"] == [f"{metrics[name]:.3f}" for name in metrics]
    assert rows["dev"] == [f"{record['dev']['metrics'][name]:.3f}" for name in metrics]
    gates = record["gates"]["values"]
    for layer in range(2):
        cells = [f"{gate['mean'][layer]:.2f} ± {gate['std'][layer]:.2f}" for gate in gates.values()]
        assert rows[str(layer)] == cells
    assert f'unipelt.from_pretrained("{NAME}")' in body
    assert 'pipeline("text-classification"' in body

    again: Any = unipelt.from_pretrained(NAME)
    trained_model: Any = unipelt.from_pretrained(home / "run" / "model")
    assert torch.equal(logits(again), logits(trained_model))
    tokenizer: Any = unipelt.load_tokenizer(NAME)
    assert tokenizer(TEXTS)["input_ids"] == AutoTokenizer.from_pretrained(home / "model")(TEXTS)["input_ids"]


def data_rows(text: str) -> dict[str, list[str]]:
    """The cells of every row of every table, by the first."""
    lines = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


@pytest.mark.usefixtures("published")
def test_a_result_of_another_model(hub: Hub, home: Path, tmp_path: Path) -> None:
    model: Any = unipelt.from_pretrained(home / "run" / "model")
    record = read_result(home / "run")
    changes: dict[str, dict[str, Any]] = {
        "method": {"method": {**record["method"], "config": {**record["method"]["config"], "layers": [0]}}},
        "class": {"model": {**record["model"], "class": "BertForTokenClassification"}},
        "base": {"model": {**record["model"], "fingerprint": {"sha256": "0", "dtype": "float32"}}},
    }
    for part, change in changes.items():
        write_result({**record, **change}, tmp_path)
        with pytest.raises(ValueError, match=f"of another model than this: its {part} differs"):
            unipelt.push_to_hub(model, NAME, base=BASE, result=tmp_path)
    write_result({**record, "data": {**record["data"], "dev": {}}}, tmp_path)
    with pytest.raises(ResultError, match=r"what a card tells: data.dev.rows is missing"):
        unipelt.push_to_hub(model, NAME, base=BASE, result=tmp_path)
    with pytest.raises(FileNotFoundError, match="no result"):
        unipelt.push_to_hub(model, NAME, base=BASE, result=tmp_path / "none")
    assert NAME not in hub.repositories


def test_gates_that_were_recorded(hub: Hub, model: Any) -> None:
    with unipelt.record_gates(model) as gates:
        logits(model)
    unipelt.push_to_hub(model, NAME, gates=gates)
    repository = hub.repositories[NAME]
    rows = data_rows(repository.commits[repository.branches["main"]]["README.md"].decode())
    for layer in range(2):
        values = [values[:, layer] for values in gates.values()]
        assert rows[str(layer)] == [f"{value.mean():.2f} ± {value.std(correction=0):.2f}" for value in values]
    assert list(rows)[:1] == ["layer"]
    assert rows["layer"] == list(gates)
    for bad in ({}, {"prefix": torch.zeros(3)}, {"prefix": torch.zeros(0, 2)}):
        with pytest.raises(ValueError, match="gates must be"):
            unipelt.push_to_hub(model, NAME, gates=bad)


def test_the_command_says_what_is_wrong(hub: Hub, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(home / "run"), NAME]) == 2
    assert "say base='user/name'" in capsys.readouterr().err.replace("--base", "base")
    assert main(["push", str(home), NAME]) == 2
    assert "neither a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "split", "metrics", "types"),
    [
        ("rte", "validation", {"accuracy": 0.56}, ["accuracy"]),
        ("mnli", "validation_matched", {"accuracy": 0.56}, ["accuracy"]),
        ("stsb", "validation", {"spearman": 0.8, "pearson": 0.81}, ["spearmanr", "pearsonr"]),
    ],
)
def test_scores_of_glue(task: str, split: str, metrics: dict[str, float], types: list[str]) -> None:
    """In the hub's words: its data set, which split of it the test set is, and its metrics."""
    record = make_record()
    record["settings"] |= {"task": task, "batch_size": 16}
    record["task"] |= {"name": task, "metrics": list(metrics), "primary": next(iter(metrics))}
    record["data"] = {name: {"rows": 1100} for name in ("train", "dev", "test")}
    record["packages"] |= {"unipelt": "0.1.0", "transformers": "5.0.0"}
    for part in ("dev", "test"):
        record[part]["metrics"] = metrics
    model = trained("lora")
    base = {"class": "BertForSequenceClassification", "name_or_path": "bert-base-uncased", "revision": None}
    config, counts = model.unipelt_injection.config, unipelt.parameter_counts(model)
    text = model_card(config, counts, {"base": base, "deployed": True}, name=NAME, result=record)
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    assert [result.metric_type for result in data.eval_results] == types
    for result in data.eval_results:
        found = (result.dataset_type, result.dataset_config, result.dataset_split)
        assert found == ("nyu-mll/glue", task, split)
        assert result.dataset_name == f"GLUE {task.upper()}"
    assert f"one test on 1,100, the `{split}` split of GLUE {task.upper()}" in text
    assert data.base_model_relation == "adapter"
    assert data.get("license") is None


def test_a_card_of_fine_tuning() -> None:
    model = trained("fine-tuning")
    base = {"class": "GPT2LMHeadModel", "name_or_path": "gpt2", "revision": "abc"}
    config, counts = model.unipelt_injection.config, unipelt.parameter_counts(model)
    data: Any = ModelCard(model_card(config, counts, {"base": base, "deployed": False})).data
    assert (data.base_model_relation, data.pipeline_tag) == ("finetune", "text-generation")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("RobertaForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("MarianMTModel", "text2text-generation"),
        ("BertModel", None),
    ],
)
def test_the_hubs_name_of_a_task(name: str, task: str | None) -> None:
    assert task_of(name) == task


def test_metadata_that_yaml_would_read_otherwise(tmp_path: Path) -> None:
    """A base's name is anybody's text; it must stay one value."""
    model = trained("lora")
    model.config._name_or_path = "on"
    unipelt.save(model, tmp_path)
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["base_model"] == "on"
