"""The pretrained model of a run: its tokenizer, its weights, and what is said of a model that cannot be loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import save_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from unipelt.glue.settings import RunSettings
from unipelt.runs.cache import SharedCache
from unipelt.runs.errors import RunError
from unipelt.runs.pretrained import load_model, load_tokenizer, tokenizer_sha256, weights_sha256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert") / "model")


def settings(model: Path | str, **changes: Any) -> RunSettings:
    return RunSettings(**{"task": "rte", "model": str(model), "max_length": 32, **changes})


def load(model: Path | str, **changes: Any) -> Any:
    return load_tokenizer(settings(model, **changes), str(model), SharedCache())


def test_the_tokenizer_of_a_model(model: Path) -> None:
    config, tokenizer = load(model)
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    with pytest.raises(RunError, match=f"max_length is 33, and {model} takes 32 tokens; lower it"):
        load(model, max_length=33)


def test_a_model_without_positions_takes_what_its_tokenizer_takes(tmp_path: Path) -> None:
    """T5 has no largest position."""
    folder = save_model(tmp_path / "t5", "t5")
    values = json.loads((folder / "config.json").read_text())
    values.pop("max_position_embeddings", None)
    (folder / "config.json").write_text(json.dumps(values))
    assert not hasattr(load(folder)[0], "max_position_embeddings")
    with pytest.raises(RunError, match="takes 32 tokens"):
        load(folder, max_length=33)


def test_a_model_that_cannot_be_loaded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot load the model 'no/where', which is no folder here: "):
        load("no/where")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none-such"}))
    with pytest.raises(RunError, match=f"cannot load the model '{tmp_path}': "):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoConfig": "own.Own"}}))
    with pytest.raises(RunError, match="comes with Python code of its own"):
        load(tmp_path)


def test_a_tokenizer_is_named_by_its_words(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer_sha256(tokenizer)
    assert found is not None
    assert len(found) == 64
    tokenizer("good cat", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_sha256(tokenizer) == found, "how a text was cut and padded is no part of it"
    tokenizer.add_tokens(["zebra"])
    assert tokenizer_sha256(tokenizer) != found
    slow: Any = object()
    assert tokenizer_sha256(slow) is None


def test_weights_are_named_by_their_file(model: Path, tmp_path: Path) -> None:
    cache, expected = SharedCache(), hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    sha256, ((path, _, size, _),) = weights_sha256(settings(model, model_sha256=expected), str(model), cache)
    assert (sha256, path, size) == (
        expected,
        str(model / "model.safetensors"),
        (model / "model.safetensors").stat().st_size,
    )
    assert weights_sha256(settings(model), str(model), cache)[0] == expected
    with pytest.raises(RunError, match=f"its SHA-256 is {expected}, not {'0' * 64}; get the right model"):
        weights_sha256(settings(model, model_sha256="0" * 64), str(model), cache)
    assert weights_sha256(settings(tmp_path), str(tmp_path), cache) == (None, ())
    with pytest.raises(RunError, match=r"model_sha256 is given, and .* has no model\.safetensors to check it against"):
        weights_sha256(settings(tmp_path, model_sha256=expected), str(tmp_path), cache)


def test_the_seed_draws_what_is_new(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is shown of a head that is new in every run."""
    logging.enable_progress_bar()
    level = logging.get_verbosity()

    def head(seed: int) -> torch.Tensor:
        chosen = settings(model, seed=seed, method="lora")
        made: Any = load_model(chosen, str(model), load(model)[0], AutoModelForSequenceClassification)
        assert made.unipelt_injection is not None
        assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
        return made.classifier.weight.detach().clone()

    one, again, other = (head(seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert capsys.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, level)


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("\n\n first \n second"), "first"), (RuntimeError(), "RuntimeError")],
)
def test_a_failure_is_told_by_its_first_line(model: Path, error: Exception, said: str) -> None:
    class Failing:
        @staticmethod
        def from_pretrained(place: str, **options: Any) -> None:
            raise error

    with pytest.raises(RunError, match=f"cannot load the model '{model}': {said}$"):
        load_model(settings(model), str(model), load(model)[0], Failing)
