"""Records of runs that the tests of reports make up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipelt.config.presets import resolve
from unipelt.records.record import write_result
from unipelt.report.cells import Run
from unipelt.report.results import Results

METRICS = {"cola": "matthews_correlation", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}
COUNTER = itertools.count()


def make_record(
    task: str = "rte",
    method: str | Mapping[str, Any] = "adapter",
    seed: int = 1,
    score: float = 0.5,
    *,
    k: int | None = 100,
    name: str | None = None,
    dev: float | None = None,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    **settings: Any,
) -> dict[str, Any]:
    """A valid record; the digest is a new one each time."""
    metric = METRICS.get(task, "accuracy")
    config = resolve(method).to_dict()
    dev = score if dev is None else dev
    names = [part for part in ("adapter", "prefix", "lora") if (config[part] or {}).get("gate")]
    gates = {gate: {"mean": [0.25, 0.5 + 0.1 * seed], "std": [0.1, 0.1]} for gate in names}
    return {
        "format": 1,
        "status": "finished",
        "settings": {"task": task, "train_samples": k, "seed": seed, "data_seed": seed, "epochs": 50, **settings},
        "digest": f"{next(COUNTER):064x}",
        "method": {"name": name or str(method), "config": config, "learning_rate": learning_rate},
        "task": {
            "name": task,
            "columns": ["sentence1", "sentence2"],
            "labels": ["a", "b"],
            "metrics": [metric],
            "primary": metric,
            "notes": ["a part of the official rows"] if task == "mnli" else [],
        },
        "evaluations": [
            {"epoch": float(epoch), "step": 7 * epoch, "loss": 0.7, "metrics": {metric: dev * epoch / epochs}}
            for epoch in range(1, epochs + 1)
        ],
        "best": {"epoch": float(epochs), "step": 7 * epochs},
        "dev": {"loss": 0.6, "metrics": {metric: dev}},
        "test": {"loss": 0.65, "metrics": {metric: score}},
        "majority": 0.527,
        "seeds": {"run": seed, "data": seed},
        "data": {"train": {"rows": 100}, "dev": {"rows": 100}, "test": {"rows": 200, "sha256": task.ljust(64, "0")}},
        "model": {
            "name": settings.get("model", "bert-base-uncased"),
            "class": "BertForSequenceClassification",
            "sha256": None,
            "fingerprint": {},
        },
        "parameters": {"trained": 391000, "deployed": 180000, "head": 1538, "base": 109482240},
        "gates": {"layers": [4, 7], "examples": 200, "values": gates} if gates else None,
        "seconds": {"train": 42.0, "evaluation": 15.0, "total": 60.0},
        "memory": {"rss_bytes": 10**9, "cuda_bytes": None},
        "hardware": {"cpu": "a processor", "cores": 2, "gpu": None},
        "packages": {"torch": "2.6.0"},
        "code": {"commit": "c" * 40, "dirty": False},
        "attempts": 1,
        "files": {"model": "model", "gates": None, "predictions": []},
    }


def results_of(*records: Mapping[str, Any], **options: Any) -> Results:
    return Results(tuple(Run(f"run-{index}", record) for index, record in enumerate(records)), **options)


def save(folder: Path, *records: Mapping[str, Any]) -> list[Path]:
    paths = []
    for record in records:
        run = folder / f"run-{len(list(folder.iterdir())) if folder.exists() else 0:03}"
        run.mkdir(parents=True)
        paths.append(write_result(record, run))
    return paths


def by_row(results: Results) -> dict[tuple[str, str], Any]:
    return {(cell.row, cell.task): cell for cell in results.cells}


def spoil(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    for path, value in changes.items():
        *inner, last = path.split("__")
        part = record
        for key in inner:
            part = part[key]
        part[last] = value
    return record


def plan(*records: Mapping[str, Any], chosen: tuple[str, ...] = ()) -> str:
    runs = [
        {
            "folder": f"folder-{r['digest'][-6:]}",
            "digest": r["digest"],
            "method": r["method"]["name"],
            "settings": r["settings"],
        }
        for r in records
    ]
    return json.dumps({"format": 1, "sweep": "configs/table1.yaml", "chosen": chosen, "runs": runs})
