"""Training with plain `transformers.Trainer`: what it saves, restores and resumes, alone and in several processes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shake, tiny_batch, tiny_bert
from safetensors.torch import load_file
from scripts.parallel import prepared, second_gradients, steps
from scripts.train import LABELS, STEPS_PER_EPOCH, Texts, make_model, make_trainer
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

import unipelt

METHODS = ("unipelt-apl", "prefix", "bitfit", "fine-tuning", "adapter")
TESTS = Path(__file__).parents[1]
LAST = 3 * STEPS_PER_EPOCH
NEW_NAMES = "activation_checkpointing" in TrainingArguments.__dataclass_fields__


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """What Transformers and we log as a warning or worse."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "unipelt", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def moved(one: dict[str, Tensor], other: dict[str, Tensor] | None = None) -> set[str]:
    """Names that differ (or all names), but for the keys' biases: softmax takes no notice of them."""
    names = set(one) if other is None else differing(one, other)
    return {name for name in names if not name.endswith("key.bias")}


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tiny_batch()).logits


def losses(trainer: Trainer) -> list[tuple[float, float, float]]:
    return [(log["step"], log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def launch(*command: str) -> str:
    """Run a program of ours from the tests' folder; its output."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *command], env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: it has to end what it started itself
            raise
    assert process.returncode == 0, output
    return output


def launch_parallel(what: str, folder: Path, *jobs: str) -> None:
    folder.mkdir(exist_ok=True)
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2")
    script = str(TESTS / "scripts" / "parallel.py")
    launch("-m", "torch.distributed.run", *rendezvous, script, what, str(folder), *jobs)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_only_what_trains_and_the_head(method: str, tmp_path: Path) -> None:
    model = make_model(method)
    before, names = state(model), trained_names(model)
    make_trainer(model, tmp_path).train()
    assert differing(before, state(model)) == names, "exactly what trains moved"
    folder = tmp_path / f"checkpoint-{LAST}"
    tensors = load_file(folder / "model.safetensors")
    head = {"classifier.weight", "classifier.bias"}
    assert set(tensors) == names | head
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    counts = unipelt.parameter_counts(model)
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert stored == counts.trained + counts.head
    assert (folder / "model.safetensors").stat().st_size < 4 * stored + 200 * len(tensors) + 200
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    assert sum(entry["exp_avg"].numel() for entry in optimizer["state"].values()) == stored
    assert not [file for file in folder.glob("*.bin") if file.name != "training_args.bin"]
    assert not (folder / "config.json").exists(), "nobody shall take it for a whole model"


@pytest.mark.parametrize("method", METHODS)
def test_a_trainers_checkpoint_is_a_folder_of_ours(method: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert().bert.save_pretrained(base)
    torch.manual_seed(3)
    model: Any = BertForSequenceClassification.from_pretrained(base)
    unipelt.inject(model, method)
    trainer = make_trainer(model, tmp_path / "run", num_train_epochs=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    want = logits(model)
    for folder in (tmp_path / "run" / f"checkpoint-{STEPS_PER_EPOCH}", tmp_path / "final"):
        with logged_warnings() as messages:
            again: Any = unipelt.from_pretrained(folder)
        assert not messages
        assert torch.equal(logits(again), want)
        assert trained_names(again) == trained_names(model)
    other: Any = BertForSequenceClassification.from_pretrained(base)
    assert torch.equal(logits(unipelt.load(other, tmp_path / "final")), want)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_is_restored(method: str, tmp_path: Path) -> None:
    """Training towards a label that the evaluation never has makes the first epoch the best, the last the worst."""
    model = make_model(method, dropout=0.0)
    shake(model, std=0.02)
    with logged_warnings() as messages:
        trainer = make_trainer(
            model,
            tmp_path,
            Texts(torch.ones_like(LABELS)),
            Texts(torch.zeros_like(LABELS)),
            optim="sgd",
            learning_rate=0.02 if method == "fine-tuning" else 0.1,
            lr_scheduler_type="constant",
            eval_strategy="epoch",
            load_best_model_at_end=True,
        )
        trainer.train()
    assert not [message for message in messages if "keys" in message], messages
    scores = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert scores[0] < scores[1] < scores[2], scores
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}")
    assert trainer.evaluate()["eval_loss"] == scores[0]
    best = load_file(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}" / "model.safetensors")
    last = load_file(tmp_path / f"checkpoint-{LAST}" / "model.safetensors")
    assert moved(best, last) == moved(best)
    assert not differing(best, {name: tensor for name, tensor in state(model).items() if name in best})


def test_loading_a_checkpoint_logs_no_warning_about_keys_with_tied_weights(tmp_path: Path) -> None:
    """A masked-language model stores its word embeddings under two names."""
    for method in ("unipelt-apl", "bitfit", "fine-tuning"):
        torch.manual_seed(0)
        model: Any = unipelt.inject(BertForMaskedLM(tiny_bert().config), method)
        batch = tiny_batch(lengths=(5, 9, 7, 8))
        rows = [{"labels": ids, "input_ids": ids} for ids in batch["input_ids"]]
        folder = tmp_path / method
        make_trainer(model, folder, rows, save_strategy="steps", save_steps=1, max_steps=2).train()  # type: ignore[arg-type]
        want = state(model)
        shake(model)
        with logged_warnings() as messages:
            trainer = make_trainer(model, folder, rows, max_steps=2)  # type: ignore[arg-type]
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert not [message for message in messages if "keys" in message], (method, messages)
        assert not differing(want, state(model))


def test_the_warning_about_keys_would_be_seen(tmp_path: Path) -> None:
    """The two tests above look for a message that this version of Transformers really writes."""
    make_trainer(make_model("adapter"), tmp_path, num_train_epochs=1, save_only_model=True).train()
    with logged_warnings() as messages:
        trainer = make_trainer(make_model("lora"), tmp_path, num_train_epochs=1)
        trainer.train(resume_from_checkpoint=True)
    assert len([message for message in messages if re.search("(missing|unexpected) keys", message)]) == 2


def test_weights_that_a_user_unfreezes_are_saved_and_loaded(tmp_path: Path) -> None:
    model = make_model("adapter", dropout=0.0)
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    trainer = make_trainer(model, tmp_path, num_train_epochs=1)
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS_PER_EPOCH}"
    assert "bert.embeddings.LayerNorm.weight" in load_file(folder / "model.safetensors")
    assert torch.equal(logits(unipelt.load(tiny_bert(), folder)), logits(model))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of five methods that ended by SIGKILL: some at the end of an epoch, some within the second."""
    folder = tmp_path_factory.mktemp("killed")
    jobs = dict(zip(METHODS, (6, 4, 6, 4, 6), strict=True))
    output = launch(str(TESTS / "scripts" / "train.py"), str(folder), *(f"{name}={at}" for name, at in jobs.items()))
    for name, at in jobs.items():
        assert f"{name} {-signal.SIGKILL}" in output
        assert [path.name for path in (folder / name).iterdir()] == [f"checkpoint-{at}"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_uninterrupted(method: str, killed: Path, tmp_path: Path) -> None:
    """Weights, optimizer and losses, bit for bit, with dropout on."""
    every: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6 if method in METHODS[::2] else 4}
    whole = make_trainer(make_model(method), tmp_path, **every)
    whole.train()
    with logged_warnings() as messages:
        # a resumed run must not depend on how the model was left by what came before
        model = make_model(method)
        shake(model)
        resumed = make_trainer(model, killed / method, **every)
        resumed.train(resume_from_checkpoint=True)
    assert not [message for message in messages if "keys" in message], messages
    assert not differing(state(whole.model), state(resumed.model))
    assert len(losses(whole)) == LAST
    assert losses(resumed) == losses(whole)
    one, other = (
        torch.load(folder / f"checkpoint-{LAST}" / "optimizer.pt", weights_only=True)["state"]
        for folder in (tmp_path, killed / method)
    )
    assert one.keys() == other.keys()
    for index, entry in one.items():
        assert not differing(entry, other[index])


GRADIENT_JOBS: tuple[dict[str, Any], ...] = (
    *({"method": method} for method in unipelt.PRESETS),
    {"method": {"preset": "unipelt-apl", "prefix": {"gating": "mass"}}},
    {"method": {"preset": "unipelt-apl", "gate": {"pooling": "mean"}, "layers": [0, 2]}},
    {"method": {"preset": "unipelt-apl", "train_head": False}},
    {"method": "unipelt-apl", "checkpointing": False},
    {"method": "unipelt-apl", "checkpointing": True},
)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Each process has half of the batch; no parameter is unused, for any method."""
    launch_parallel("gradients", tmp_path, *map(json.dumps, GRADIENT_JOBS))
    for number, job in enumerate(GRADIENT_JOBS):
        model = prepared(**job)
        want = second_gradients(model, model, slice(None))
        assert want.keys() == trained_names(model)
        assert all(gradient.any() for gradient in want.values()), job
        for rank in range(2):
            got = load_file(tmp_path / f"{number}-{rank}.safetensors")
            assert got.keys() == want.keys(), job
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{job} {name}")
    assert steps()[0]["attention_mask"].sum() != steps()[1]["attention_mask"].sum()


@pytest.mark.slow
def test_trainer_runs_in_two_processes(tmp_path: Path) -> None:
    methods = ("unipelt-apl", "bitfit", "prefix")
    launch_parallel("trainer", tmp_path / "two", *methods)
    for method in methods:
        start = state(prepared(method))
        one = make_trainer(prepared(method), tmp_path / method, optim="sgd", learning_rate=0.1)
        one.train()
        folder = tmp_path / "two" / method / f"checkpoint-{LAST}"
        two: Any = unipelt.load(tiny_bert(), folder)
        assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors"}
        end, got = state(one.model), state(two)
        for name in trained_names(two):
            # both runs see the same batches; the difference is the order of sums
            torch.testing.assert_close(got[name], end[name], atol=1e-5, rtol=1e-4, msg=name)
        assert moved(start, got) == moved({name: start[name] for name in trained_names(two)})


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(method: str, tmp_path: Path) -> None:
    runs = []
    for bf16 in (False, True):
        model = make_model(method, dropout=0.0)
        trainer = make_trainer(model, tmp_path / str(bf16), bf16=bf16, learning_rate=1e-3)
        trainer.train()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        runs.append([loss for _, loss, _ in losses(trainer)])
    assert runs[0] != runs[1], "autocast was on"
    np.testing.assert_allclose(runs[1], runs[0], atol=0.02)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_by_arguments(method: str, reentrant: bool, tmp_path: Path) -> None:
    name = "activation_checkpointing" if NEW_NAMES else "gradient_checkpointing"
    ends = []
    options: tuple[dict[str, Any], ...] = ({}, {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}})
    for changes in options:
        model = make_model(method)
        calls: list[None] = []
        query = model.bert.encoder.layer[0].attention.self.query
        query.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        make_trainer(model, tmp_path, **changes, optim="sgd", learning_rate=0.1, save_strategy="no").train()
        assert len(calls) == LAST * (2 if changes else 1), "the layer was, or was not, computed again"
        ends.append(state(model))
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, atol=1e-6, rtol=1e-5, msg=key)


def test_predict_and_evaluate(tmp_path: Path) -> None:
    model = make_model("unipelt-apl")
    shake(model)
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=3)
    found = trainer.predict(Texts())
    model.eval()
    with torch.no_grad():
        want = model(**Texts().columns)
    np.testing.assert_allclose(found.predictions, want.logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.label_ids, LABELS.numpy())
    assert found.metrics is not None
    assert abs(found.metrics["test_loss"] - want.loss.item()) < 1e-5
    assert trainer.evaluate()["eval_loss"] == found.metrics["test_loss"]


def test_output_attentions_and_hidden_states_pass_through_predict(tmp_path: Path) -> None:
    model = unipelt.inject(tiny_bert(attn_implementation="eager"), "prefix")
    model.config.output_hidden_states = model.config.output_attentions = True
    predictions: Any = make_trainer(model, tmp_path).predict(Texts()).predictions
    scores, hidden, attentions = predictions
    assert scores.shape == (16, 2)
    assert [array.shape for array in hidden] == [(16, 9, 32)] * 4
    assert [array.shape for array in attentions] == [(16, 4, 9, 10 + 9)] * 3


def test_a_pooler_that_starts_at_random_is_in_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_bert().config
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    model: Any = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    unipelt.inject(model, "adapter")
    make_trainer(model, tmp_path / "run", num_train_epochs=1).train()
    folder = tmp_path / "run" / f"checkpoint-{STEPS_PER_EPOCH}"
    assert "bert.pooler.dense.weight" in load_file(folder / "model.safetensors")
    torch.manual_seed(9)
    assert torch.equal(logits(unipelt.from_pretrained(folder)), logits(model))
