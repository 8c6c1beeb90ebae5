"""Skips, with the reason, of tests that need a part of Transformers' PEFT integration that some versions lack."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from tiny import DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model


@functools.cache
def _why_peft_is_refused() -> str:
    """Return why this Transformers takes no adapter of this PEFT: 5.24 wants PEFT 0.22. Empty if it takes one."""
    import peft

    try:
        tiny_model("bert").add_adapter(peft.LoraConfig(target_modules=["query"]))
    except ValueError as error:
        return str(error)
    return ""


def skip_where_peft_is_refused() -> None:
    """Skip the test where Transformers takes no adapter of the installed PEFT."""
    import peft

    if reason := _why_peft_is_refused():
        pytest.skip(f"Transformers {transformers.__version__}, PEFT {peft.__version__}: {reason}")


@functools.cache
def _loses_adapters(family: str) -> bool:
    """Return whether Transformers loses what PEFT's own LoRA saved, as 5.0 does in models with a head."""
    import peft

    task = "CAUSAL_LM" if family in DECODERS else "SEQ_2_SEQ_LM" if family in ENCODER_DECODERS else "SEQ_CLS"
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        base, out = Path(name) / "base", Path(name) / "out"
        whole = tiny_model(family)
        whole.save_pretrained(base)
        cls = type(whole)
        method = peft.LoraConfig(task_type=task, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
        model = peft.get_peft_model(cls.from_pretrained(base), method).eval()
        model.save_pretrained(str(out))
        got, want = (one(**tiny_batch(family)).logits for one in (cls.from_pretrained(out).eval(), model))
        return not torch.allclose(got, want, atol=1e-5)  # sums may be split otherwise in tensors that were read


def skip_where_adapters_are_lost(family: str) -> None:
    """Skip the test where Transformers does not load PEFT's own LoRA from a folder, or takes no adapter at all."""
    skip_where_peft_is_refused()
    if _loses_adapters(family):
        pytest.skip(f"Transformers {transformers.__version__} does not load PEFT's own LoRA of {family} from a folder")
