"""Fixtures that tests share, and the folders outside the project that they may read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.utils import logging

RUN_GLUE = Path(__file__).parents[1] / "examples" / "run_glue.py"


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


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Restore the environment variables. PEFT's BOFT sets compilers, which breaks a later test of `torch.compile`."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data that happen to be there nor the network."""
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test draws, in their order."""
    from unipelt.gates import plot

    drawn: list[Any] = []
    make = plot.new_figure

    def keep(**size: float) -> Any:
        drawn.append(make(**size))
        return drawn[-1]

    monkeypatch.setattr(plot, "new_figure", keep)
    return drawn


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
