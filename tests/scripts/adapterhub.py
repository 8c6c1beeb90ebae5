"""Write checkpoints of AdapterHub's `adapters` with the logits of that package, for tests/bridges/test_adapterhub.py.

The script needs Transformers 4.57 and therefore its own environment. The environment holds no other file of this
project.

Usage: adapterhub.py FOLDER   writes a folder for each case: the base model, as Transformers saves it, in `base`; the
    files of `save_adapter`, converted from pickles to safetensors; and `expected.safetensors` with inputs and logits
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# the libraries read this when they are imported
os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
import transformers
from adapters import LoRAConfig, PrefixTuningConfig, SeqBnConfig, UniPELTConfig
from safetensors.torch import save_file

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
    "electra": {"embedding_size": 32},
}
SMALL = {"prefix_length": 4, "bottleneck_size": 16}
UNIPELT = UniPELTConfig(PrefixTuningConfig(**SMALL), SeqBnConfig(reduction_factor=4), LoRAConfig(r=4, alpha=2))
WITHOUT_PREFIX = adapters.ConfigUnion(
    SeqBnConfig(reduction_factor=4, use_gating=True), LoRAConfig(r=4, use_gating=True)
)
ODD = adapters.ConfigUnion(
    PrefixTuningConfig(**SMALL, leave_out=[1], dropout=0.2),
    SeqBnConfig(reduction_factor=8, scaling=0.5, leave_out=[1], use_gating=True),
    LoRAConfig(r=3, alpha=5, leave_out=[1], dropout=0.1),
)
# name -> (model, configuration, head, form of saving); a head is Transformers' class (static) or AdapterHub's (flex)
CASES: dict[str, tuple[str, Any, str, str]] = {
    **{kind: (kind, UNIPELT, "static", "") for kind in ("bert", "roberta", "xlm-roberta", "electra")},
    "distilbert": ("distilbert", WITHOUT_PREFIX, "static", ""),
    "default": ("bert", UniPELTConfig(), "static", ""),
    "ejected": ("bert", UNIPELT, "static", "ejected"),
    "ejected-roberta": ("roberta", UNIPELT, "static", "ejected"),
    "odd": ("bert", ODD, "static", ""),
    "odd-ejected": ("bert", ODD, "static", "ejected"),
    "lora": ("bert", LoRAConfig(r=4, alpha=6), "static", ""),
    "lora-gated": ("roberta", LoRAConfig(r=4, use_gating=True), "static", ""),
    "adapter": ("bert", SeqBnConfig(reduction_factor=4), "static", ""),
    "prefix": ("bert", PrefixTuningConfig(**SMALL), "static", ""),
    "flat": ("bert", PrefixTuningConfig(prefix_length=4, flat=True, use_gating=True), "static", ""),
    "flex-bert": ("bert", UNIPELT, "flex", ""),
    "flex-roberta": ("roberta", UNIPELT, "flex", ""),
    "flex-distilbert": ("distilbert", WITHOUT_PREFIX, "flex", ""),
    "flex-pooler": ("bert", UNIPELT, "flex-pooler", ""),
    "flex-electra": ("electra", UNIPELT, "flex", ""),
    # cases that cannot be loaded
    "distilbert-prefix": ("distilbert", UNIPELT, "static", ""),
    "no-tanh": ("bert", PrefixTuningConfig(**SMALL, non_linearity="relu"), "static", ""),
    "two-gates": ("bert", PrefixTuningConfig(**SMALL, use_gating=True, shared_gating=False), "static", ""),
    "keys": ("bert", LoRAConfig(r=4, attn_matrices=["q", "k", "v"]), "static", ""),
    "dora": ("bert", adapters.DoRAConfig(r=4), "static", ""),
    "ia3": ("bert", adapters.IA3Config(), "static", ""),
    "feed-forward": ("bert", LoRAConfig(r=4, intermediate_lora=True), "static", ""),
    "houlsby": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4), "static", ""),
    "parallel": ("bert", adapters.ParBnConfig(reduction_factor=4), "static", ""),
    "learned-scale": ("bert", SeqBnConfig(reduction_factor=4, scaling="learned"), "static", ""),
    "gelu": ("bert", SeqBnConfig(reduction_factor=4, non_linearity="gelu"), "static", ""),
    "widths": ("bert", SeqBnConfig(reduction_factor={"0": 8, "default": 4}), "static", ""),
    "compacter": ("bert", adapters.CompacterPlusPlusConfig(reduction_factor=4), "static", ""),
    "prompt": ("bert", adapters.PromptTuningConfig(prompt_length=3), "static", ""),
    "layers-differ": (
        "bert",
        adapters.ConfigUnion(LoRAConfig(r=4, leave_out=[0]), SeqBnConfig(reduction_factor=4)),
        "static",
        "",
    ),
    "flex-three": ("bert", UNIPELT, "flex-three", ""),
    "gpt2": ("gpt2", LoRAConfig(r=4), "static", ""),
}


def batch(seed: int = 5) -> dict[str, torch.Tensor]:
    """Return texts of 9, 5 and 7 tokens, padded to 9: ids and mask, (3, 9)."""
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9) < torch.tensor([9, 5, 7])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def shake(model: torch.nn.Module, seed: int) -> None:
    """Move all parameters away from the start, where LoRA is zero and gates are near one half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def make(kind: str, config: Any, head: str, form: str, folder: Path) -> None:
    """Write the folder of one case."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60, "pad_token_id": 0}
        base = transformers.AutoConfig.for_model(kind, **sizes, num_labels=3)
    else:
        base = transformers.AutoConfig.for_model(kind, **{**SIZES, **OWN.get(kind, {})})
    if head == "static":
        model: Any = transformers.AutoModelForSequenceClassification.from_config(base)
        adapters.init(model)
    else:
        model = adapters.AutoAdapterModel.from_config(base)
    model.add_adapter("task", config=config)
    if head != "static":
        options: dict[str, Any] = {
            "distilbert": {"activation_function": "relu"},
            "electra": {"activation_function": "gelu"},
        }.get(kind, {})
        options |= {"flex-pooler": {"layers": 1, "use_pooler": True}, "flex-three": {"layers": 3}}.get(head, {})
        model.add_classification_head("task", num_labels=3, **options)
    model.set_active_adapters("task")
    model.eval()
    shake(model, seed=len(folder.name))
    expected: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, inputs in (("", batch()), ("other.", {"input_ids": batch(6)["input_ids"][:, :6]})):
            logits = model(**inputs).logits
            expected |= {f"{name}{key}": value.contiguous() for key, value in inputs.items()} | {
                f"{name}logits": logits
            }
    folder.mkdir()
    if form == "ejected":
        model.eject_prefix_tuning("task")
    model.save_adapter(str(folder), "task")
    as_safetensors(folder)
    save_file(expected, folder / "expected.safetensors")
    # the base model alone, under the names of Transformers
    own = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{model.base_model_prefix}.") and "task" not in name.split(".")
    }
    (folder / "base").mkdir()
    base.architectures = None
    base.save_pretrained(folder / "base")
    save_file(
        {name: tensor.clone() for name, tensor in own.items()}, folder / "base" / "model.safetensors", {"format": "pt"}
    )


def as_safetensors(folder: Path) -> None:
    """Convert the pickles of a folder to safetensors, as docs/bridges.md tells users to do."""
    for old, new in (
        ("pytorch_adapter.bin", "adapter.safetensors"),
        ("pytorch_model_head.bin", "model_head.safetensors"),
    ):
        tensors = torch.load(folder / old, weights_only=True)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / new)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for case, (kind, config, head, form) in CASES.items():
        make(kind, config, head, form, Path(sys.argv[1]) / case)
    print(adapters.__version__, transformers.__version__)
