"""What tests share: tiny models, batches, and the folders outside the project that they may read."""

from __future__ import annotations

import os

# read when transformers and torch are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # over tensors as small as these, threads only wait for each other

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from unipelt.checkpoint.manifest import CheckpointError

RUN_GLUE = Path(__file__).parents[1] / "examples" / "run_glue.py"
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def tiny_bert(
    num_labels: int = 2, seed: int = 0, dropout: float = 0.0, **config: object
) -> BertForSequenceClassification:
    """A random BERT, the same for the same seed, in evaluation mode."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SIZES, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**{**sizes, "num_labels": num_labels, **config})).eval()


def tiny_batch(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 7), tokens: int = 9) -> dict[str, Tensor]:
    """Random texts of the given lengths, padded on the right to `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SIZES["vocab_size"], (len(lengths), tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def shake(model: torch.nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Move every trainable parameter away from its start, so that no term is zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter as it is now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def refused(load: Callable[[Any, Any], Any], folder: Path, *parts: str, model: Any = None) -> None:
    """`load(model, folder)` raises an error with these parts in its message, and leaves the model as it was."""
    base = tiny_bert() if model is None else model
    before, flags = bits(base), [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load(base, folder)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert len(str(caught.value)) < 700
    assert not hasattr(base, "unipelt_injection")
    after = bits(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flags == [parameter.requires_grad for parameter in base.parameters()]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Whatever the environment says: sums are split by thread, and runs are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _as_talkative_as_before() -> Iterator[None]:
    """A benchmark has its process to itself and silences Transformers; other tests look for its warnings."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data that happen to be there nor the network."""
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def run_glue() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("run_glue", RUN_GLUE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reference_dir() -> Path:
    return _folder("UNIPELT_REFERENCE_DIR", "the reference tensors of the authors' release")


@pytest.fixture
def tasks_dir() -> Path:
    return _folder("UNIPELT_TASKS_DIR", "XQuAD (xquad_en) and Multi30k (multi30k)")


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to the folder with {what}")
    assert Path(folder).is_dir(), f"{variable} names {folder}, which is not a folder"
    return Path(folder)
