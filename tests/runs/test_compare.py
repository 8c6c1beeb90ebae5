"""The comparison of two records: what surrounded them, and the lines of the report."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from report_records import make_record

from unipelt.runs.compare import compare, format_report, surroundings


def earlier() -> dict[str, Any]:
    record = make_record(method="unipelt-apl", eval_tokens=5)
    record["model"] |= {"config": {"hidden": 16, "use_cache": True, "inner": {"a": 1}}, "tokenizer": "t"}
    return record


def test_surroundings_in_the_order_of_their_weight() -> None:
    then = earlier()
    now = deepcopy(then)
    now |= {"packed": 3, "world_size": 2}
    now["hardware"] = {"cpu": "another", "cores": 9, "gpu": "G", "device": "cuda", "threads": 4, "system": "S"}
    now["settings"]["eval_tokens"] = 7
    now["packages"] = {"torch": "2.7.0", "new": "1"}
    now["code"] = {"commit": "d" * 40, "dirty": True}
    now["model"]["config"] = {"hidden": 8, "use_cache": False, "inner": {"a": 2}, "more": 1}
    now["model"]["tokenizer"] = "u"
    assert [(item["what"], item["then"], item["now"]) for item in surroundings(then, now)] == [
        ("packed", None, 3),
        ("world_size", 1, 2),
        ("device", None, "cuda"),
        ("gpu", None, "G"),
        ("cpu", "a processor", "another"),
        ("threads", None, 4),
        ("system", None, "S"),
        ("eval_tokens", 5, 7),
        ("torch", "2.6.0", "2.7.0"),
        ("new", None, "1"),
        ("commit", "c" * 40, "d" * 40),
        ("model.config.hidden", 16, 8),
        ("model.config.inner.a", 1, 2),
        ("model.config.more", None, 1),
        ("model.tokenizer", "t", "u"),
        ("changes that are in no commit", False, True),
    ]
    assert surroundings(then, deepcopy(then)) == []
    assert surroundings({**then, "world_size": 1}, then) == [], "an older record lacks it"


def report(then: dict[str, Any], now: dict[str, Any], tolerance: float = 0.0, **changes: Any) -> list[str]:
    return format_report(compare(then, now, tolerance) | {"surroundings": surroundings(then, now)} | changes, most=99)


def test_the_lines_of_a_report() -> None:
    then = earlier()
    count = compare(then, then)["numbers"]
    assert report(then, then) == [f"equal, bit for bit: {count} numbers"]
    assert report(then, then, weights=True) == [f"equal, bit for bit: {count} numbers, and the weights"]
    now = deepcopy(then)
    now["test"]["loss"] += 2e-5
    same = report(then, now, 1e-4, weights=False)
    assert same == [f"equal, to within 0.0001 (at most 2e-05): {count} numbers; the weights are not the same"]
    now["dev"]["loss"] = 0.85
    now["gates"] = None
    found = report(then, now, 1e-4)
    total = compare(then, now)["numbers"]
    assert found[0] == f"different: {len(found) - 2} of {total} numbers by more than 0.0001"
    assert found[1] == "        dev.loss: 0.6 then, 0.85 now  (0.25)"
    assert "        gates.examples: 200 then, None now" in found
    assert found[-1].startswith("nothing that the record knows of differs around them; see docs/reproducibility.md")
    now["hardware"]["cpu"] = "another"
    assert report(then, now, 1e-4)[-2:] == [
        "what surrounded them differs, the likely reason:",
        "        cpu: 'a processor' then, 'another' now",
    ]
    exact = report(then, now)
    assert exact[0] == f"different: {len(found) - 1} of {total} numbers", "the loss of the test too"
    assert "        test.loss: 0.65 then, 0.65002 now  (2e-05)" in exact
    now = deepcopy(then)
    now["hardware"]["cpu"] = "another"
    assert report(then, now)[1] == "what surrounded them differs:"
