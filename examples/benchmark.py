"""Measure the costs of methods beside fine-tuning: `python examples/benchmark.py configs/table4.yaml` (see `--help`).

The costs are parameters, time of a training step and of inference, peak memory and ATen operations, on any model and
shape. They include the paper's Table 4. The program prints a Markdown table and writes a JSON record with every time.
All models are in memory at once, and they take turns, one step each. So other load on the machine affects all models
alike. Ratios to fine-tuning are taken within a turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from launches import ADAMW, above_lora
from measuring import describe, prepare

BASE = "fine-tuning"
FROZEN = "frozen"  # the model without submodules; only its head trains
PEFT_LORA, ADAPTERHUB = "PEFT's LoRA", "AdapterHub's UniPELT"
PASSES = ("train", "inference")
Turns = Mapping[str, Callable[[str], float]]  # by name, a function that does one pass and returns its seconds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the settings from a command line: a YAML or JSON file, if given, then `--field value`.

    Raises `ValueError`.
    """
    from unipelt.files.messages import suggest
    from unipelt.glue.settings import RunSettings
    from unipelt.runs.options import read_config
    from unipelt.sweep import split_list

    parser = _parser()
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    config, methods = parser.parse_args(argv).config, None
    words: list[str] = []
    for name, value in ({} if config is None else read_config(config, RunSettings, also=known)).items():
        if name not in known:
            raise ValueError(f"{config}: a benchmark has no {name!r}; {suggest(name, known, 'see --help')}")
        if name == "methods":
            methods = value if isinstance(value, list) else [value]
        elif value is not None:
            words += [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
    settings = parser.parse_args([*words, *argv])  # the file's values come first, so options win
    if settings.methods is not None:
        methods = [method.strip() for method in split_list(settings.methods)]
    settings.methods = methods or [FROZEN, "unipelt-apl"]
    settings.output = settings.output or f"runs/{Path(config or 'benchmark').stem}.json"
    for name in ("layers", "hidden", "heads"):
        if getattr(settings, name) is not None and settings.random is None:
            raise ValueError(f"{name} goes with random, the type of a model with random weights; leave it out")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and PyTorch finds no GPU; use --device cpu")
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    return settings


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from unipelt.files.arguments import OneLineParser

    parser = OneLineParser(usage="%(prog)s [CONFIG] [--FIELD VALUE ...]", description=__doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON (see configs/); options win over it")

    def add(name: str, type_: Callable[[str], Any], default: Any, text: str, **more: Any) -> None:
        text += "" if default is None else f"; default: {default}"
        more = {"nargs": "?", "const": True, **more} if type_ is _switch else more
        parser.add_argument(f"--{name}", type=type_, default=default, metavar="VALUE", help=text, **more)

    add("model", str, "bert-base-uncased", "a name on the hub, a folder, or package:NAME/FOLDER")
    add("random", _text, None, "instead of a model: random weights of this model type (bert, roberta, gpt2 ...)")
    add("layers", _count, None, "with random: layers of each stack; by default the model type's own")
    add("hidden", _count, None, "with random: width of the layers; the feed-forward network is 4 times as wide")
    add("heads", _count, None, "with random: attention heads; by default of 64 units")
    add(
        "methods",
        str,
        None,
        f"presets or paths, with commas (in a file a list, also of mappings), and {FROZEN}: the "
        f"model without submodules; {BASE} is always there; default: {FROZEN},unipelt-apl",
    )
    add("batch_size", _count, 16, "texts")
    add("tokens", _count, 128, "tokens a text, padding included")
    add("padding", _below(0.5), 0.0, "fraction of the tokens that is padding, below 0.5; lengths are spread evenly")
    add("dropout", _below(1.0), None, "probability of every dropout; by default the model's own")
    add("attention", _text, None, "attention back-end: sdpa, eager ...; by default the model's own")
    add("device", str, "auto", "auto (a GPU where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    add("precision", str, "fp32", "fp32, or bf16 for bfloat16 autocast", choices=("fp32", "bf16"))
    add("compile", _switch, False, "torch.compile for times (and CUDA's memory); operations are counted without")
    add("threads", _count, None, "CPU threads; by default PyTorch's choice")
    add("warmup", _count, 3, "turns before those that count")
    add("repetitions", _count, 20, "turns that count")
    add("peft", _switch, True, "a row of PEFT's LoRA, where peft is installed")
    add("adapters_python", _text, None, "a Python with adapters (AdapterHub): a row of its UniPELT")
    add("output", _text, None, "the record; by default in runs/, by the name of CONFIG")
    add("overwrite", _switch, False, "replace a record that is there")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"it must be a whole number, 1 or more, not {text!r}")
    return int(text)


def _below(bound: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 <= float(text) < bound:
                return float(text)
        raise argparse.ArgumentTypeError(f"it must be a number, at least 0 and below {bound}, not {text!r}")

    return read


def _text(text: str) -> str | None:
    return None if text.lower() in ("none", "null") else text


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"it must be true or false, not {text!r}")
    return text.lower() == "true"


# Turns and rows


def race(contenders: Turns, warmup: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every pass, by contender and kind of pass.

    In each turn every contender does one pass of each kind. Each turn starts with the next contender.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in PASSES} for name in contenders}
    names = list(contenders)
    for turn in range(-warmup, repetitions):
        first = turn % len(names)
        for kind in PASSES:
            for name in (*names[first:], *names[:first]):
                taken = contenders[name](kind)
                if turn >= 0:
                    seconds[name][kind].append(taken)
    return seconds


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of times that were taken in the same turn."""
    low, median, high = np.percentile(np.divide(times, base), [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


class Remote:
    """AdapterHub's model in another interpreter. Raises `ValueError` with the other interpreter's error."""

    def __init__(self, python: str, config: Any, settings: argparse.Namespace) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, str(measuring.__file__)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.python = python
        try:
            self.process = subprocess.Popen(command, **pipes)
        except OSError as error:
            raise ValueError(f"adapters_python: {python} cannot be started: {error}") from error
        self.description = self._ask({"config": config.to_dict(), "settings": vars(settings)})

    def _ask(self, message: Mapping[str, Any]) -> Any:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        answer = json.loads(line) if line.startswith("{") else {"error": "it ended without an answer"}
        if "error" in answer:
            self.close()
            raise ValueError(f"{ADAPTERHUB}, in {self.python}: {answer['error']}")
        return answer

    def seconds(self, kind: str) -> float:
        """Return the seconds of one pass of the other interpreter's model, as `Contender.seconds` does."""
        return self._ask({"seconds": kind})["seconds"]

    def close(self) -> None:
        """End the other process."""
        self.process.kill()
        self.process.communicate()


def make_config(settings: argparse.Namespace) -> Any:
    """Return the model's configuration, checked against the shape. Raises `ValueError` or `OSError`."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    from unipelt.files.messages import suggest
    from unipelt.runs.settings import locate_model

    if settings.random is None:
        config = AutoConfig.from_pretrained(locate_model(settings.model), num_labels=2, trust_remote_code=False)
    elif settings.random not in CONFIG_MAPPING:
        meant = suggest(settings.random, CONFIG_MAPPING, "Transformers lists its model types")
        raise ValueError(f"unknown model type {settings.random!r}; {meant}")
    else:
        config = _sized(settings)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"Transformers has no sequence classifier of the model type {config.model_type!r}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.tokens > longest:
        raise ValueError(f"tokens is {settings.tokens}, and the model takes {longest} at most")
    if config.pad_token_id is None:
        config.pad_token_id = 0
    for name, value in vars(config).items():
        if settings.dropout is not None and isinstance(value, float) and ("drop" in name or name.endswith("_pdrop")):
            setattr(config, name, settings.dropout)
    return config


def _sized(settings: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    assert settings.random is not None
    default = AutoConfig.for_model(settings.random, num_labels=2)
    layers, hidden = settings.layers or default.num_hidden_layers, settings.hidden or default.hidden_size
    heads = settings.heads or max(1, hidden // 64)
    if hidden % heads:
        raise ValueError(f"hidden is {hidden}, which {heads} heads do not divide; choose heads")
    sizes = dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), layers)
    names = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads")
    sizes |= dict.fromkeys(names, heads)
    sizes |= dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 4 * hidden)
    sizes |= {"hidden_size": hidden, "num_labels": 2}
    try:
        return AutoConfig.for_model(
            settings.random, **{name: size for name, size in sizes.items() if hasattr(default, name)}
        )
    except Exception as error:  # each model type checks its sizes in its own way
        raise _not_made(settings, error) from error


def _not_made(settings: argparse.Namespace, error: Exception) -> ValueError:
    from unipelt.files.messages import shorten

    return ValueError(
        f"Transformers cannot make a {settings.random!r} of this size: {shorten(error)}; choose other layers, hidden "
        "or heads"
    )


def load_model(config: Any, settings: argparse.Namespace) -> Any:
    """Return a fresh model, in float32."""
    from transformers import AutoModelForSequenceClassification

    from unipelt.runs.settings import locate_model

    choice = {} if settings.attention is None else {"attn_implementation": settings.attention}
    if settings.random is not None:
        try:
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **choice)
        except Exception as error:  # as above
            raise _not_made(settings, error) from error
    place = locate_model(settings.model)
    return AutoModelForSequenceClassification.from_pretrained(
        place, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **choice
    )


def resolve_methods(methods: Sequence[Any]) -> dict[str, Any]:
    """Return the configurations by name, fine-tuning first. Raises `ValueError`."""
    from unipelt import UniPELTConfig
    from unipelt.glue.settings import RunSettings

    found: dict[str, Any] = {}
    for method in (BASE, *methods):
        if method == FROZEN:
            found[FROZEN] = UniPELTConfig(adapter=None, prefix=None, lora=None)
        else:
            run = RunSettings(task="rte", method=method)  # reads and names a method as for a run
            found[run.method_name] = run.config
    return found


def paper_row(config: Any) -> dict[str, str]:
    """Return the paper's numbers for a method, as printed. The release's protocol counts as the paper's."""
    from unipelt import PRESETS, GateConfig
    from unipelt.report.paper import paper_costs

    same = replace(config, train_head=True, gate=GateConfig())
    name = next((name for name, preset in PRESETS.items() if preset == same), None)
    return {metric: value for (method, metric), value in paper_costs().items() if method == name}


def deployed(model: Any) -> Any:
    """Return a copy of the model in its deployed form, without the network that makes its prefixes.

    The given model does not change.
    """
    import unipelt

    with tempfile.TemporaryDirectory() as folder:
        unipelt.save(model, folder, deploy=True)
        return unipelt.load(unipelt.remove(copy.deepcopy(model)), folder)


def _rows(config: Any, settings: argparse.Namespace, notes: list[str]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield every contender with its name and description. If a wanted one is not available, add a note."""
    import unipelt

    for name, method in resolve_methods(settings.methods).items():
        try:
            change = partial(unipelt.inject, config=method)
            contender, row = describe(load_model(config, settings), config, settings, change)
        except unipelt.InjectionError as error:
            raise ValueError(f"{name}: {error}") from error
        counts = asdict(unipelt.parameter_counts(contender.model))
        kept = {part: counts[part] for part in ("trained", "deployed", "head", "base")}
        if method.prefix is not None:
            contender.deploy(deployed(contender.model))
        yield name, contender, {**row, "config": method.to_dict(), "parameters": kept, "paper": paper_row(method)}
    if settings.peft:
        try:
            import peft
        except ImportError:
            notes.append(f"{PEFT_LORA} is left out: peft is not installed (pip install peft).")
        else:
            lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16)
            model = load_model(config, settings)
            base = sum(parameter.numel() for parameter in model.base_model.parameters())
            contender, row = describe(model, config, settings, partial(peft.get_peft_model, peft_config=lora))
            trained = sum(p.numel() for name, p in contender.model.named_parameters() if "lora_" in name)
            head = sum(parameter.numel() for parameter in contender.parameters) - trained
            counts = {"trained": trained, "deployed": trained, "head": head, "base": base}
            yield PEFT_LORA, contender, {**row, "parameters": counts, "packages": {"peft": peft.__version__}}
    if settings.adapters_python is not None:
        remote = Remote(settings.adapters_python, config, settings)
        notes.append(
            f"{ADAPTERHUB} runs in a process of its own, with random weights: {remote.description['packages']}."
        )
        yield ADAPTERHUB, remote, remote.description


def benchmark(settings: argparse.Namespace, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure, write the record, and return the record. Raises `ValueError` or `OSError`."""
    from unipelt import UniPELTConfig
    from unipelt.files.atomic import write_whole
    from unipelt.hosts.locate import find_stacks
    from unipelt.runs.machine import describe_code, describe_hardware, describe_packages

    path = Path(settings.output or "runs/benchmark.json")
    if path.exists() and not settings.overwrite:
        raise ValueError(f"{path} is there already; choose another --output, or --overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    prepare(settings)
    config = make_config(settings)
    adapter = UniPELTConfig(prefix=None, lora=None)  # every known architecture takes an adapter
    layers = sum(len(stack.layers) for stack in find_stacks(load_model(config, settings), adapter))

    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Any] = {}
    notes: list[str] = []
    try:
        for name, contender, row in _rows(config, settings, notes):
            log(f"{name}: counted")
            rows[name], contenders[name] = row, contender
        log(f"{settings.warmup} + {settings.repetitions} turns of {len(rows)} models")
        seconds = race(
            {name: rival.seconds for name, rival in contenders.items()}, settings.warmup, settings.repetitions
        )
    finally:
        for remote in contenders.values():
            if isinstance(remote, Remote):
                remote.close()
    for name, row in rows.items():
        counted = row["operations"]
        counted["added_per_layer"] = (counted["forward"] - counted["frozen_forward"]) / layers
        row["seconds"] = seconds[name]
        row["ratio"] = {kind: ratio(seconds[name][kind], seconds[BASE][kind]) for kind in PASSES}
    record = {
        "format": 1,
        "kind": "benchmark",
        "settings": vars(settings),
        "model": {"class": config.model_type, "layers": layers, "hidden": getattr(config, "hidden_size", None)},
        "methods": rows,
        "notes": notes,
        "hardware": describe_hardware(settings.device),
        "packages": describe_packages(),
        "code": describe_code(),
    }
    write_whole(path, f"{json.dumps(record, indent=1, allow_nan=False)}\n".encode())
    return record


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown. The paper's numbers are in square brackets."""
    settings, on_gpu = record["settings"], record["hardware"]["gpu"] is not None
    heads = ["method", "trained", "deployed", "% of base", "head", "training step, ms", "% of fine-tuning (quartiles)"]
    heads += ["inference, ms", "% of fine-tuning (quartiles)", "peak MiB", "% of fine-tuning"]
    heads += ["operations, forward", "added a layer", "operations, training step"]
    heads += ["kernels, forward + backward", "AdamW, foreach", "AdamW, fused", *["GPU waits"] * on_gpu]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    most = record["methods"][BASE]["peak_bytes"]
    for name, row in record["methods"].items():
        counts, paper, cells = row["parameters"], row.get("paper", {}), [name]
        kept = counts["deployed"]
        cells += [f"{counts['trained']:,}", "?" if kept is None else f"{kept:,}{_beside(paper.get('parameters'))}"]
        cells += ["?" if kept is None else f"{100 * kept / counts['base']:.2f}", f"{counts['head']:,}"]
        for kind, metric in zip(PASSES, ("train_time_percent", "inference_time_percent"), strict=True):
            low, median, high = (100 * row["ratio"][kind][part] for part in ("low", "median", "high"))
            cells += [f"{1000 * np.median(row['seconds'][kind]):.1f}"]
            cells += [f"{median:.1f} ({low:.1f} to {high:.1f}){_beside(paper.get(metric))}"]
        cells += [f"{row['peak_bytes'] / 2**20:.1f}", f"{100 * row['peak_bytes'] / most:.1f}"]
        counted, kernels = row["operations"], row.get("launches", {}).get("kernels")
        cells += [str(counted["forward"]), f"{counted['added_per_layer']:.1f}", str(counted["train_step"])]
        cells += (
            ["?"] * 3
            if kernels is None
            else [
                f"{kernels['forward']} + {kernels['backward']}",
                *(str(kernels[form]) for form in ADAMW),
            ]
        )
        lines.append([*cells, *[str(row["synchronisations"])] * on_gpu])
    model = settings["model"] if settings["random"] is None else f"random {settings['random']}"
    memory = "CUDA's max_memory_allocated" if on_gpu else "bytes of all live tensors, counted operation by operation"
    kernel = "the GPU's, by PyTorch's profiler" if on_gpu else "operations that do work, by PyTorch's profiler"
    notes = [
        f"{model}, {record['model']['layers']} x {record['model']['hidden']}, batch {settings['batch_size']} x "
        f"{settings['tokens']} ({100 * settings['padding']:.0f} % padding), {settings['precision']}, "
        f"{'compiled' if settings['compile'] else 'eager'}, {settings['repetitions']} turns, on "
        f"{record['hardware']['gpu'] or record['hardware']['cpu']}, {record['hardware']['threads']} threads.",
        "Inference is of the deployed form. In square brackets the paper's, of BERT-base.",
        "Operations are ATen's without views; a training step's are of "
        "forward and backward; added a layer: in a forward pass, to the model without submodules, over the layers.",
        f"Kernels are {kernel}.",
        f"Peak: {memory}.",
        *above_lora(record["methods"]),
        *record["notes"],
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes)])


def _beside(printed: str | None) -> str:
    return "" if printed is None else f" [{printed}]"


def main(argv: Sequence[str]) -> int:
    """Run, and return the exit code: 0 done, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the libraries read this when they are imported
    try:
        settings = parse(argv)
        record = benchmark(settings, log=lambda line: print(line, file=sys.stderr, flush=True))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"benchmark.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{table(record)}\n- Every time is in {settings.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
