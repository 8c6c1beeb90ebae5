"""Compare a step of two data-parallel processes with a step of one process on the joint batch, for several cases.

Usage: properties_parallel.py FOLDER   reads FOLDER/jobs.json; process N writes its results to FOLDER/results-N.json
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from strategies import Case, Sizes, Texts, batch, loss_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import unipelt
from scripts.families_parallel import PROCESSES, differing, differing_between_processes, in_processes, own_rows, whole

ROWS = 4


def read(job: dict[str, Any]) -> tuple[Case, list[Texts]]:
    """Return a case and its batches, from plain types."""
    values = job["case"]
    method, sizes = unipelt.UniPELTConfig.from_dict(values["method"]), Sizes(**values["sizes"])
    return Case(**{**values, "method": method, "sizes": sizes}), [Texts(**values) for values in job["texts"]]


def write(case: Case, several: list[Texts]) -> dict[str, Any]:
    """Return the plain types that `read` takes."""
    values = {**vars(case), "method": case.method.to_dict(), "sizes": vars(case.sizes)}
    return {"case": values, "texts": [{**vars(one), "hidden": [[]] * ROWS} for one in several]}


def step(case: Case, model: Any, forward: Callable[..., Any], several: list[Texts], rows: slice) -> dict[str, Tensor]:
    """Return the gradients of the last of several passes, and all parameters after a step with these gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # with a large epsilon, Adam's first step depends on the gradient's size and not only on its sign
    optimizer = torch.optim.AdamW(trained, lr=0.1, eps=0.1, weight_decay=0.0)
    for described in several:
        optimizer.zero_grad()
        loss_of(forward, case, batch(model, case, described), rows).backward()
    named = dict(model.named_parameters())
    found = {f"gradient of {name}": whole(p.grad) for name, p in named.items() if p.grad is not None}
    optimizer.step()
    return found | {name: whole(parameter) for name, parameter in named.items()}


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Return the names of the tensors in which two processes and one process differ."""
    case, several = read(job)
    one, model = case.build().train(), case.build().train()
    want = step(case, one, one, several, slice(None))
    got = step(case, model, DistributedDataParallel(model), several, own_rows())
    return {"other": differing(got, want), "other in the second process": differing_between_processes(got)}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = torch.distributed.FileStore(str(folder / "store"), PROCESSES)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120)
    )
    results: list[dict[str, Any]] = []
    for job in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
        try:
            results.append(compare(job))
        except Exception:
            results.append({"error": traceback.format_exc()})
        # written after each job, because a collective that only one process reaches may end both
        (folder / f"results-{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    sys.stdout.flush()
    # exit without torch's destructors: they may hold the GIL and wait for gloo's thread, which may wait for the GIL
    os._exit(0)


if __name__ == "__main__":
    sys.exit(in_processes(work, Path(sys.argv[1])))
