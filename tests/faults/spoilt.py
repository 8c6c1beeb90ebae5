"""What stands in a sweep's files where something else wrote them, and what is said of it."""

from __future__ import annotations

import json
from typing import Any

_RUN: dict[str, Any] = {
    "folder": "rte-lora",
    "digest": "1",
    "method": "lora",
    "settings": {"task": "rte", "train_samples": 100, "seed": 1, "data_seed": 1},
}
_NOT_JSON = [
    (b"", "it is not valid JSON (Expecting value"),
    (b"{", "it is not valid JSON (Expecting property name"),
    (b"\xff\xfe", "it is not valid JSON (byte 0xff at position 0 is not UTF-8"),
    (b"[" * 100_000, "it is not valid JSON ("),
    (b"1" * 5000, "it is not valid JSON (Exceeds the limit"),
    (b"[]", "it is not a mapping"),
    (b"null", "it is not a mapping"),
]


def request(*, without: str = "", **changes: Any) -> bytes:
    """A `sweep.json`, but for the changes."""
    good = {"format": 1, "sweep": "a.yaml", "chosen": [], "runs": [_RUN]}
    return json.dumps({key: value for key, value in (good | changes).items() if key != without}).encode()


def _run(**changes: Any) -> bytes:
    """A `sweep.json` whose second run has other settings."""
    return request(runs=[_RUN, {**_RUN, "settings": _RUN["settings"] | changes}])


BAD_REQUESTS = [
    *_NOT_JSON,
    (b"{}", "format is missing"),
    (request(without="runs"), "runs is missing"),
    (request(without="chosen"), "chosen is missing"),
    (request(runs=3), "runs is 3"),
    (request(runs={"a": _RUN}), "runs is {"),
    (request(runs=[3]), "runs[0] is not a mapping"),
    (request(runs=[_RUN, {}]), "runs[1].folder is missing"),
    (request(runs=[{**_RUN, "digest": None}]), "runs[0].digest is None"),
    (request(runs=[{**_RUN, "settings": []}]), "runs[0].settings is not a mapping"),
    (request(format=2), "its format is 2, and this version reads 1"),
    (request(format=True), "format is True"),
    (request(chosen="learning_rate"), "chosen is 'learning_rate'"),
    (request(chosen=[5]), "chosen is [5]"),
    (_run(seed="1"), "runs[1].settings.seed is '1'"),
    (_run(seed=True), "runs[1].settings.seed is True"),
    (_run(seed=10**400), "runs[1].settings.seed is 1000"),
    (_run(seed=float("nan")), "it is not valid JSON (runs[1].settings.seed is nan"),
    (_run(data_seed=float("inf")), "it is not valid JSON (runs[1].settings.data_seed is inf"),
    (_run(train_samples=1.5), "runs[1].settings.train_samples is 1.5"),
    (_run(task=7), "runs[1].settings.task is 7"),
]
BAD_FAILURES = [
    *_NOT_JSON,
    (b"{}", "error is missing"),
    (b'{"message": "no luck"}', "error is missing"),
    (b'{"error": null}', "error is None"),
    (b'{"error": ["no", "luck"]}', "error is ["),
    (b'{"error": "no luck", "time": NaN}', "it is not valid JSON (time is nan, which is no finite number)"),
]
