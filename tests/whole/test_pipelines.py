"""Pipelines of Transformers take an injected model as they take any other, and say what its own logits say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import shake
from tiny import tiny_model
from tiny_task import WORDS, save_model
from torch import Tensor
from transformers import AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

import unipelt

TEXTS = ["the cat was lovely", "a dull grey dog sat on the mat and then ran", "fine"]
pipeline: Any = transformers.pipeline  # which tasks it has depends on the version
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("model")))


def as_trained(model: Any, tokenizer: Any, folder: Path) -> Any:
    return model


def deployed(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Saved in the deployed form and loaded onto the base again."""
    unipelt.save(model, folder, deploy=True)
    return unipelt.load(unipelt.remove(model), folder).eval()


def folded(model: Any, tokenizer: Any, folder: Path) -> Any:
    report = unipelt.fold(model, [dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))], tolerance=1.0)
    assert report.merged
    return model


@pytest.fixture(params=[as_trained, deployed, folded])
def make(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes an injected model of a family with a head, in one of its forms."""

    def made(family: str, head: str) -> Any:
        model = tiny_model(family, head, vocab_size=len(WORDS), **IDS)
        unipelt.inject(model, "unipelt-apl")
        shake(model)
        return request.param(model.eval(), tokenizer, tmp_path)

    return made


def alone(model: Any, tokenizer: Any, text: str, **options: Any) -> Any:
    """What the model itself gives for one text, without padding."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), **options)


def same(scores: list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_text_classification(make: Callable[..., Any], tokenizer: Any, family: str) -> None:
    model = make(family, "SequenceClassification")
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert pipe.model is model
    for size in (1, 3):  # with three a batch, two of the texts are padded
        for text, found in zip(TEXTS, pipe(TEXTS, batch_size=size, top_k=None), strict=True):
            by_label = {item["label"]: item["score"] for item in found}
            expected = alone(model, tokenizer, text).logits[0].softmax(-1)
            same([by_label[model.config.id2label[index]] for index in range(2)], expected)


def test_token_classification(make: Callable[..., Any], tokenizer: Any) -> None:
    model = make("bert", "TokenClassification")
    pipe = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    for text, found in zip(TEXTS, pipe(TEXTS, batch_size=3), strict=True):
        best = alone(model, tokenizer, text).logits[0, 1:-1].softmax(-1).max(-1)
        same([float(item["score"]) for item in found], best.values)
        assert [item["entity"] for item in found] == [model.config.id2label[int(index)] for index in best.indices]


def test_fill_mask(make: Callable[..., Any], tokenizer: Any) -> None:
    model = make("bert", "MaskedLM")
    pipe = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=4)
    texts = [f"{text} [MASK]" for text in TEXTS]
    for text, found in zip(texts, pipe(texts, batch_size=3), strict=True):
        best = alone(model, tokenizer, text).logits[0, -2].softmax(-1).topk(4)
        same([item["score"] for item in found], best.values)
        assert [item["token"] for item in found] == best.indices.tolist()


def test_feature_extraction(make: Callable[..., Any], tokenizer: Any) -> None:
    model = make("bert", "Model")
    pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for text, found in zip(TEXTS, pipe(TEXTS), strict=True):
        torch.testing.assert_close(
            torch.tensor(found), alone(model, tokenizer, text).last_hidden_state, atol=1e-5, rtol=0
        )


@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_generation(make: Callable[..., Any], tokenizer: Any, family: str) -> None:
    model = make(family, "CausalLM")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        options = {"max_new_tokens": 5, "do_sample": False}
        for size in (1, 3):
            for text, found in zip(
                TEXTS,
                pipe(TEXTS, batch_size=size, return_tensors=True, add_special_tokens=True, **options),
                strict=True,
            ):
                given = tokenizer(text, return_tensors="pt")
                ids = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **options)[0]
                made = [token for token in found[0]["generated_token_ids"] if token != 0]
                assert made == [token for token in ids.tolist() if token != 0]
    finally:
        tokenizer.padding_side = side


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of a class of Transformers 5.0
def test_question_answering(make: Callable[..., Any], tokenizer: Any) -> None:
    """Newer Transformers have no such pipeline; the model answers there as well, when it is called."""
    model = make("bert", "QuestionAnswering")
    question, context = TEXTS[0], TEXTS[1]
    with torch.no_grad():
        given = tokenizer(question, context, return_tensors="pt")
        output = model(**given)
    assert output.start_logits.shape == given["input_ids"].shape
    if "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks():
        with pytest.raises(KeyError, match="question-answering"):
            pipeline("question-answering", model=model, tokenizer=tokenizer)
        return
    found = pipeline("question-answering", model=model, tokenizer=tokenizer)(question=question, context=context)
    assert found["answer"] in context
    start = context[: found["start"]].count(" ")
    end = start + found["answer"].count(" ")
    first = len(tokenizer(question)["input_ids"])  # of the context
    words = slice(first, first + len(context.split()))
    chances = output.start_logits.softmax(-1)[0, words][:, None] * output.end_logits.softmax(-1)[0, words]
    assert chances[start, end] == chances.triu().max()


def test_a_path_is_no_model_of_a_pipeline(tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint has no config.json, so that nobody takes it for a whole model; the way is from_pretrained."""
    unipelt.save(unipelt.inject(tiny_model("bert"), "lora"), tmp_path)
    with pytest.raises(ValueError, match="Unrecognized model"):
        pipeline("text-classification", model=str(tmp_path), tokenizer=tokenizer)


def test_which_version() -> None:
    """Of a pipeline that comes back, or goes, docs/hub.md must tell."""
    tasks = set(PIPELINE_REGISTRY.get_supported_tasks())
    assert {
        "text-classification",
        "token-classification",
        "fill-mask",
        "feature-extraction",
        "text-generation",
    } <= tasks
    assert not {"summarization", "translation", "text2text-generation"} & tasks, transformers.__version__
