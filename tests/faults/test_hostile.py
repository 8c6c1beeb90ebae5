"""Nothing unpickles, evaluates or runs code that came with a file, and the fuzzer of the loaders works."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_bert
from tiny_task import make_quick, quick, save_model
from transformers import BertConfig, BertForSequenceClassification, Trainer

import unipelt
from unipelt.checkpoint.manifest import MANIFEST
from unipelt.glue.job import prepare
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.records.record import read_result
from unipelt.runs.errors import RunError
from unipelt.sweep import read_sweep

pytestmark = pytest.mark.usefixtures("alone")

TESTS = Path(__file__).parents[1]
HOME = TESTS.parent
SOURCES = sorted([*(HOME / "unipelt").rglob("*.py"), *(HOME / "examples").rglob("*.py")])

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("yaml.FullLoader", "numpy.load", "np.load", "pd.read_pickle", "pandas.read_pickle", "os.system"),
    *("datasets.load_from_disk", "importlib.import_module", "runpy.run_path", "evaluate.load"),
}
ALLOWED: dict[tuple[str, str], str] = {
    ("unipelt/lazy.py", "importlib.import_module"): "imports modules of this package alone, by a table in its code",
    ("unipelt/sweep/serve_runs.py", "importlib.import_module"): "imports modules that its code names",
}
"""By file and by what it uses: why."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick(tmp_path_factory.mktemp("home"))


# --- what the sources say


def suspicious(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that unpickles, evaluates, or may run code that came with a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names = (
                names if isinstance(node, ast.Import) else [node.module or "", *(f"{node.module}.{n}" for n in names)]
            )
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in UNPICKLERS or name in CALLS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            if called in BUILTINS:
                yield node.lineno, called
            auto = called.split(".")[-2:]
            if len(auto) == 2 and auto[0].startswith("Auto") and auto[1] == "from_pretrained":
                trusts = given.get("trust_remote_code")
                if not (isinstance(trusts, ast.Constant) and trusts.value is False):
                    yield node.lineno, f"{called} without trust_remote_code=False"
                if auto[0].startswith("AutoModel") and "use_safetensors" not in given:
                    yield node.lineno, f"{called} without use_safetensors"
            for name, value in (("trust_remote_code", False), ("allow_pickle", False), ("weights_only", True)):
                if name in given and ast.unparse(given[name]) != str(value):
                    yield node.lineno, f"{name}={ast.unparse(given[name])}"


def test_no_source_unpickles_or_evaluates() -> None:
    found = {
        (str(path.relative_to(HOME)), name): line
        for path in SOURCES
        for line, name in suspicious(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(SOURCES) > 50
    assert found.keys() == ALLOWED.keys(), found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "from torch import load",
        "from yaml import unsafe_load",
        "torch.load(file)",
        "read = torch.load",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "np.load(file)",
        "f(allow_pickle=True)",
        "f(weights_only=False)",
        "f(trust_remote_code=chosen)",
        "AutoConfig.from_pretrained(name)",
        "transformers.AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(suspicious(ast.parse(source)))


@pytest.mark.parametrize("source", ["model.eval()", "re.compile(text)", "torch.compile(model)", "json.load(file)"])
def test_the_scan_lets_pass(source: str) -> None:
    assert not list(suspicious(ast.parse(source)))


# --- what happens


def test_nothing_is_unpickled(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From data and model to a record, a checkpoint and back."""

    def no(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, no)
    settings = RunSettings(**quick(home, method="lora", output_dir=str(tmp_path / "run")))
    record = run(settings, log=lambda line: None)
    assert read_result(tmp_path / "run") == record
    sweep = {key: value for key, value in quick(home).items() if key != "output_dir"}
    (tmp_path / "grid.json").write_text(json.dumps({**sweep, "grid": [{"seed": [1, 2]}]}))
    assert len(read_sweep(tmp_path / "grid.json").runs) == 2
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    folder = unipelt.save(
        unipelt.inject(BertForSequenceClassification.from_pretrained(base), "unipelt-apl"), tmp_path / "saved"
    )
    unipelt.load(tiny_bert(), folder)
    unipelt.from_pretrained(folder)


def test_resuming_reads_pickles_of_tensors_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer, schedule and random states are Trainer's own files, which it reads with `weights_only`."""
    settings = RunSettings(**quick(home, method="lora", output_dir=str(tmp_path)))
    with monkeypatch.context() as patch:
        step, steps = Trainer.training_step, []

        def killed(*args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            if len(steps) == 6:  # of 8, with a checkpoint after 4
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings, log=lambda line: None)

    load, read = torch.load, {}

    def recorded(file: Any, *args: Any, **kwargs: Any) -> Any:
        read[Path(file).name] = kwargs.get("weights_only")
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    lines: list[str] = []
    run(settings, log=lines.append)
    assert any(line.startswith("going on from") for line in lines)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= read.keys()
    assert set(read.values()) == {True}, read


def planted(folder: Path, mark: Path, **changes: Any) -> Path:
    """A model with Python code that leaves a mark if it is run."""
    save_model(folder)
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertConfig, BertForSequenceClassification\n"
    classes = "class OwnConfig(BertConfig):\n    pass\nclass OwnModel(BertForSequenceClassification):\n    pass\n"
    (folder / "planted.py").write_text(code + classes)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "planted.OwnConfig", "AutoModelForSequenceClassification": "planted.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own, **changes}))
    return folder


@pytest.mark.parametrize("kind", ["bert", "own"])
def test_code_that_comes_with_a_model_is_never_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whether Transformers has a class of that type or not; nobody is asked either, whatever is typed."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = planted(tmp_path / "model", tmp_path / "mark", model_type=kind)
    with pytest.raises(RunError, match="comes with Python code of its own"):
        prepare(RunSettings(**quick(home, model=str(model), output_dir=str(tmp_path / "run"))))
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "run").exists()


def test_code_that_comes_with_a_tokenizer_is_never_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = save_model(tmp_path / "model")
    (model / "planted.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\nclass Own:\n    pass\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["planted.Own", "planted.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(RunError):  # or Transformers' own class for this type of model
        prepare(RunSettings(**quick(home, model=str(model), output_dir=str(tmp_path / "run"))))
    assert not (tmp_path / "mark").exists()


def test_a_model_of_pickled_weights_alone_is_refused(home: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "mark",)

    model = save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code()}))
    with pytest.raises(RunError, match=r"cannot load the model .* no file named model.safetensors"):
        prepare(RunSettings(**quick(home, model=str(model), output_dir=str(tmp_path / "run"))))
    assert not (tmp_path / "mark").exists()


def test_a_checkpoints_base_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back-end of attention may be a kernel on the hub, which Transformers would fetch and run."""
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    folder = unipelt.save(unipelt.inject(BertForSequenceClassification.from_pretrained(base), "lora"), tmp_path / "a")
    manifest = json.loads((folder / MANIFEST).read_text())
    named = {"attn_implementation": "somebody/kernel", "_experts_implementation": "somebody/kernel"}
    manifest["base"]["config"] |= {**named, "within": [{"deep": named}]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    given: list[Any] = []
    from_dict = BertConfig.from_dict

    def recorded(values: Any) -> Any:
        given.append(values)
        return from_dict(values)

    monkeypatch.setattr(BertConfig, "from_dict", recorded)
    assert unipelt.from_pretrained(folder).config._attn_implementation == "sdpa"
    assert "kernel" not in json.dumps(given[0])


# --- the fuzzer


def test_the_fuzzer_starts(tmp_path: Path) -> None:
    script = TESTS / "scripts" / "fuzz.py"
    command = [sys.executable, str(script), "--runs", "300", "--seconds", "60", "--out", str(tmp_path / "finds")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    if find_spec("atheris") is None:
        assert done.returncode == 2
        assert done.stdout.startswith("this needs atheris, which is not installed: pip install atheris")
    else:
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        assert "300 executions" in done.stdout
