"""The text of a model card, line by line."""

from __future__ import annotations

from typing import Any

import yaml
from helpers import trained
from records.test_record import make_record

import unipelt
from unipelt.checkpoint.model_card import model_card
from unipelt.config.methods import UniPELTConfig

NAME = "somebody/sentiment"
BASE = {"class": "BertForSequenceClassification", "name_or_path": "google/tiny", "revision": "abc123"}


def card(config: UniPELTConfig | None = None, **further: Any) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a card, and the lines below it."""
    model = trained("lora")
    manifest = {"base": BASE, "deployed": True, **further.pop("manifest", {})}
    text = model_card(config or unipelt.resolve("lora"), unipelt.parameter_counts(model), manifest, **further)
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body.splitlines()


def record() -> dict[str, Any]:
    found = make_record()
    found["settings"] |= {"task": "mrpc", "batch_size": 16}
    found["task"] |= {"name": "mrpc", "metrics": ["f1", "accuracy"], "primary": "accuracy"}
    found["data"] = {"train": {"rows": 3668}, "dev": {"rows": 1200}, "test": {"rows": 408}}
    found["packages"] |= {"unipelt": "0.1.0", "transformers": "5.0.0"}
    found["test"]["metrics"] = {"f1": 0.81251, "accuracy": 0.75}
    found["dev"]["metrics"] = {"f1": 0.8, "accuracy": 0.7}
    found["code"]["commit"] = "c0ffee" * 6
    return found


def test_a_whole_card() -> None:
    gates = {
        "values": {
            "adapter": {"mean": [0.5, 0.25], "std": [0.125, 0.0]},
            "prefix": {"mean": [1.0], "std": [0.5]},
        },
        "layers": [3, 7],
        "examples": 1200,
    }
    data, lines = card(name=NAME, license="mit", result=record(), gates=gates, has_tokenizer=True)
    assert {key: value for key, value in data.items() if key != "model-index"} == {
        "base_model": "google/tiny",
        "base_model_relation": "adapter",
        "library_name": "unipelt",
        "license": "mit",
        "pipeline_tag": "text-classification",
        "tags": ["unipelt", "parameter-efficient-tuning"],
    }
    index = data["model-index"][0]
    assert index["name"] == NAME
    dataset = {"name": "GLUE MRPC", "type": "nyu-mll/glue", "config": "mrpc", "split": "validation"}
    assert [result["dataset"] for result in index["results"]] == [dataset]
    assert index["results"][0]["metrics"] == [
        {"type": "f1", "value": 0.8125, "name": "f1"},
        {"type": "accuracy", "value": 0.75, "name": "accuracy"},
    ]
    counts = str(unipelt.parameter_counts(trained("lora"))).splitlines()
    assert lines == [
        "",
        "# lora on tiny",
        "",
        "Weights trained with [UniPELT](https://aclanthology.org/2022.acl-long.433/) (deployed form); the frozen base "
        "(`BertForSequenceClassification`) is not included. Method: LoRA.",
        "",
        "```python",
        "import unipelt",
        "from transformers import pipeline",
        "",
        f'model = unipelt.from_pretrained("{NAME}")',
        f'tokenizer = unipelt.load_tokenizer("{NAME}")',
        'pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)',
        "```",
        "",
        "That fetches the base, `google/tiny` (revision `abc123`), and checks that it is the one that was trained on.",
        "",
        "```text",
        *counts,
        "```",
        "",
        "The whole configuration is in `unipelt.json`.",
        "",
        "## Scores",
        "",
        "One run with seed 1: 3,668 examples to train, 1,200 (dev) to choose the epoch, and one test on 408, the "
        "`validation` split of GLUE MRPC.",
        "",
        "| | f1 | accuracy |",
        "| --- | ---: | ---: |",
        "| test | 0.813 | 0.750 |",
        "| dev | 0.800 | 0.700 |",
        "",
        "(For comparison, the test set's most frequent class: accuracy 0.527. `unipelt-apl`, learning rate 0.0005, "
        "batch 16, best epoch 2 of 3; unipelt 0.1.0, torch 2.6.0, transformers 5.0.0, commit `c0ffeec`.)",
        "",
        "## Gates",
        "",
        "A gate is between 0 (its submodule is shut) and 1 (open). Mean and standard deviation over 1,200 examples:",
        "",
        "| layer | adapter | prefix |",
        "| ---: | ---: | ---: |",
        "| 3 | 0.50 ± 0.12 | 1.00 ± 0.50 |",
        "| 7 | 0.25 ± 0.00 |  |",
    ]


def test_a_card_of_a_run_on_own_data() -> None:
    result = record()
    result["settings"]["task"] = None
    result["task"]["name"] = "tickets"
    result["majority"] = None
    data, lines = card(result=result)
    title = data["model-index"][0]["name"]
    assert title == "lora on tiny"
    sources = [found["dataset"] for found in data["model-index"][0]["results"]]
    assert sources == [{"name": "tickets", "type": "custom", "split": "test"}]
    assert "and one test on 408, the test set." in "\n".join(lines)
    assert [line for line in lines if line.startswith("(`unipelt-apl`, learning rate 0.0005")]
    assert "## Gates" not in lines


def test_how_to_load_depends_on_what_is_there() -> None:
    _, lines = card(manifest={"base": {**BASE, "name_or_path": "/home/somebody/base", "revision": None}})
    code = lines[lines.index("```python") + 1 : lines.index("```")]
    assert code == ["import unipelt", "", 'model = unipelt.from_pretrained("path/to/this/folder")']
    assert not [line for line in lines if line.startswith("That fetches")]
    data, lines = card(manifest={"base": {**BASE, "class": "BertForQuestionAnswering", "revision": None}})
    code = lines[lines.index("```python") + 1 : lines.index("```")]
    assert code[-1] == 'tokenizer = unipelt.load_tokenizer("path/to/this/folder")', "no pipeline of this task takes one"
    assert "That fetches the base, `google/tiny`, and checks that it is the one that was trained on." in lines
    assert data["pipeline_tag"] == "question-answering"
    _, lines = card(manifest={"weights": {"file": "adapter_model.safetensors"}})
    assert "The whole configuration is in `adapter_config.json`." in lines


def test_all_parts_of_a_method_are_named() -> None:
    every = unipelt.resolve(
        {
            "preset": "unipelt-apl",
            "adapter": {"mixture": {"experts": 4, "router": "token"}},
            "lora": {"gate": False},
            "prompt": {"length": 2},
            "ia3": {"gate": False},
            "bitfit": True,
            "tokens": {"ids": [1, 2]},
        }
    )
    _, lines = card(every, manifest={"deployed": False})
    assert (
        "(as trained); the frozen base (`BertForSequenceClassification`) is not included. Method: gated mixture of 4 "
        "adapter (router token) + gated prefix + LoRA + prompt + ia3 + BitFit + trained tokens."
    ) in lines[3]
    _, lines = card(UniPELTConfig(None, None, None))
    assert lines[3].endswith("Method: head only.")
    _, lines = card(unipelt.resolve("fine-tuning"), manifest={"folded": {}})
    assert "(folded)" in lines[3]
    assert lines[3].endswith("Method: fine-tuning.")
