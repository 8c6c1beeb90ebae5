"""Measure the costs of methods while a model writes: `python examples/decoding.py FOLDER` (see `--help`).

The program holds all models at once, and they take turns. In a turn each model reads the same text and then writes a
number of tokens, one at a time, with a cache. A ratio is a model's seconds over those of the bare model in the same
turn. The table has the median over the turns, with quartiles. The methods `peft:lora` and `peft:prefix` are PEFT's own.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_record

METHODS = ("lora", "prefix", "unipelt-apl", "peft:lora", "peft:prefix")
BARE = "bare model"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings from a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a name on the hub of a causal language model")
    parser.add_argument("--random", default=None, help="instead of a model: a Llama of random weights, LAYERSxWIDTH")
    parser.add_argument("--methods", default=",".join(METHODS), help="presets, paths of configurations, or peft:…")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the text that is read first")
    parser.add_argument("--tokens", type=int, default=12, help="tokens that are written in a turn")
    parser.add_argument("--batch_size", type=int, default=1, help="texts")
    parser.add_argument("--turns", type=int, default=15, help="turns that count, behind one that does not")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; None is PyTorch's choice")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("runs/decoding.json"), help="the record")
    settings = parser.parse_args(argv)
    for name in ("prompt", "tokens", "batch_size", "turns"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if (settings.model is None) == (settings.random is None):
        parser.error("give a model, or --random LAYERSxWIDTH")
    if settings.random is not None:
        layers, _, width = settings.random.partition("x")
        if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width) and int(width) % 64 == 0):
            parser.error("--random is LAYERSxWIDTH, as in 16x2048; 64 must divide the width")
    return settings


def load(settings: argparse.Namespace) -> Any:
    """Load the base model, or make it from random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    kind = getattr(torch, settings.dtype)
    if settings.random is None:
        return AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
    layers, width = (int(number) for number in settings.random.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=32000,
    )
    return AutoModelForCausalLM.from_config(config, dtype=kind)


def change(base: Any, method: str) -> Any:
    """Return a copy of the model with a method in it.

    The trainable parameters are moved away from their start, so that no term is zero.
    """
    import unipelt

    model = copy.deepcopy(base)
    if method.startswith("peft:"):
        import peft

        kinds = {
            "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
            "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"),
        }
        name = method.partition(":")[2]
        if name not in kinds:
            raise SystemExit(f"{method}: of PEFT's methods there are {', '.join(f'peft:{one}' for one in kinds)}")
        model = peft.get_peft_model(model, kinds[name]())
    elif method != BARE:
        unipelt.inject(model, method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def write(model: Any, ids: torch.Tensor, tokens: int, clock: Callable[[], float]) -> float:
    """Read a text, (B, N), then write `tokens` tokens one at a time. Return the seconds of the writing alone."""
    with torch.inference_mode():
        given = torch.ones_like(ids)
        found = model(input_ids=ids, attention_mask=given, use_cache=True)
        name = "cache" if "cache" in found else "past_key_values"  # Transformers 5.24 has another name
        start = clock()
        for _ in range(tokens):
            ids = found.logits[:, -1:].argmax(-1)
            given = torch.cat([given, given.new_ones(len(given), 1)], dim=1)
            found = model(input_ids=ids, attention_mask=given, use_cache=True, **{name: getattr(found, name)})
        return clock() - start


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock in seconds that waits for the device."""

    def read() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return read


def measure(settings: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each turn, by method."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base = load(settings).to(settings.device).eval()
    names = [BARE, *(name.strip() for name in settings.methods.split(",") if name.strip())]
    models = {name: change(base, name) for name in names}
    ids = torch.randint(
        5, base.config.vocab_size, (settings.batch_size, settings.prompt), generator=torch.Generator().manual_seed(0)
    ).to(settings.device)
    clock = clock_of(settings.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(settings.turns + 1):
        for name in names if turn % 2 else reversed(names):  # the first model finds other data in the caches
            took = write(models[name], ids, settings.tokens, clock)
            if turn:
                seconds[name].append(took)
    return seconds


def table(seconds: Mapping[str, Sequence[float]], tokens: int) -> str:
    """Return a Markdown table: milliseconds per token, and the ratio to the bare model with quartiles."""
    lines = ["| | ms a token | ratio to the bare model (quartiles) |", "| --- | ---: | ---: |"]
    bare = np.array(seconds[BARE])
    for name, values in seconds.items():
        low, median, high = np.percentile(np.array(values) / bare, [25, 50, 75])
        shown = f"{name}" if name == BARE else f"`{name}`"
        lines.append(f"| {shown} | {1e3 * np.median(values) / tokens:.1f} | {median:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the record."""
    settings = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    seconds = measure(settings)
    write_record(settings, seconds)
    print(table(seconds, settings.tokens))
    print(f"\nthe record is {settings.output}")


if __name__ == "__main__":
    main()
