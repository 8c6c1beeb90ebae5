"""The configurations that come with the package: found by name, listed, printed and copied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unipelt import packaged
from unipelt.cli import main
from unipelt.config.schema import read_mapping

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_the_names_are_those_of_the_repository() -> None:
    assert packaged.names() == NAMES
    assert packaged.folder() == CONFIGS


def test_a_wheel_s_own_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("# Mine.\n", encoding="utf-8")
    monkeypatch.setattr(packaged, "_INSTALLED", tmp_path)
    assert packaged.names() == ["mine"]
    assert packaged.find("mine") == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_every_one_begins_with_what_it_makes(name: str) -> None:
    first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{15,105}\.", first)
    values = read_mapping(CONFIGS / f"{name}.yaml")
    wanted = "sweep" if "grid" in values else "benchmark" if "methods" in values else "run"
    assert packaged.use(packaged.named(name)) == wanted


def test_the_list_has_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    purposes = dict(line.strip().split("  ", 1) for line in lines if line.startswith("  "))
    assert sorted(purposes) == NAMES
    for name, purpose in purposes.items():
        assert f"# {purpose.strip()}." == (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert [line for line in lines if not line.startswith("  ")] == [f"{use}:" for use in packaged.USES.values()]
    assert "  demo" in "\n".join(lines[: lines.index(f"{packaged.USES['sweep']}:")])


@pytest.mark.parametrize("name", ["demo", "demo.yaml"])
def test_one_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == (CONFIGS / "demo.yaml").read_text(encoding="utf-8")


def test_a_copy_brings_its_bases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    for _ in range(2):  # the second time the same files are there
        assert main(["configs", "rte-apl-minilm", "--to", str(out)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4
    assert {path.name for path in out.iterdir()} == {
        "rte-apl-minilm.yaml",
        "rte-apl.yaml",
        "glue-few-shot.yaml",
        "minilm.yaml",
    }
    for path in out.iterdir():
        assert path.read_bytes() == (CONFIGS / path.name).read_bytes()


def test_a_copy_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path / "minilm.yaml", tmp_path / "folder" / "rte-apl.yaml"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("epochs: 3\n", encoding="utf-8") if place.parent == tmp_path else place.mkdir()
        assert main(["configs", "rte-apl-minilm", "--to", str(place.parent)]) == 2
        assert f"{place.name} is there, and differs; choose another folder" in capsys.readouterr().err
        assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no configuration 'nothing' comes with the package; there are ablation-gates, "),
        (["../pyproject"], "no configuration '../pyproject' comes with the package"),
        (["--to", "x"], "--to needs the name of a configuration; `unipelt configs` lists them"),
    ],
)
def test_what_is_not_there_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    assert packaged.find("demo") == str(CONFIGS / "demo.yaml")
    (tmp_path / "table1.yaml").write_text("epochs: 1\n", encoding="utf-8")
    assert packaged.find("table1.yaml") == "table1.yaml"
    assert packaged.find("table1") == str(CONFIGS / "table1.yaml")
    (tmp_path / "no config").mkdir()
    assert packaged.find("no config") == "no config", "its reader refuses a folder"
    with pytest.raises(FileNotFoundError, match=r"no configuration file at no/such\.yaml, and none of that name"):
        packaged.find("no/such.yaml")


def test_a_sweep_takes_a_name_and_is_called_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "table3", "--out", str(tmp_path), "--dry-run"]) == 0
    assert "sweep     table3\n" in capsys.readouterr().out
