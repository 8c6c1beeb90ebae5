"""`unipelt fold`: the model of a finished run, folded, beside what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_task import make_quick, quick, write_sentences

import unipelt
from unipelt.cli import main
from unipelt.glue import fold_run as folding
from unipelt.glue.run import run
from unipelt.glue.settings import RunSettings
from unipelt.glue.tasks import TASKS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small task and, in `out`, a finished run on it."""
    folder = make_quick(tmp_path_factory.mktemp("fold"))
    run(
        RunSettings(**quick(folder, epochs=1, method={"preset": "unipelt-apl", "prefix": {"hidden": 8}})),
        log=lambda line: None,
    )
    return folder


@pytest.fixture
def home(finished: Path) -> Iterator[Path]:
    """The same; whatever a test adds to the run's folder goes again."""
    before = set((finished / "out").iterdir())
    yield finished
    for path in set((finished / "out").iterdir()) - before:
        shutil.rmtree(path)


def fold(folder: Path, *options: str) -> int:
    return main(["fold", str(folder / "out"), "--rounds", "2", *options])


def test_a_run_is_folded_and_compared(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fold(home, "--tolerance", "0.2") == 0
    printed = capsys.readouterr().out
    result = json.loads((home / "out" / "folded" / "fold.json").read_text())
    record = json.loads((home / "out" / "result.json").read_text())
    assert result["test"]["trained"] == record["test"]["metrics"]
    assert result["changed"]["deployed"]["largest"] < 1e-5
    assert 0 < result["changed"]["folded"]["largest"] < 1
    assert result["outcomes"] == {"merged": 4, "constant": 4, "dropped": 0, "kept": 0}
    assert (result["tolerance"], result["closed"], result["examples"]) == (0.2, 0.01, 24)
    assert set(result["seconds"]) == set(result["ratios"]) == {"trained", "deployed", "folded", "base"}
    assert {len(values) for values in result["seconds"].values()} == {2}, "two rounds of one batch"
    assert result["ratios"]["trained"] == 1.0
    known = {"format", "run", "tolerance", "closed", "examples", "gates", "outcomes", "merged", "parameters", "test"}
    assert set(result) == known | {"changed", "seconds", "ratios", "hardware", "packages", "code"}
    assert result["packages"]["torch"] == torch.__version__
    assert "8 gates over 24 examples: 4 merged" in printed
    assert printed.rstrip().endswith(str(home / "out" / "folded"))
    for form in ("trained", "deployed", "folded", "base"):
        assert f"\n{form} " in printed


@pytest.mark.parametrize("labels", [[0, 1, 0], [0.5, 2.0, 1.0]])
def test_forms_are_compared_by_the_rows_of_the_test_set(labels: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: of three rows the folded form tells two otherwise, and the largest change is of the last."""
    regression = isinstance(labels[0], float)
    trained = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    folded = torch.tensor([[0.0, 1.0], [0.0, 1.5], [2.0, 4.0]])
    found = {"trained": trained, "deployed": trained + 0.25, "folded": folded, "base": trained}
    if regression:
        found = {name: values[:, :1] for name, values in found.items()}
    moments = iter(range(100))

    def clock() -> float:
        return float(next(moments))

    monkeypatch.setattr(folding, "_logits", lambda job, model, batches: found[model])
    monkeypatch.setattr(folding, "_batches", lambda job, split: [{}])
    monkeypatch.setattr(folding, "time", SimpleNamespace(perf_counter=clock))
    rows = Dataset.from_dict({"label": labels})
    job: Any = SimpleNamespace(task=TASKS["stsb" if regression else "rte"], splits={"test": rows})
    models: Any = {name: name for name in found}
    result = folding._compare(job, models, rounds=3)
    assert result["changed"] == {
        "deployed": {"largest": 0.25, "predictions": None if regression else 0},
        "folded": {"largest": 1.0 if regression else 4.0, "predictions": None if regression else 2},
    }
    assert set(result["test"]) == {"trained", "deployed", "folded"}
    if not regression:
        assert [result["test"][name]["accuracy"] for name in ("trained", "folded")] == [1.0, pytest.approx(1 / 3)]
    assert result["seconds"] == {name: [1.0] * 3 for name in found}
    assert result["ratios"] == dict.fromkeys(found, 1.0)


def test_what_is_written_is_the_folded_model(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forms: dict[str, Any] = {}
    compare = folding._compare

    def watched(job: Any, models: Any, rounds: int) -> Any:
        forms.update(models)
        return compare(job, models, rounds)

    monkeypatch.setattr(folding, "_compare", watched)
    assert fold(home, "--out", str(tmp_path / "here"), "--tolerance", "0") == 0
    model = unipelt.from_pretrained(tmp_path / "here")
    batch = {"input_ids": torch.tensor([[2, 5, 9, 3], [2, 6, 3, 0]])}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, forms["folded"](**batch).logits)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "fold.json",
        "model.safetensors",
        "unipelt.json",
        "README.md",
    }
    assert not (home / "out" / "folded").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds must be 1 or more, not 0"),
        (["--tolerance", "-1"], "tolerance must be a number, 0 or above, not -1.0"),
        (["--tolerance", "much"], "invalid float value: 'much'"),
        (["--closed", "1"], "closed must be a number, 0 or above and below 1"),
    ],
)
def test_bad_options_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert fold(home, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (home / "out" / "folded").exists()


def test_bad_folders_are_one_line(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fold", str(tmp_path)]) == 2
    assert "there is no result at" in capsys.readouterr().err
    assert fold(home, "--out", str(tmp_path)) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    old = (home / "dev.tsv").read_bytes()
    try:
        write_sentences(home / "dev.tsv", 20, seed=3)
        assert fold(home) == 2
    finally:
        (home / "dev.tsv").write_bytes(old)
    assert "the test set is not the one of the run" in capsys.readouterr().err


def test_nothing_is_left_of_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folding, "write_whole", full)
    assert fold(home, "--out", str(tmp_path / "here")) == 2
    assert not list(tmp_path.iterdir())


def test_running_again_takes_the_folded_model_along(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    (folder / "out" / "folded").mkdir()
    settings = quick(folder, epochs=1, overwrite=True, method={"preset": "unipelt-al"})
    run(RunSettings(**settings), log=lambda line: None)
    assert not (folder / "out" / "folded").exists()
