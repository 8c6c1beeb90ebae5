"""The script that measures decoding."""

from __future__ import annotations

import json
from pathlib import Path

import decoding
import pytest
import torch
from tiny import CACHE, tiny_model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by PEFT
def test_every_method_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    methods = ["lora", "prefix"]
    try:
        import peft  # noqa: F401
    except ImportError:
        pass
    else:
        # PEFT's prefix calls a model by the name that Transformers 5.24 warns of
        methods += ["peft:lora", "peft:prefix"] if CACHE == "past_key_values" else ["peft:lora"]
    decoding.main(
        [
            str(tmp_path / "model"),
            *("--methods", ",".join(methods), "--turns", "3", "--tokens", "2", "--prompt", "4"),
            *("--output", str(tmp_path / "out" / "record.json")),
        ]
    )
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert list(record["seconds"]) == ["bare model", *methods]
    for name, seconds in record["seconds"].items():
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert name in printed
    assert "| bare model |" in printed
    assert "1.000 (1.000 to 1.000)" in printed
    assert record["settings"]["tokens"] == 2
    assert record["packages"]["torch"]


def test_a_turn_takes_the_time_of_its_tokens() -> None:
    times = iter([1.0, 3.5])
    model = tiny_model("llama").eval()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert decoding.write(model, torch.tensor([[5, 6, 7]]), 4, lambda: next(times)) == 2.5
    assert len(calls) == 1 + 4


@pytest.mark.parametrize("words", [["--turns", "0"], ["--tokens", "-1"]])
def test_a_count_below_one_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decoding.parse(["folder", *words])
    assert "must be 1 or more" in capsys.readouterr().err
