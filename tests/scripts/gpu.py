"""Run the checks of `.ci/gpu`, which need a GPU, part by part, the most important part first.

Each part is a process with a log. A part that has finished at this commit is not repeated, so an interrupted run can
continue. The report names the parts that were not run because the time was over. `report.md` and `report.json` are
written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.runs.machine import describe_code, describe_hardware, describe_packages

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: the name of its log and its result.
        title: the heading of its section in the report.
        command: the arguments of the Python interpreter.
        most: the seconds after which the process is ended.
    """

    name: str
    title: str
    command: tuple[str, ...]
    most: float


def parts(out: Path, small: bool) -> list[Part]:
    """Return the parts. With `small`, they are small enough for a CPU, to try the script."""
    device = "cpu" if small else "cuda"
    shape: tuple[str, ...] = (
        "--random",
        "bert",
        "--batch_size",
        "2" if small else "16",
        "--tokens",
        "8" if small else "128",
    )
    shape += ("--layers", "1", "--hidden", "64") if small else ()
    times = ("--repetitions", "1", "--warmup", "1") if small else ("--repetitions", "15")
    methods = ("--methods", "frozen,lora,unipelt-apl")
    one = ("--methods", "frozen", "--peft", "false") if small else methods  # compiling takes long on a CPU

    def bench(name: str, *more: str) -> tuple[str, ...]:
        own = ("--device", device, "--output", str(out / f"{name}.record.json"), "--overwrite")
        return ("examples/benchmark.py", *more, *own, *times)

    large = ("--random", "llama", "--layers", "1" if small else "16", "--hidden", "64" if small else "2048")
    long = ("--batch_size", "1" if small else "4", "--tokens", "8" if small else "512", "--precision", "bf16")
    sizes = ("--layers", "1", "--hidden", "64", "--tokens", "8", "--batch_size", "2") if small else ()
    half = ("--precision", "bf16")
    decoder = "1x64" if small else "16x2048"
    few = ("--turns", "1", "--tokens", "2", "--prompt", "2") if small else ("--tokens", "32")
    tests = ("tests/whole/test_cuda.py", *(("-k", "waits or cache") if small else ()))
    return [
        Part("tests", "Tests", ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *tests), 240),
        Part("step", "A training step, BERT-base, bf16", bench("step", *shape, *methods, *half), 120),
        Part(
            "packing",
            "Runs at once, BERT-base, bf16",
            (
                *("examples/packing.py", "--device", device, *half, *sizes),
                *("--runs", "1,2" if small else "1,5,20", "--turns", "1" if small else "10"),
                *("--output", str(out / "packing.record.json")),
            ),
            120,
        ),
        Part(
            "decoding",
            "Decoding, a billion parameters, bf16",
            (
                *("examples/decoding.py", "--random", decoder, "--device", device, "--dtype", "bfloat16", *few),
                *("--output", str(out / "decoding.record.json")),
            ),
            120,
        ),
        Part("compiled", "The same step, compiled", bench("compiled", *shape, *one, *half, "--compile"), 180),
        Part("decoder", "A training step, a billion parameters, bf16", bench("decoder", *large, *methods, *long), 150),
    ]


def run(part: Part, out: Path, seconds: float, device: str) -> dict[str, Any]:
    """Run a part, and return its result."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "examples"))
    environment = {**os.environ, "UNIPELT_DEVICE": device, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    begun, limit = time.monotonic(), min(part.most, seconds)
    with open(out / f"{part.name}.log", "wb") as log:
        try:
            code = subprocess.run(
                [sys.executable, *part.command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit,
                check=False,
            ).returncode
            status = "finished" if code == 0 else f"failed with exit code {code}: {_last_line(out, part)}"
        except subprocess.TimeoutExpired:
            status = f"ended after {limit:.0f} s"
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "command": list(part.command)}


def _last_line(out: Path, part: Part) -> str:
    """Return the last line of a part's log that is not empty, or nothing."""
    lines = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")[:300]


def shown(part: Part, result: dict[str, Any] | None, out: Path) -> str:
    """Return a part's section: the tables that it printed, or the end of its log."""
    lines = [f"## {part.title}", ""]
    if result is None:
        return "\n".join([*lines, "Not run: the time was over.", ""])
    text = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line for line in text if line.startswith("|")]
    if result["status"] != "finished" or not rows:
        rows = ["```", *text[-12:], "```"]
    return "\n".join([*lines, f"{result['status']}, {result['seconds']} s", "", *rows, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are left. Return 0 if all have finished, 1 if not, and 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of logs, records and the report")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which no more is done")
    parser.add_argument("--small", action="store_true", help="tiny models on a CPU, to try the script")
    settings = parser.parse_args(argv)
    out: Path = settings.out.resolve()
    device = "cpu" if settings.small else "cuda"
    if not settings.small:
        import torch

        if not torch.cuda.is_available():
            print("PyTorch finds no GPU; --small tries the script on a CPU", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + settings.seconds
    about = {"code": describe_code(), "packages": describe_packages(), "hardware": describe_hardware(device)}
    results: dict[str, dict[str, Any]] = {}
    todo = parts(out, settings.small)
    for part in todo:
        place = out / f"{part.name}.json"
        if place.is_file():
            before = json.loads(place.read_text(encoding="utf-8"))
            if before["status"] == "finished" and before["code"] == about["code"]:
                results[part.name] = before
                continue
        if (left := end - time.monotonic()) < 5:
            continue
        print(f"{part.name} …", flush=True)
        result = results[part.name] = {**run(part, out, left, device), "code": about["code"]}
        write_whole(place, (json.dumps(result, indent=1) + "\n").encode())
        print(f"{part.name}: {result['status']}, {result['seconds']} s", flush=True)
        report(out, todo, results, about)
    report(out, todo, results, about)
    return 0 if all(results.get(part.name, {}).get("status") == "finished" for part in todo) else 1


def report(out: Path, todo: Sequence[Part], results: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Write `report.json` and `report.md`."""
    write_whole(out / "report.json", (json.dumps({**about, "parts": results}, indent=1) + "\n").encode())
    hardware, packages = about["hardware"], about["packages"]
    head = (
        f"On {hardware['gpu'] or hardware['cpu']}, PyTorch {packages['torch']}, Transformers "
        f"{packages['transformers']}, commit `{str(about['code']['commit'])[:7]}`"
        f"{' with changes' if about['code']['dirty'] else ''}."
    )
    sections = [shown(part, results.get(part.name), out) for part in todo]
    write_whole(out / "report.md", "\n".join([head, "", *sections]).encode())


if __name__ == "__main__":
    sys.exit(main())
