"""What the documentation says runs, exists and is complete."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from transformers.utils import logging

import unipelt
from unipelt.report import write_report

HOME = Path(__file__).parents[2]
DOCS = HOME / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
TEXTS = [*(DOCS / name for name in PAGES), HOME / "README.md"]
REPORTS = sorted(path.parent for path in DOCS.glob("results/*/report.md"))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the line that it starts in."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    language, start = None, 0
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if language is None and (match := re.fullmatch(r"```(\w+)", line)):
            language, lines, start = match[1], [], number + 1
        elif language is not None and line == "```":
            yield Block(language, "\n".join(lines) + "\n", start)
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"a block of {page} does not end"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block in one namespace; a block of text says what the one before it prints."""
    (tmp_path / "examples").symlink_to(HOME / "examples")
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    page, names, printed, ran = DOCS / "tutorial.md", {"__name__": "tutorial"}, None, 0
    for block in blocks(page):
        if block.language == "python":
            output = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # so that errors name its line
            with contextlib.redirect_stdout(output):
                exec(code, names)
            # Trainer tells its log this way
            printed = "".join(line for line in output.getvalue().splitlines(True) if not line.startswith("{"))
            ran += 1
        elif block.language == "text":
            assert printed == block.text, f"{page}, line {block.line}"
            printed = None
    assert ran >= 8
    assert (tmp_path / "runs" / "tutorial" / "gates.png").stat().st_size > 0


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_a_report_in_the_docs_is_that_of_its_records(folder: Path, tmp_path: Path) -> None:
    """Made again from the records beside it, every table, number and picture's name is the same."""
    write_report(folder / "records", tmp_path)
    for name in ("report.md", "report.csv", "runs.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8"), name
    made, kept = ({path.name for path in (place / "pictures").iterdir()} for place in (tmp_path, folder))
    assert made == kept


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_python_in_pages(page: Path) -> None:
    """It parses, and what it takes from the package is there, with those keywords."""
    for block in blocks(page):
        if block.language != "python":
            continue
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            where = f"{page.name}, line {block.line + getattr(node, 'lineno', 1) - 1}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "unipelt":
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), where
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("unipelt."):
                find(ast.unparse(node), where)


def find(path: str, where: str) -> Any:
    """What a dotted path from the package leads to."""
    found: Any = unipelt
    for name in path.split(".")[1:]:
        assert hasattr(found, name), f"{where}: there is no {path}"
        found = getattr(found, name)
    return found


def test_the_pages_name_files_that_are_there() -> None:
    paths = r"`((?:unipelt|tests|examples|configs|docs|\.ci)/[\w./-]+?\.(?:py|yaml|md|tsv))`"
    missing = {
        (page.name, path)
        for page in TEXTS
        for path in re.findall(paths, page.read_text(encoding="utf-8"))
        if not (HOME / path).is_file()
    }
    assert not missing


def test_every_public_name_is_in_the_api_page() -> None:
    told = re.findall(r"^::: (unipelt\.\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(set(told)) == len(told)
    objects = {}
    for path in told:
        module, _, name = path.rpartition(".")
        objects[name] = getattr(importlib.import_module(module), name)
    assert objects.keys() == set(unipelt.__all__)
    for name, found in objects.items():
        assert found is getattr(unipelt, name), name
        if name != "PRESETS":
            assert found.__doc__, f"{name} has no docstring"


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((HOME / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        else:
            for inner in value.values() if isinstance(value, dict) else value:
                yield from pages(inner)

    assert sorted(pages(site["nav"])) == sorted([*PAGES, *(f"results/{path.name}/report.md" for path in REPORTS)])
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [name for name in PAGES if name != "index.md" and f"({name})" not in index] == []


def test_the_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that the page names; and the page shows those that the command draws."""
    from records.test_record import make_record

    from unipelt.records.record import write_result

    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    monkeypatch.setattr(pictures, "LENGTHS", (16, 24))
    monkeypatch.setattr(pictures, "OPENINGS", (1e-4, 0.5))
    gates = {"layers": [0, 1], "examples": 3, "values": {"adapter": {"mean": [0.2, 0.4], "std": [0.1, 0.1]}}}
    write_result({**make_record(), "gates": gates}, tmp_path)
    monkeypatch.setattr("sys.argv", ["pictures.py", "--out", str(tmp_path / "out"), "--run", str(tmp_path)])
    with matplotlib.rc_context():
        pictures.main()
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    shown = re.findall(r"!\[.*?\]\(pictures/(.*?)\)", (DOCS / "gates.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(drawn)
