"""Checkpoints with huge numbers or files, without a base, or with numbers that are not finite."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import MANIFEST, edit, read, shake, small, tiny_bert

import unipelt
from unipelt.checkpoint.manifest import WEIGHTS, MissingBaseError, nonfinite
from unipelt.config.schema import flatten

HUGE = 10**12


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every submodule, beside its base."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("original")
    tiny_bert().save_pretrained(folder / "base")
    further = {"ia3": {}, "red": {}, "houlsby": {"bottleneck": 5}, "compacter": {"bottleneck": 4, "terms": 2}}
    model = type(tiny_bert()).from_pretrained(folder / "base")
    unipelt.inject(model, small("unipelt-apl", **further))
    return unipelt.save(model, folder / "checkpoint")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_huge_numbers_are_refused_within_a_second(original: Path, tmp_path: Path) -> None:
    manifest = read(original)
    base = {**json.loads(tiny_bert().config.to_json_string(use_diff=False)), **manifest["base"]["config"]}
    fields = [f"unipelt.{name}" for name, value in flatten(manifest["unipelt"]).items() if type(value) is int]
    fields += [f"base.config.{name}" for name, value in base.items() if type(value) is int]
    fields.remove("base.config.chunk_size_feed_forward")  # of which Transformers makes nothing
    assert {"unipelt.prefix.length", "unipelt.houlsby.bottleneck", "base.config.hidden_size"} <= set(fields)
    for field in fields:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        folder = Path(shutil.copytree(original, tmp_path / "a"))
        edit(folder, field, HUGE)
        begun = time.process_time()
        with pytest.raises(ValueError, match=r"."):
            unipelt.from_pretrained(folder)
        assert time.process_time() - begun < 1, field


@pytest.mark.parametrize("content", [b" " * 100 * 2**20, b"[" * 100 * 2**20, b'{"a": "' + b"x" * 100 * 2**20])
def test_a_huge_manifest_is_refused_within_a_second(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    begun = time.process_time()
    with pytest.raises(unipelt.CheckpointError, match="it is larger than 8 MB"):
        unipelt.load(tiny_bert(), folder)
    assert time.process_time() - begun < 1


def test_huge_weights_of_another_checkpoint_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(100 * 2**20))
    with pytest.raises(unipelt.CheckpointError, match="its SHA-256 differs"):
        unipelt.load(tiny_bert(), folder)


@pytest.mark.parametrize("name", ["gone", "empty", "no-such-model-anywhere"])
def test_a_base_that_cannot_be_found(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    base = name if name.startswith("no-") else str(tmp_path / name)
    with pytest.raises(unipelt.CheckpointError, match=rf"its base, .*{name}, cannot be had: .*; say base=") as caught:
        unipelt.from_pretrained(folder, base=base)
    assert isinstance(caught.value, OSError), "as callers of earlier versions expect"
    assert isinstance(caught.value, MissingBaseError)
    unipelt.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_said(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("unipelt.checkpoint.manifest.logger.warning", said.append)
    model: Any = unipelt.inject(tiny_bert(), small("lora"))
    shake(model)
    unipelt.load(tiny_bert(), unipelt.save(model, tmp_path / "sound"))
    assert not said
    name = next(name for name, parameter in model.named_parameters() if "lora" in name and parameter.requires_grad)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    assert nonfinite(dict(model.named_parameters())) == [name]
    unipelt.save(model, tmp_path / "a")
    assert len(said) == 1
    assert "what is saved to" in said[0]
    assert name in said[0]
    unipelt.load(tiny_bert(), tmp_path / "a")
    assert len(said) == 2
    assert "the checkpoint in" in said[1]
    with pytest.raises(ValueError, match="are not finite, so this is not published"):
        unipelt.push_to_hub(model, "user/name", base="user/base")
