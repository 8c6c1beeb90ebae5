"""A folder imports only from the floors below its own; the list of floors is here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "unipelt"

FLOORS = (
    ("files", "lazy", "version"),
    ("config", "records"),
    ("packaged", "submodules"),
    ("hosts",),
    ("injection",),
    ("gates", "pack"),
    ("checkpoint",),
    ("api", "bridges"),
    ("multitask",),
    ("runs",),
    ("glue", "tasks"),
    ("launch", "sweep"),
    ("demo", "report"),
    ("cli",),
)
"""Folders and files of the package, from the ground up; those on one floor do not import each other."""

FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import from this package: at the top, in functions and for type checking alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, item.name) for item in node.names if item.name.split(".")[0] == "unipelt")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if str(node.module).split(".")[0] == "unipelt":
                for item in node.names:
                    inner = f"{node.module}.{item.name}"
                    yield node.lineno, inner if inner in MODULES else str(node.module)


def room(module: str) -> str:
    """The folder, or the file, at the top of the package that a module is in; of the package itself `unipelt`."""
    return module.split(".")[1] if "." in module else module


def climbing(module: str, source: str) -> Iterator[str]:
    """What a module may not import, in words."""
    for line, other in imported(source):
        if other == "unipelt":
            yield f"{module}, line {line}: imports unipelt itself"
        elif room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]:
            yield f"{module}, line {line}: {other} is not below it"


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} - {"unipelt"} == FLOOR.keys()


def test_no_import_goes_up() -> None:
    found = [
        problem
        for module, path in MODULES.items()
        if module != "unipelt"
        for problem in climbing(module, path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: {other for _, other in imported(path.read_text("utf-8"))} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "source",
    [
        "import unipelt",
        "from unipelt import inject",
        "from unipelt.api import inject",
        "import unipelt.checkpoint.save",
        "from unipelt.bridges import peft",
        "def f():\n    from unipelt.cli import main",
        "if TYPE_CHECKING:\n    from unipelt.runs.settings import TrainingSettings",
        "from unipelt.pack import Pack",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(climbing("unipelt.gates.fold", source))


@pytest.mark.parametrize("source", ["from unipelt.gates.merge import x", "from unipelt.injection import state"])
def test_the_scan_lets_pass(source: str) -> None:
    assert not list(climbing("unipelt.gates.fold", source))
