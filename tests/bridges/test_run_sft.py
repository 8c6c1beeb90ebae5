"""`examples/run_sft.py`, and the ways in which TRL makes batches. The slow tests need TRL (`.ci/peft`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_sft
import torch
from bridges.test_peft_packages import minilm, options, policy, tokens, trl  # noqa: F401 - fixtures
from helpers import shake
from tiny import tiny_model

import unipelt

pytestmark = pytest.mark.filterwarnings("ignore")
HOME = Path(__file__).parents[2]
METHOD: dict[str, Any] = {
    "preset": "unipelt",
    "adapter": {"bottleneck": 6},
    "prefix": {"length": 4, "hidden": 10, "softmax": "own"},
    "lora": {"rank": 3},
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The command line


def test_the_instructions_have_one_style() -> None:
    train, held_out = run_sft.read_rows(run_sft.Settings().data, 8)
    rows = [*train, *held_out]
    assert 60 <= len(rows) <= 100
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert row["completion"].startswith("In one breath: ")
        assert row["completion"].endswith(". Ask on, friend.")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = str(HOME / "examples" / "sft" / "smollm2.yaml")
    settings = run_sft.parse([file])
    assert settings.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert settings.method == "unipelt"
    words = ["--model", "x", "--method.lora.rank", "4", "--trainer.max_steps", "2", "--trainer.learning_rate=5e-4"]
    changed = run_sft.parse([file, *words, "--output_dir", str(tmp_path)])
    assert changed.model == "x"
    assert unipelt.resolve(changed.method).lora.rank == 4  # type: ignore[union-attr]
    assert changed.trainer == {"max_steps": 2, "learning_rate": 5e-4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which model"),
        (["--modell", "x"], "did you mean '--model'"),
        (["--model", "x", "--method", "unipelt-alp"], "unipelt-apl"),
        (["--model", "x", "--held_out", "0"], "held_out must be"),
        (["--model", "x", "--output_dir", "."], "is not empty"),
        (["--model", "x", "--trainer.max_steps", "{"], "cannot read the value"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_options_are_refused_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sft.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n', "line 1 needs the texts prompt and completion"),
        ("{\n", "line 1 is not JSON"),
        ('{"prompt": "a", "completion": "b"}\n', "has 1 rows, of which 8 are held out"),
    ],
)
def test_bad_data_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(unipelt.ConfigError, match=said):
        run_sft.read_rows(str(tmp_path / "rows.jsonl"), 8)


@pytest.mark.slow
def test_without_trl_the_message_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trl'] = None; sys.path.insert(0, 'examples'); import run_sft; "
        f"sys.exit(run_sft.main(['--model', 'x', '--output_dir', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME, timeout=120)
    assert done.returncode == 2
    assert "pip install 'unipelt[trl]'" in done.stderr
    assert not (tmp_path / "out").exists()


# Training


@pytest.mark.slow
def test_it_trains_and_the_folder_comes_back(
    trl: Any,  # noqa: F811
    policy: Any,  # noqa: F811
    tokens: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens.save_pretrained(tmp_path / "base")  # where the policy is
    words = ["--model", str(tmp_path / "base"), "--trainer.max_steps", "12", "--trainer.max_length", "96"]
    words += ["--output_dir", str(tmp_path / "out"), "--method.lora.rank", "3", "--trainer.learning_rate", "1e-2"]
    assert run_sft.main(words) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert record["steps"] == 12
    assert record["loss"]["after"] < record["loss"]["before"] - 0.2
    assert record["tokens"] > 1000
    assert record["tokens_per_second"] > 0
    assert record["memory"]["rss_bytes"] > 0
    assert f"{record['loss']['after']:.3f} after" in capsys.readouterr().out
    import peft
    from transformers import AutoModelForCausalLM

    unipelt.register_with_peft()
    ids = torch.tensor([[101, 2026, 2028, 102]])
    with torch.no_grad():
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        base = policy.eval()(input_ids=ids).logits
    torch.testing.assert_close(plain, adapted, atol=1e-5, rtol=0)
    assert (adapted - base).abs().max() > 1e-2
    assert run_sft.main(words) == 2, "the folder is not empty"


@pytest.mark.slow
def test_an_unknown_option_of_trl_is_refused(trl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    tiny_model("llama").save_pretrained(tmp_path / "base")
    settings = run_sft.Settings(model=str(tmp_path / "base"), trainer={"packin": True})
    with pytest.raises(unipelt.ConfigError, match=r"trainer.packin.*packing"):
        run_sft.build(settings, None, None, None)


def losses(trl: Any, policy: Any, tokens: Any, folder: Path, **changed: Any) -> tuple[float, Any]:  # noqa: F811
    """The loss of a moved set over rows of different lengths, and the trainer."""
    from datasets import Dataset

    rows = [{"prompt": "a cat sat", "completion": " on the mat"}, {"prompt": "the", "completion": " sky is blue today"}]
    torch.manual_seed(0)
    trainer = trl.SFTTrainer(
        policy,
        args=trl.SFTConfig(**options(folder, per_device_eval_batch_size=2, **changed)),
        train_dataset=Dataset.from_list(rows * 2),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokens,
        peft_config=unipelt.PeftConfig(METHOD, task_type="CAUSAL_LM"),
    )
    shake(trainer.model, std=0.05)
    return trainer.evaluate()["eval_loss"], trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 32}], ids=str
)
def test_texts_in_one_row_have_the_loss_of_padded_texts(
    changed: dict[str, Any],
    trl: Any,  # noqa: F811
    policy: Any,  # noqa: F811
    tokens: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    want, trainer = losses(trl, policy, tokens, tmp_path / "padded")
    other = trainer.model.unload()
    got, packed = losses(trl, other, tokens, tmp_path / "one row", **changed)
    batch = next(iter(packed.get_eval_dataloader()))
    assert len(batch["input_ids"]) == 1, "the texts are in one row"
    assert got == pytest.approx(want, abs=1e-4)
    packed.train()


@pytest.mark.slow
def test_the_loss_is_over_completions_alone(trl: Any, policy: Any, tokens: Any, tmp_path: Path) -> None:  # noqa: F811
    alone, trainer = losses(trl, policy, tokens, tmp_path / "alone", completion_only_loss=True)
    labels = next(iter(trainer.get_eval_dataloader()))["labels"]
    assert (labels == -100).any()
    whole, other = losses(trl, trainer.model.unload(), tokens, tmp_path / "whole", completion_only_loss=False)
    assert (next(iter(other.get_eval_dataloader()))["labels"] != -100).sum() > (labels != -100).sum()
    assert alone != pytest.approx(whole, abs=1e-3)
