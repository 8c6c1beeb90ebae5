"""The configuration in a folder of `save_peft` is the one that PEFT itself writes for the same method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import refusing, tiny_bert
from tiny import tiny_model
from transformers import FNetConfig, FNetForSequenceClassification

import unipelt

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# PEFT asks a model for an attribute that Transformers 5.23 deprecates, and a norm for its features
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*[nN]orm"),
]


@pytest.mark.parametrize(
    ("method", "theirs", "fields"),
    [
        (
            "ia3",
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        ("ln_tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
        ({"preset": "prompt", "prompt": {"length": 5}}, "PromptTuningConfig", {"num_virtual_tokens": 5}),
        (
            {"preset": "lora", "lora": {"rank": 4, "alpha": 12.0, "dropout": 0.1, "decomposed": True}},
            "LoraConfig",
            {
                **{"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "use_dora": True},
                "target_modules": ["q_proj", "v_proj"],
            },
        ),
    ],
    ids=["ia3", "ln_tuning", "prompt", "dora"],
)
def test_a_configuration_is_pefts_own(method: Any, theirs: str, fields: dict[str, Any], tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_model("llama"), method), tmp_path / "ours")
    config = getattr(peft, theirs)(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(tiny_model("llama"), config)
    model.save_pretrained(tmp_path / "theirs")
    ours, other = (read(tmp_path / name / "adapter_config.json") for name in ("ours", "theirs"))
    assert ours == {name: other[name] for name in ours}


def read(path: Path) -> dict[str, Any]:
    """A configuration, its lists of modules sorted: PEFT writes a set in any order."""
    values = json.loads(path.read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning"])
def test_a_model_without_attention_is_refused(method: str, tmp_path: Path) -> None:
    unipelt.save_peft(unipelt.inject(tiny_bert(), method), tmp_path)
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 20}
    model = FNetForSequenceClassification(FNetConfig(**sizes, max_position_embeddings=20, tpu_short_seq_length=8))
    with refusing(model, "FNet", error=unipelt.InjectionError):
        unipelt.load_peft(model, tmp_path)
