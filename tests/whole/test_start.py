"""Importing the package, and making its command's parser, imports nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import unipelt
import unipelt.glue

HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "pyarrow", "pandas", "numpy", "matplotlib", "ray")


@pytest.mark.parametrize(
    "what",
    [
        "import unipelt",
        "import unipelt.glue",
        "from unipelt import UniPELTConfig, PRESETS, ConfigError",
        "from unipelt.cli import make_parser; make_parser()",
        "from unipelt.cli import main; main(['report'])",
        "from unipelt.cli import main; main(['configs'])",
        "from unipelt.cli import main; main(['configs', 'demo'])",
        "from unipelt.cli import main; main(['run', 'demo', '--no_such_field', '1'])",
        "import unipelt.demo.run",
        *(
            f"""
from unipelt.cli import main
try:
    main({words})
except SystemExit as end:
    assert end.code == 0
"""
            for words in (["--help"], ["--version"], ["run", "--help"], ["run", "qa-xquad", "--help"])
        ),
        "from unipelt.runs.settings import TrainingSettings",
    ],
)
def test_nothing_heavy_is_imported(what: str) -> None:
    code = f"import json, sys\n{what}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "unipelt" in modules
    assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize("package", [unipelt, unipelt.glue])
def test_every_name_is_there_when_it_is_asked_for(package: object) -> None:
    names = vars(package)["__all__"]
    assert set(names) <= set(dir(package))
    for name in names:
        assert getattr(package, name) is vars(package)[name], "the second access finds the name itself"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
    assert unipelt.Spot is unipelt.TargetInfo
    assert unipelt.__version__


SCRIPTS = [Path(__file__).parents[2] / "examples" / f"run_{name}.py" for name in ("glue", "qa", "translation")]


@pytest.mark.parametrize("words", [["--help"], ["--lerning_rate", "1"], ["--task", "nothing"]])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_it_takes_and_what_is_wrong_without_importing_pytorch(
    script: Path, words: list[str]
) -> None:
    code = f"""
import json, runpy, sys
main = runpy.run_path({str(script)!r})["main"]
try:
    main({words!r})
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(HEAVY) & set(json.loads(done.stdout.splitlines()[-1]))
    assert len(done.stderr.splitlines()) == (words != ["--help"])
