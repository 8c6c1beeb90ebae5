"""Run forward passes on fake CUDA tensors: a CUDA build of PyTorch, and no GPU.

A fake tensor has a shape, a type and a device, and no numbers. Each operation is checked as on the device: a tensor on
another device raises, and so does a read of numbers by the host (`.item()`, `bool(tensor)`), which would wait for a
GPU. `.ci/fake-cuda` makes the environment and starts this script.

A model is built and injected on the CPU. Then its parameters and buffers become fake CUDA tensors. A case in which the
plain base fails too is counted by itself, because submodules are not its cause.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import small
from tiny import (
    CACHE,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    FAMILIES,
    SIMPLE,
    WITHOUT_INTERFACE,
    tiny_batch,
    tiny_config,
    tiny_model,
)

import unipelt
from unipelt.files.atomic import write_whole
from unipelt.gates.measure import find_gates
from unipelt.gates.merge import fold_constants
from unipelt.pack import Pack, _forward, kept_values

METHODS: dict[str, Any] = {
    **{name: name for name in ("adapter", "prefix", "lora", "unipelt-ap", "unipelt-al", "unipelt-apl", "unipelt")},
    **{name: name for name in ("houlsby", "parallel", "compacter", "ia3", "red", "bitfit", "mam")},
    "token gates": {"preset": "unipelt-apl", "gate": {"pooling": "token"}, "prefix": {"gating": "mass"}},
    "static gates": {"preset": "unipelt-apl", "gate": {"pooling": "static"}},
    "shared gates": {"preset": "unipelt-apl", "gate": {"shared": True}},
    "DoRA everywhere": {"preset": "lora", "lora": {"places": "all-linear", "decomposed": True, "gate": False}},
}
"""The methods that every family is tried with, if it takes them."""
HEADS = {
    "QuestionAnswering": ENCODERS[:6],
    "TokenClassification": ENCODERS[:6],
    "MaskedLM": ENCODERS[:6],
    "SequenceClassification": DECODERS,
}
"""Heads beside the usual one, with the families that are tried with each."""
Work = Callable[[FakeTensorMode, bool], None]
"""Runs one case in a mode, with submodules or, for comparison, without them."""


@dataclass(frozen=True)
class Case:
    """One case: its kind, its name, and what it runs."""

    kind: str
    name: str
    work: Work


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a fake CUDA tensor of the same shape and type."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def move(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer of a model by a fake CUDA tensor. Shared ones stay shared."""
    made: dict[Tensor, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    other = fake(tensor, mode)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
                held[name] = made[tensor]


def batch_of(family: str, mode: FakeTensorMode) -> dict[str, Tensor]:
    """Return a batch of fake CUDA tensors."""
    return {name: fake(tensor, mode) for name, tensor in tiny_batch(family).items()}


def build(family: str, method: Any, injected: bool, mode: FakeTensorMode, head: str = "", train: bool = False) -> Any:
    """Return a model with fake CUDA tensors."""
    model = tiny_model(family, head, dropout=0.1 if train else 0.0)
    if injected:
        unipelt.inject(model, method)
    model.train(train)
    move(model, mode)
    return model


def check_device(outputs: Any) -> None:
    """Raise `AssertionError` unless the logits, or the states, are on the device."""
    found = next(outputs[name] for name in ("logits", "start_logits", "last_hidden_state") if name in outputs)
    assert found.device.type == "cuda", f"the output is on {found.device}"


def forward(family: str, method: Any, head: str = "", train: bool = False) -> Work:
    """Return a case: one pass."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        model = build(family, method, injected, mode, head, train)
        with mode:
            check_device(model(**batch_of(family, mode)))

    return work


def cached(family: str, method: Any) -> Work:
    """Return a case: a pass that fills a cache, then one with a further token."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        model, batch = build(family, method, injected, mode), batch_of(family, mode)
        with mode, torch.no_grad():
            first = model(**batch, use_cache=True)
            ids = "decoder_input_ids" if family in ENCODER_DECODERS else "input_ids"
            mask = batch["attention_mask"]
            if family not in ENCODER_DECODERS:
                mask = torch.cat([mask, mask[:, :1]], dim=1)
            cache = first.past_key_values if "past_key_values" in first else first[CACHE]
            check_device(
                model(**{**batch, "attention_mask": mask, ids: batch[ids][:, :1], CACHE: cache}, use_cache=True)
            )

    return work


def packed(family: str, method: Any) -> Work:
    """Return a case: a pass of a pack of two replicas."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        model = tiny_model(family)
        if injected:
            unipelt.inject(model, method)
            Pack(model, tokens=9)
        values = dict(kept_values(model)) if injected else dict(model.named_parameters())
        stack = {name: fake(torch.stack([value.detach()] * 2), mode) for name, value in values.items()}
        move(model, mode)
        batch = {name: fake(torch.stack([one] * 2), mode) for name, one in tiny_batch(family).items()}
        with mode, torch.no_grad():
            assert _forward(model, stack, batch).device.type == "cuda"

    return work


def tasks(family: str) -> Work:
    """Return a case: a mixed batch of three tasks."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        base = tiny_model(family)
        if not injected:
            move(base, mode)
            with mode:
                check_device(base(**batch_of(family, mode)))
            return
        several = unipelt.Tasks(base)
        names = ["unipelt-apl", "lora", "adapter"]
        for name in names:
            several.add(name, small(name), num_labels=2)
        several.eval()
        move(several, mode)
        with mode, torch.no_grad():
            check_device(several(**batch_of(family, mode), tasks=names))

    return work


def recorded(family: str, method: Any) -> Work:
    """Return a case: gates are recorded during a pass."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        model = build(family, method, injected, mode)
        with mode, torch.no_grad():
            if not injected:
                check_device(model(**batch_of(family, mode)))
                return
            with unipelt.record_gates(model) as gates:
                check_device(model(**batch_of(family, mode)))
            assert gates
            assert all(one.device.type == "cuda" for one in gates.values())

    return work


def folded(family: str, method: Any) -> Work:
    """Return a case: a pass of a model whose gates are constants."""

    def work(mode: FakeTensorMode, injected: bool) -> None:
        model = tiny_model(family)
        if injected:
            unipelt.inject(model, method)
            constants: dict[str, dict[str, float]] = {}
            for gate in find_gates(model):
                if not getattr(gate.target, "once", False):  # DeBERTa-v2 uses one weight twice, so it is not merged
                    constants.setdefault(gate.path, {})[gate.name] = 0.5
            fold_constants(model, constants)
        move(model, mode)
        with mode, torch.no_grad():
            check_device(model(**batch_of(family, mode)))

    return work


def apl_for(family: str) -> Any:
    """Return `unipelt-apl`, or `unipelt-al` for a family without a prefix."""
    return small("unipelt-al" if family in (*SIMPLE, *WITHOUT_INTERFACE) else "unipelt-apl")


def cases() -> Iterator[Case]:
    """Yield every case, also those that a family refuses."""
    for family in FAMILIES:
        for name, chosen in METHODS.items():
            yield Case("evaluation", f"{family}, {name}", forward(family, small(chosen)))
            yield Case("training mode", f"{family}, {name}", forward(family, small(chosen), train=True))
        yield Case("recorded gates", family, recorded(family, apl_for(family)))
        if family in (*DECODERS, *ENCODER_DECODERS):
            yield Case("cache", family, cached(family, apl_for(family)))
        if family in ENCODERS:
            yield Case("folded", family, folded(family, apl_for(family)))
    known = transformers.AutoModelForSequenceClassification._model_mapping
    for head, families in HEADS.items():
        for family in families:
            if head != "SequenceClassification" or type(tiny_config(family)) in known:
                yield Case("heads", f"{family}, {head}", forward(family, apl_for(family), head))
    for family in ("bert", "roberta", "distilbert", "electra"):
        for name in ("unipelt-apl", "unipelt-al", "adapter", "lora"):
            yield Case("packs", f"{family}, {name}", packed(family, small(name)))
    rows = unipelt.resolve({"preset": "lora", "tokens": {"ids": [3, 7]}})
    prompt = unipelt.resolve({"preset": "prompt", "prompt": {"length": 4}})
    for family in ("bert", "roberta", "gpt2", "llama"):
        yield Case("tasks in one batch", family, tasks(family))
        yield Case("prompt", family, forward(family, prompt))
        yield Case("trained tokens", family, forward(family, rows, "CausalLM" if family in DECODERS else "MaskedLM"))


def fails(case: Case, injected: bool) -> str | None:
    """Run a case; return the error and the line of the package where it arose, or None.

    Raises `InjectionError` for a family that refuses the method.
    """
    try:
        case.work(FakeTensorMode(), injected)
    except unipelt.InjectionError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/unipelt/" in frame.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside of the package"
        return f"{where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def main() -> int:
    """Run all cases, print the counts and every failure, and return 1 if there is a failure of this package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", help="run the cases of this kind alone")
    parser.add_argument("--output", help="write the counts and failures to this JSON file")
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        print("this needs a CUDA build of PyTorch; .ci/fake-cuda makes an environment with one", file=sys.stderr)
        return 2
    torch._C._ensureCUDADeviceGuardSet()
    passed: Counter[str] = Counter()
    refused = 0
    failed: dict[str, str] = {}
    of_the_base: dict[str, str] = {}
    for case in cases():
        if arguments.kind not in (None, case.kind):
            continue
        try:
            problem = fails(case, True)
        except unipelt.InjectionError:
            refused += 1
            continue
        if problem is None:
            passed[case.kind] += 1
            continue
        alone = fails(case, False)
        (failed if alone is None else of_the_base)[f"{case.kind}: {case.name}"] = problem
        print(f"{'FAILED' if alone is None else 'the base fails too'}: {case.kind}: {case.name}: {problem}", flush=True)
    for kind, count in passed.items():
        print(f"{kind:<20} {count:>5} passed")
    print(
        f"{'all':<20} {passed.total():>5} passed, {len(failed)} failed, {len(of_the_base)} where the base fails too; "
        f"{refused} methods that the family refuses"
    )
    if arguments.output:
        values: dict[str, Any] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "passed": dict(passed),
        }
        values |= {"refused": refused, "failed": failed, "of the base": of_the_base}
        write_whole(Path(arguments.output), f"{json.dumps(values, indent=2)}\n".encode())
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
