"""Count what a training step starts: ATen operations by name, and kernels as PyTorch's profiler sees them.

This file needs PyTorch only, as `measuring.py` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ADAMW: dict[str, dict[str, Any]] = {"adamw_foreach": {"foreach": True}, "adamw_fused": {"fused": True}}
"""The forms of AdamW whose kernels are counted, with their arguments."""
MEMORY = ("empty", "new_empty", "resize", "set_")
"""How the names of operations start that only allocate memory."""


def launches(contender: Any, counter: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    """Return what a training step of a contender starts, part by part. The parameters do not change.

    Args:
        contender: a `measuring.Contender`.
        counter: `measuring.OperationCounter`.

    Returns:
        `operations`: for `forward` and `backward`, how often each ATen operation runs, by its name. `kernels`: how many
        kernels `forward`, `backward`, `adamw_foreach` and `adamw_fused` run, each alone.
    """
    contender.model.train()
    with counter() as forward:
        loss = contender.loss(contender.model)
    with counter() as backward:
        loss.backward()
    contender.optimizer.zero_grad()
    found: dict[str, Any] = {"operations": {"forward": dict(forward.counts), "backward": dict(backward.counts)}}
    made: list[Any] = []
    on_gpu = contender.settings.device == "cuda"
    kernels = {"forward": count_kernels(lambda: made.append(contender.loss(contender.model)), on_gpu)}
    kernels["backward"] = count_kernels(made.pop().backward, on_gpu)
    for name, form in ADAMW.items():
        optimizer = torch.optim.AdamW(contender.parameters, lr=0.0, **form)
        optimizer.step()  # makes the moments
        kernels[name] = count_kernels(optimizer.step, on_gpu)
    contender.optimizer.zero_grad()
    return {**found, "kernels": kernels}


def count_kernels(run: Callable[[], Any], on_gpu: bool = False) -> int:
    """Return the number of kernels that a function runs.

    On a GPU these are its kernels, copies and fills. On a CPU they are the ATen operations that do work themselves: an
    operation that is no view, does more than allocate memory, and calls no other operation that does work.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events: Any = profiler.events()
    if on_gpu:
        return sum(
            event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False) for event in events
        )
    working = {id(event): event for event in events if _works(event.name)}
    callers = set()
    for event in working.values():
        above = event.cpu_parent
        while above is not None:
            callers.add(id(above))
            above = above.cpu_parent
    return len(working.keys() - callers)


def _works(name: str) -> bool:
    """Return whether an operation of this name is one of ATen's, and neither a view nor an allocation."""
    short = name.removeprefix("aten::")
    if short == name or short.startswith(MEMORY) or short == "_unsafe_view":
        return False
    packet = getattr(torch.ops.aten, short, None)
    if packet is None:
        return True
    returns = getattr(packet, packet.overloads()[0])._schema.returns
    aliases = [value.alias_info for value in returns if value.alias_info is not None]
    return not aliases or any(alias.is_write for alias in aliases)


def above_lora(rows: Mapping[str, Mapping[str, Any]], most: int = 5) -> list[str]:
    """Return a sentence for each method with the operations of which its step has the most beyond that of `lora`.

    Args:
        rows: the rows of a benchmark's record, by method. Without a row `lora` there are no sentences.
        most: the number of operations to name.
    """
    base = rows.get("lora", {}).get("launches")
    if base is None:
        return []
    lines = []
    for name, row in rows.items():
        if name == "lora" or "launches" not in row:
            continue
        more = {}
        for part, counts in row["launches"]["operations"].items():
            more[part] = Counter(counts)
            more[part].subtract(base["operations"][part])
        total = more["forward"] + more["backward"]  # without the operations of which there are not more
        sources = [
            f"{source.removeprefix('aten.').removesuffix('.default')} {count:+d} "
            f"({more['forward'][source]:+d} forward, {more['backward'][source]:+d} backward)"
            for source, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:most]
        ]
        difference = sum(more["forward"].values()) + sum(more["backward"].values())
        lines.append(f"{name}, operations of a training step beyond lora ({difference:+d}): {', '.join(sources)}.")
    return lines
