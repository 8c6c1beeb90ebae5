"""Mutation testing: change the code a little, and see whether a test fails.

    python tests/scripts/mutate.py --modules unipelt/submodules/gate.py --tests tests/injection/test_inject.py
    python tests/scripts/mutate.py --modules unipelt/submodules/gate.py --tests ... --sample 40 --seed 1 --out gate.json
    python tests/scripts/mutate.py --modules unipelt/submodules/gate.py --tests ... --again gate.json

Importing the libraries takes longer than most tests. So the libraries are imported once, and each mutant is a fork that
imports `unipelt` again with the mutated module in place. One run without mutants comes first. It must pass, and it
records which test executes which line (`coverage`). A mutant meets the tests that execute its statement, until one
fails. The order is: tests that killed its neighbours, then one test of each function, the fast tests first. Code that
runs while a module is imported meets all tests.

Some code is not changed: docstrings, annotations, assertions, imports, whether a dataclass is frozen, the words of
f-strings, and the raised exception. (A raise statement as a whole can be left out.)
The exit status is 0 whether or not mutants survive. Survivors must be read, because some change nothing that a test can
see.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 24 << 30
"""The bytes of address space that a mutant may take. A changed size may ask for any amount."""


# Changes of the code


@dataclass(frozen=True)
class Site:
    """One change.

    Attributes:
        operator: the kind of change.
        scope: the name of its function or class, with dots; empty at the top level.
        line: the line of the change.
        lines: the first and last line of its statement; for a compound statement, of its head.
        imported: whether the code runs while the module is imported.
        before, after: the code before and after the change.
        apply: makes the change in the tree in which the site was found.
    """

    operator: str
    scope: str
    line: int
    lines: tuple[int, int]
    imported: bool
    before: str
    after: str
    apply: Callable[[], None]


COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
LIBRARIES = (
    *("torch", "nn", "np", "math", "json", "os", "re", "copy", "inspect", "hashlib", "shutil", "csv", "time", "sys"),
    *("threading", "dataclasses", "self"),
)
UNTOUCHED = ("annotation", "returns", "exc", "cause")
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete)


def sites(tree: ast.Module) -> Iterator[Site]:
    """Yield every change of a module, in the order of its code."""
    yield from _inside(tree, "", (1, 1), True)


def _inside(node: ast.AST, scope: str, lines: tuple[int, int], imported: bool) -> Iterator[Site]:
    for name, value in ast.iter_fields(node):
        if name in UNTOUCHED:
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_left_alone(child):
                continue
            own_scope, own_lines, own_imported = scope, lines, imported
            if isinstance(child, ast.stmt):
                own_lines = _lines(child)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                own_lines = (getattr(child, "lineno", lines[0]), child.body[0].lineno)
            for operator, new in _changes(child):
                yield Site(
                    operator,
                    scope,
                    getattr(child, "lineno", own_lines[0]),
                    own_lines,
                    imported,
                    _text(child),
                    _text(new),
                    _replacing(node, name, place, new),
                )
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                own_scope = f"{scope}.{child.name}" if scope else child.name
            if isinstance(child, ast.FunctionDef):
                # defaults and decorators run when the function is defined, its body when the function is called
                for part in (child.args, *child.decorator_list):
                    yield from _inside(part, own_scope, own_lines, imported)
                body = ast.Module(child.body, [])
                yield from _inside(body, own_scope, own_lines, False)
                continue
            yield from _inside(child, own_scope, own_lines, own_imported)


def _replacing(node: ast.AST, name: str, place: int | None, new: ast.AST) -> Callable[[], None]:
    def apply() -> None:
        if place is None:
            setattr(node, name, new)
        else:
            getattr(node, name)[place] = new
        ast.fix_missing_locations(node)

    return apply


def _lines(statement: ast.stmt) -> tuple[int, int]:
    body = getattr(statement, "body", None)
    if not body:
        return statement.lineno, statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, body[0].lineno - 1)


def _text(node: ast.AST) -> str:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return " ".join([*(f"@{ast.unparse(part)}" for part in node.decorator_list), node.name])
    head = copy.copy(node)
    if hasattr(head, "body") and isinstance(head.body, list):
        head.body = [ast.Expr(ast.Constant(...))]
        if hasattr(head, "orelse"):
            head.orelse = []
    return ast.unparse(ast.fix_missing_locations(head))


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, (ast.Assert, ast.Import, ast.ImportFrom, ast.expr_context, ast.JoinedStr)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # docstrings
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dataclass":
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return True
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the possible changes of one node, each with the kind of change."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = copy.copy(node)
            other.ops = [*node.ops[:place], COMPARISONS[type(operator)](), *node.ops[place + 1 :]]
            yield "comparison", other
    elif isinstance(node, ast.BoolOp):
        yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for place in range(len(node.values)):
            left = [*node.values[:place], *node.values[place + 1 :]]
            yield "condition left out", left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
    elif isinstance(node, ast.UnaryOp):
        yield "sign or not left out", node.operand
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        changed = copy.copy(node)
        changed.op = ARITHMETIC[type(node.op)]()
        yield "arithmetic", changed
    elif isinstance(node, ast.Constant):
        yield from (("constant", ast.Constant(value)) for value in _other_values(node.value))
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.IfExp):
        yield "condition negated", ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "filter left out", ast.comprehension(node.target, node.iter, [], node.is_async)
    elif isinstance(node, (ast.If, ast.While)):
        negated = copy.copy(node)
        negated.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition negated", negated
    elif isinstance(node, ast.FunctionDef):
        for place in range(len(node.decorator_list)):
            bare = copy.copy(node)
            bare.decorator_list = [*node.decorator_list[:place], *node.decorator_list[place + 1 :]]
            yield "decorator left out", bare
    elif isinstance(node, ast.Lambda) and not isinstance(node.body, ast.Constant):
        yield "result left out", ast.Lambda(node.args, ast.Constant(None))
    elif isinstance(node, ast.Continue):
        yield "continue to break", ast.Break()
    elif isinstance(node, ast.Break):
        yield "break to continue", ast.Continue()
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "result left out", ast.Return(ast.Constant(None))
    if _is_removable(node):
        yield "statement left out", ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_removable(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):  # without the value of a name, the next line always fails
        return not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
    return isinstance(node, (ast.AugAssign, ast.Expr, ast.Raise, ast.Delete))


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [2 * value + 1]
    if isinstance(value, str):
        return [f"{value}?"]
    return []


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            left = [*node.keywords[:place], *node.keywords[place + 1 :]]
            yield "argument left out", ast.Call(node.func, node.args, left)
    if len(node.args) > 1:
        yield "argument left out", ast.Call(node.func, node.args[:-1], node.keywords)
    if "super()" in ast.unparse(node.func):
        return  # fails at once with any test
    if isinstance(node.func, ast.Attribute) and not _is_library(node.func.value):
        yield "call left out", node.func.value  # x.f(y) to x
    elif len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
        yield "call left out", node.args[0]  # f(x) to x


def _is_library(node: ast.AST) -> bool:
    """Return whether the node is a module and not a value. A call without its module cannot run."""
    return ast.unparse(node).partition(".")[0] in LIBRARIES


# A run of tests, in a process of its own


class Mutated(MetaPathFinder, SourceFileLoader):  # type: ignore[misc]
    """A finder and loader that loads a mutant in place of one module."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        SourceFileLoader.__init__(self, name, str(path))
        self.code = code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the spec of the mutated module, or None for another module."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the mutant."""
        return self.code


@dataclass(eq=False)  # pytest keeps plugins in sets
class Watching:
    """A pytest plugin that chooses and orders tests, and records their results."""

    chosen: list[str] | None = None
    coverage: Any = None
    durations: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the chosen tests, in their order."""
        if self.chosen is not None:
            place = {name: index for index, name in enumerate(self.chosen)}
            items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell `coverage` the name of the test that begins."""
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the duration of a part of a test, and its failure."""
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that could not be collected."""
        if report.failed:
            self.failed.append(f"collection of {report.nodeid}")


def in_child(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """Return the result of `work` in a forked process, or None if the process takes over `limit` seconds or dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        with os.fdopen(writing, "w") as pipe:
            try:
                text = json.dumps(work())
            except BaseException:  # after any error, this process must not go on as its parent
                text = json.dumps({"status": -1, "failed": [traceback.format_exc()]})
            pipe.write(text)
        os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, limit)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # the processes that the child has started
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def run_tests(files: Sequence[str], plugin: Watching, *options: str) -> int:
    """Run pytest on the files, and return its exit status."""
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", "--tb=no", "--assert=plain"]
    return int(pytest.main([*quiet, *options, *files], plugins=[plugin]))


def look(files: Sequence[str], modules: Sequence[Path], keyword: str = "") -> dict[str, Any]:
    """Run the tests without mutants. Return which fail, how long each takes, and which lines each executes."""
    before = set(sys.modules)
    watched = coverage.Coverage(
        data_file=None, config_file=False, include=[str(path) for path in modules], messages=False
    )
    plugin = Watching(coverage=watched)
    watched.start()
    watched.switch_context("import")
    status = run_tests(files, plugin, "-k", keyword)
    watched.stop()
    lines = {str(path): watched.get_data().contexts_by_lineno(str(path)) for path in modules}
    ours = ("unipelt", "tests", "examples", "ray", "_pytest", "conftest")
    libraries = [
        name
        for name, module in list(sys.modules.items())
        if name not in before
        and name.partition(".")[0] not in ours
        and "packages" in str(getattr(module, "__file__", None) or "")
    ]
    return {
        "status": status,
        "failed": plugin.failed,
        "durations": plugin.durations,
        "lines": lines,
        "libraries": libraries,
    }


def meet(name: str, path: Path, code: CodeType, tests: list[str]) -> dict[str, Any]:
    """Run the tests on a mutant. Return pytest's exit status and the failed tests."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.meta_path.insert(0, Mutated(name, path, code))
    plugin = Watching(chosen=tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    status = run_tests(files, plugin, "-x")
    return {"status": status, "failed": plugin.failed}


# The command


@dataclass
class Mutant:
    """A mutant and its outcome: `killed`, `timeout`, `survived`, `uncovered` by any test, or `invalid` (not Python)."""

    module: str
    operator: str
    scope: str
    line: int
    before: str
    after: str
    occurrence: int
    outcome: str = ""
    by: str = ""
    tests: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """The identity of the mutant, which stays the same if the code moves but does not change."""
        return self.module, self.scope, self.operator, self.before, self.after, self.occurrence


def found(path: Path, source: str) -> list[tuple[Mutant, Site, int]]:
    """Return every mutant of a module, with its site and its number in the order of the code."""
    counts: Counter[tuple[str, ...]] = Counter()
    mutants = []
    for number, site in enumerate(sites(ast.parse(source))):
        named = (site.scope, site.operator, site.before, site.after)
        counts[named] += 1
        module = path.relative_to(ROOT).as_posix()
        mutant = Mutant(module, site.operator, site.scope, site.line, site.before, site.after, counts[named])
        mutants.append((mutant, site, number))
    return mutants


def mutate(path: Path, source: str, number: int) -> CodeType | None:
    """Return the module with one change, compiled, or None if the change is not valid Python."""
    tree = ast.parse(source)
    next(site for index, site in enumerate(sites(tree)) if index == number).apply()
    try:
        return compile(ast.fix_missing_locations(tree), str(path), "exec")
    except (SyntaxError, ValueError, TypeError):
        return None


def dotted(path: Path) -> str:
    """Return the name under which a module is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    """Run the command that the top of this file describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", required=True, type=Path, help="files of the package")
    parser.add_argument("--tests", nargs="+", required=True, help="test files, or tests, as pytest takes them")
    parser.add_argument("-k", dest="keyword", default="", help="of these, what pytest's -k selects")
    parser.add_argument("--sample", type=int, help="at most so many mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--slowest", type=float, default=4.0, help="leave out tests that take longer, in seconds")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests that one mutant meets at most")
    parser.add_argument("--again", type=Path, help="a result: run only what was not killed there")
    parser.add_argument("--seen", type=Path, help="keep here what the run without mutants saw, or take it from here")
    parser.add_argument("--out", type=Path, help="write a result here (JSON)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    options = parser.parse_args()
    os.chdir(ROOT)
    modules = [path.resolve() for path in options.modules]

    chosen: list[tuple[Mutant, Site, int]] = []
    alive = None
    if options.again:
        alive = {
            Mutant(**values).key
            for values in json.loads(options.again.read_text())["mutants"]
            if values["outcome"] in ("survived", "uncovered")
        }
    sources = {path: path.read_text(encoding="utf-8") for path in modules}  # read once: files may change during the run
    for path, source in sources.items():
        here = [each for each in found(path, source) if alive is None or each[0].key in alive]
        if options.sample is not None and len(here) > options.sample:
            drawn = random.Random(f"{options.seed} {path.name}").sample(range(len(here)), options.sample)
            here = [here[place] for place in sorted(drawn)]
        chosen += here
    if options.list:
        for mutant, _, _ in chosen:
            print(f"{mutant.module}:{mutant.line} {mutant.operator}: {mutant.before}  ->  {mutant.after}")
        return

    begun = time.perf_counter()
    import torch  # only the libraries are imported here; every mutant imports the package itself
    import transformers

    if options.seen and options.seen.exists():
        seen = json.loads(options.seen.read_text())
    else:
        seen = in_child(lambda: look(options.tests, modules, options.keyword), 3600)
    if options.seen and seen is not None:
        options.seen.write_text(json.dumps(seen))
    if seen is None or seen["status"] != 0:
        why = "it broke off" if seen is None else f"pytest's status is {seen['status']}; {seen['failed']}"
        sys.exit(f"the tests must pass as they are: {why}")
    for library in seen["libraries"]:
        with suppress(Exception):
            importlib.import_module(library)
    durations = {test: seconds for test, seconds in seen["durations"].items() if seconds <= options.slowest}
    print(f"{len(durations)} tests, {sum(durations.values()):.1f} s; {len(chosen)} mutants", flush=True)

    kills: Counter[str] = Counter()
    for place, (mutant, site, number) in enumerate(chosen):
        path = ROOT / mutant.module
        lines = seen["lines"][str(path)]
        contexts = {test for line in range(site.lines[0], site.lines[1] + 1) for test in lines.get(str(line), ())}
        everywhere = site.imported or "import" in contexts
        tests = in_order([test for test in durations if everywhere or test in contexts], durations, kills)
        seconds = 0.0
        fitting: list[str] = []
        for test in tests:
            seconds += durations[test]
            if seconds > options.budget and fitting:
                break
            fitting.append(test)
        mutant.tests = len(fitting)
        code = mutate(path, sources[path], number)
        if code is None:
            mutant.outcome = "invalid"
        elif not fitting:
            mutant.outcome = "uncovered"
        else:
            name = dotted(path)
            result = in_child(
                lambda name=name, path=path, code=code, fitting=fitting: meet(name, path, code, fitting),  # type: ignore[misc]
                30 + 5 * min(seconds, options.budget),
            )
            if result is None:
                mutant.outcome = "timeout"
            else:
                mutant.outcome = "survived" if result["status"] in (0, 5) else "killed"
                mutant.by = next(iter(result["failed"]), "")
                kills[mutant.by] += 1
        if mutant.outcome in ("survived", "uncovered"):
            print(
                f"{mutant.outcome}  {mutant.module}:{mutant.line} ({mutant.scope}, {mutant.tests} tests) "
                f"{mutant.operator}:\n    - {mutant.before}\n    + {mutant.after}",
                flush=True,
            )
        if options.out and (place % 10 == 9 or place + 1 == len(chosen)):
            done = [each for each, _, _ in chosen[: place + 1]]
            about = {
                "commit": _said("git", "describe", "--always", "--dirty"),
                "command": sys.argv[1:],
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cores": os.cpu_count(),
                "seconds": round(time.perf_counter() - begun),
                "modules": counts(done),
                "mutants": [asdict(each) for each in done],
            }
            options.out.write_text(json.dumps(about, indent=1))
    for module, outcomes in counts([each for each, _, _ in chosen]).items():
        print(module, ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))


def in_order(tests: list[str], durations: dict[str, float], kills: Counter[str]) -> list[str]:
    """Return the tests in order: those that killed before, then one test of each function, then their other parameters.

    Of equal tests, the fast ones come first.
    """
    turns: Counter[str] = Counter()
    turn = {}
    for test in sorted(tests, key=lambda test: durations[test]):
        function = test.partition("[")[0]
        turn[test] = turns[function]
        turns[function] += 1
    return sorted(tests, key=lambda test: (-kills[test], turn[test], durations[test]))


def counts(mutants: list[Mutant]) -> dict[str, dict[str, int]]:
    """Return the number of mutants by module and outcome."""
    found: dict[str, Counter[str]] = {}
    for mutant in mutants:
        found.setdefault(mutant.module, Counter())[mutant.outcome] += 1
    return {module: dict(sorted(outcomes.items())) for module, outcomes in found.items()}


def _said(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
