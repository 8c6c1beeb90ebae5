"""What the documentation says runs, exists and is complete."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import yaml
from bridges.test_adapterhub import injected
from bridges.test_adapterhub import written as write_adapterhub
from checkpoint.test_hub import hub  # noqa: F401 - a fixture
from helpers import tiny_bert
from tiny_task import save_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import unipelt
from unipelt import cli
from unipelt.config import SUBMODULES
from unipelt.hosts.families import FAMILIES
from unipelt.report import write_report
from unipelt.submodules.register import MODULES

HOME = Path(__file__).parents[2]
DOCS = HOME / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")))
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


NAMES = {"bert-base-uncased": "bert", "HuggingFaceTB/SmolLM2-135M": "llama", "google-t5/t5-small": "t5"}
"""What pages call models on the hub: a folder of that name is here, with a tiny random model of that family."""

IN_ONE = ("tutorial.md", "index.md", "README.md", "several-tasks.md", "guides/")
"""Pages whose blocks are one program. A block of any other page stands alone, with the names of `given`."""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of somebody who reads: examples and configurations, and models under the names that pages use."""
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(HOME / name)
    for name, family in NAMES.items():
        save_model(tmp_path / name, family)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIPELT_GLUE_DIR", raising=False)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    families, submodules = set(FAMILIES), set(SUBMODULES)
    yield tmp_path
    torch.use_deterministic_algorithms(False)
    for name in set(FAMILIES) - families:
        del FAMILIES[name]
    for name in set(SUBMODULES) - submodules:
        del MODULES[SUBMODULES.pop(name)]


def given(block: Block) -> dict[str, Any]:
    """What a block that stands alone may use: a model, injected unless the block does that, and what goes into it."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "unipelt": unipelt}
    names["AutoModelForSequenceClassification"] = AutoModelForSequenceClassification
    names["tokenizer"] = AutoTokenizer.from_pretrained("bert-base-uncased")
    for name in ("model", "base_model"):
        names[name] = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    if "unipelt.inject(model" not in block.text or "unipelt.remove(model)" in block.text:
        unipelt.inject(names["model"], "unipelt-apl")
    texts = ["the cat was lovely", "a dull grey dog sat on the mat"]
    names["batch"] = {
        **names["tokenizer"](texts, padding=True, return_tensors="pt"),
        "labels": torch.tensor([1, 0]),
    }
    names["dev_batches"] = [names["batch"]]
    return names


def python_of(pages: Iterable[str]) -> list[str]:
    """The pages that have code in Python."""
    return [page for page in pages if any(block.language == "python" for block in blocks(path_of(page)))]


def path_of(page: str) -> Path:
    """A page of the docs, or of the top."""
    return HOME / page if page == "README.md" else DOCS / page


def command(line: str) -> None:
    """Do what a line for a shell does, here, in this process."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        script = runpy.run_path(arguments[0])
        assert script["main"](arguments[1:]) in (0, None), line
    else:
        assert program == "unipelt", line
        assert cli.main(arguments) == 0, line


LOG = ("{'loss", "{'train_", "{'eval_")
"""How the lines begin that Trainer prints of its log."""
SLOW = ("guides/compare.md", "guides/learning-rate.md", "guides/own-table.md", "guides/trainer.md")
"""Pages with several runs."""


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in python_of([*PAGES, "README.md"])],
)
def test_the_code_runs(
    page: str, reader: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block; a block of text says what the one before it prints, and commands on files of the page run too."""
    if page == "hub.md":
        whole = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
        whole.save_pretrained("bert-base-uncased")  # with a head: what loads it brings no random one
        request.getfixturevalue("hub")
    elif page == "bridges.md":
        tiny_bert().save_pretrained("bert-base-uncased")
        write_adapterhub(injected(), reader / "adapterhub")
        for name in ("pytorch_adapter.bin", "pytorch_model_head.bin"):
            torch.save({"weight": torch.ones(2)}, name)
    path, printed = path_of(page), None
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes of a block look for their module
    for block in blocks(path):
        if block.language == "python":
            if "BitsAndBytesConfig" in block.text and importlib.util.find_spec("bitsandbytes") is None:
                continue  # tests/test_quantised.py has it
            if not page.startswith(IN_ONE):
                module.__dict__.update(given(block))
            output = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")  # so that errors name its line
            with contextlib.redirect_stdout(output):
                exec(code, module.__dict__)
            printed = "".join(line for line in output.getvalue().splitlines(True) if not line.startswith(LOG))
        elif block.language == "bash" and page.startswith("guides/"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if any(name in line for name in ("mine", "rates", "runs/compare")):
                    command(line)
        elif block.language == "text" and printed is not None:
            assert printed == block.text, f"{page}, line {block.line}"
            printed = None


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("path", sorted(HOME.glob("examples/notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    """Cell by cell, in a folder with nothing in it; the first cell of code would install a missing library."""
    monkeypatch.chdir(tmp_path)
    logging.set_verbosity_error()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [("".join(cell["source"]), cell) for cell in notebook["cells"]]
    assert not any(cell.get("outputs") for _, cell in cells), "cleared of what some machine printed"
    code = [source for source, cell in cells if cell["cell_type"] == "code"]
    assert "pip" in code[0]
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, source in enumerate(code):
            exec(compile(source, f"{path.name}, cell {number} of code", "exec"), names)


@pytest.mark.parametrize("folder", REPORTS, ids=lambda path: path.name)
def test_a_report_in_the_docs_is_that_of_its_records(folder: Path, tmp_path: Path) -> None:
    """Made again from the records beside it, every table, number and picture's name is the same."""
    write_report(folder / "records", tmp_path)
    for name in ("report.md", "report.csv", "runs.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8"), name
    made, kept = ({path.name for path in (place / "pictures").iterdir()} for place in (tmp_path, folder))
    assert made == kept


def test_five_runs_of_uncommitted_code_have_the_same_scores_again() -> None:
    folder = DOCS / "results" / "gte-small"
    again = sorted((folder / "again").glob("*/result.json"))
    assert len(again) == 5
    for path in again:
        found = json.loads(path.read_text(encoding="utf-8"))
        name = path.parent.name.rpartition("-")[0]
        (other,) = (folder / "records").glob(f"{name}-*/result.json")
        first = json.loads(other.read_text(encoding="utf-8"))
        assert (found["code"]["dirty"], first["code"]["dirty"]) == (False, True)
        assert found["best"] == first["best"]
        for part in ("dev", "test"):
            assert found[part]["metrics"] == first[part]["metrics"]
            assert abs(found[part]["loss"] - first[part]["loss"]) < 1e-4
        for one, two in zip(found["evaluations"], first["evaluations"], strict=True):
            assert one["metrics"] == two["metrics"]
            assert abs(one["loss"] - two["loss"]) < 1e-4


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
            elif isinstance(node, ast.Attribute) and re.fullmatch(r"unipelt(\.\w+)+", ast.unparse(node)):
                find(ast.unparse(node), where)


def find(path: str, where: str) -> Any:
    """What a dotted path from the package leads to."""
    found: Any = unipelt
    for name in path.split(".")[1:]:
        assert hasattr(found, name), f"{where}: there is no {path}"
        found = getattr(found, name)
    return found


def test_the_readme_is_short() -> None:
    assert len((HOME / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_commands_in_pages_have_these_options(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Of every line for a shell that starts a run or a command of the package."""
    monkeypatch.setenv("COLUMNS", "200")
    helps: dict[str, str] = {}
    found = 0
    for page in TEXTS:
        for block in blocks(page):
            lines = block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else []
            for line in lines:
                match = re.search(r"\b(?:python examples/(\w+)\.py|unipelt (\w+)) (.*)", line.partition("#")[0])
                if match is None or match[1] in ("several_tasks", "own_model"):
                    continue
                name = match[1] or match[2]
                if name not in helps:
                    main = runpy.run_path(str(HOME / "examples" / f"{name}.py"))["main"] if match[1] else cli.main
                    with contextlib.suppress(SystemExit):
                        main(["--help"] if match[1] else [name, "--help"])
                    helps[name] = capsys.readouterr().out
                for option in re.findall(r"(--[a-z]\w*)", match[3]):
                    found += 1
                    assert option in helps[name] or option == "--method", f"{page.name}: {line}"
    assert found > 50


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
