"""Comparison of two records of the same run: their outcomes, and the machines, packages and models behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unipelt.checkpoint.manifest import WEIGHTS
from unipelt.config.schema import flatten
from unipelt.runs.cache import SharedCache
from unipelt.runs.folder import MODEL

OUTCOME = ("evaluations", "best", "dev", "test", "majority", "gates", "parameters")
"""The parts of a record that are compared."""
_OF_NO_MATTER = ("transformers_version", "_name_or_path", "use_cache")  # a trainer turns use_cache off
_HARDWARE = ("device", "gpu", "cpu", "threads", "system")


def compare(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    tolerance: float = 0.0,
    weights: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """Compare the outcomes of two records.

    Args:
        then: the earlier record.
        now: the later record.
        tolerance: the largest absolute difference that counts as equal, as in `rerun`.
        weights: the files with the weights of the two models. They may be absent. If `tolerance` is 0, they are a part
            of the outcome.

    Returns:
        A dictionary with `equal`, `tolerance`, `numbers`, `largest`, `differences` and `weights`, as in the result of
        `rerun`.
    """
    same_floor = then.get("majority_of") == now.get("majority_of")  # otherwise they score different constant answers
    names = [name for name in OUTCOME if same_floor or name != "majority"]
    old, new = (dict(_leaves({name: record[name] for name in names})) for record in (then, now))
    found: list[dict[str, Any]] = []
    largest = 0.0
    for what in dict.fromkeys((*old, *new)):
        ours, theirs = new.get(what), old.get(what)
        if ours == theirs:
            continue
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (ours, theirs))
        by = abs(float(ours) - float(theirs)) if numbers else None  # type: ignore[arg-type]
        largest = max(largest, by or 0.0)
        exact = by is None or (isinstance(ours, int) and isinstance(theirs, int))
        if exact or by > tolerance:  # type: ignore[operator]
            found.append({"what": what, "then": theirs, "now": ours, "by": by})
    same = None
    if weights is not None and all(file.is_file() for file in weights):
        first, second = map(sha256_of, weights)
        same = first == second
        if not same and tolerance == 0:
            found.append({"what": f"{MODEL}/{WEIGHTS}", "then": first, "now": second, "by": None})
    return {
        "equal": not found,
        "tolerance": tolerance,
        "numbers": len({**old, **new}),
        "largest": largest,
        "differences": found,
        "weights": same,
    }


def surroundings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the differences between the surroundings of two runs, the most likely reasons for other numbers first.

    The surroundings are the hardware, settings of evaluation, packages, commit and model. Each difference has the keys
    `what`, `then` and `now`.
    """
    pairs = [("packed", then.get("packed"), now.get("packed"))]
    pairs += [("world_size", then.get("world_size", 1), now.get("world_size", 1))]
    pairs += [(name, then["hardware"].get(name), now["hardware"].get(name)) for name in _HARDWARE]
    pairs += [("eval_tokens", then["settings"].get("eval_tokens"), now["settings"]["eval_tokens"])]
    pairs += [(name, then["packages"].get(name), version) for name, version in now["packages"].items()]
    pairs += [("commit", then["code"]["commit"], now["code"]["commit"])]
    pairs += model_pairs(then["model"], now["model"])
    found = [{"what": what, "then": one, "now": other} for what, one, other in pairs if one != other]
    dirty = then["code"]["dirty"], now["code"]["dirty"]
    if any(dirty):  # equal commits may then be different code
        found.append({"what": "changes that are in no commit", "then": dirty[0], "now": dirty[1]})
    return found


def model_pairs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the fields of configuration and tokenizer that differ, as (name, then, now).

    Fields that an old record lacks are left out.
    """
    found = []
    if isinstance(then.get("config"), Mapping):
        old, new = (flatten(model["config"]) for model in (then, now))
        names = [name for name in {**old, **new} if name not in _OF_NO_MATTER]
        found = [(f"model.config.{name}", old.get(name), new.get(name)) for name in names]
    if "tokenizer" in then:
        found.append(("model.tokenizer", then["tokenizer"], now["tokenizer"]))
    return [item for item in found if item[1] != item[2]]


def format_report(result: Mapping[str, Any], most: int = 10) -> list[str]:
    """Return the lines of a report on a comparison.

    Args:
        result: the result of `rerun`.
        most: the largest number of differences to list.
    """
    count, found, tolerance = result["numbers"], result["differences"], result["tolerance"]
    if result["equal"]:
        files = {True: ", and the weights", False: "; the weights are not the same", None: ""}[result["weights"]]
        within = (
            "bit for bit" if not result["largest"] else f"to within {tolerance:g} (at most {result['largest']:.2g})"
        )
        lines = [f"equal, {within}: {count} numbers{files}"]
    else:
        lines = [f"different: {len(found)} of {count} numbers{f' by more than {tolerance:g}' if tolerance else ''}"]
        for item in found[:most]:
            by = "" if item["by"] is None else f"  ({item['by']:.2g})"
            lines.append(f"        {item['what']}: {item['then']!r:.70} then, {item['now']!r:.70} now{by}")
        if len(found) > most:
            lines.append(f"        and {len(found) - most} more; the largest difference is {result['largest']:.2g}")
    around = result["surroundings"]
    if around:
        lines.append("what surrounded them differs" + ("" if result["equal"] else ", the likely reason") + ":")
        lines += [f"        {item['what']}: {item['then']!r:.70} then, {item['now']!r:.70} now" for item in around]
    elif not result["equal"]:
        lines.append("nothing that the record knows of differs around them; see docs/reproducibility.md for the rest")
    return lines


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raise `OSError` if the file cannot be read."""
    return SharedCache().sha256(str(path))


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values inside nested mappings and lists, each with its path, such as `evaluations[0].loss`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{index}]")
    else:
        yield where, value
