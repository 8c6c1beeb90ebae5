"""The picture of the gates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from unipelt.plot import plot_gates

GATES: dict[str, Any] = {
    "prefix": torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.5, 1.0]]),
    "adapter": np.array([[0.9, 0.25, 0.3], [0.7, 0.25, 0.3]]),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_shows_mean_values_on_a_fixed_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    path = plot_gates(GATES, tmp_path / "new" / "gates.png", title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in path.parent.iterdir()] == ["gates.png"]
    axes = drawn[0].axes[0]
    (image,) = (child for child in axes.get_children() if isinstance(child, AxesImage))
    expected = np.array([[0.1, 0.8], [0.5, 0.25], [1.0, 0.3]])
    assert np.asarray(image.get_array()) == pytest.approx(expected)
    assert image.get_clim() == (0.0, 1.0)
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.80", "0.50", "0.25", "1.00", "0.30"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["prefix", "adapter"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]


def test_names_the_chosen_layers(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_gates(GATES, tmp_path / "gates.svg", layers=[2, 3, 7])
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["2", "3", "7"]
    assert "<svg" in (tmp_path / "gates.svg").read_text()


def test_leaves_matplotlib_as_it_is(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plot_gates(GATES, tmp_path / "gates.png")
    assert (dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("gates", "name", "options", "words"),
    [
        ({}, "gates.png", {}, "there are no gates to draw"),
        ({"prefix": torch.zeros(3)}, "gates.png", {}, r"'prefix' has the shape \(3,\)"),
        ({"prefix": torch.zeros(0, 3)}, "gates.png", {}, "none of them 0"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, "gates.png", {}, "differ in their numbers of layers"),
        (GATES, "gates.docx", {}, "no suffix of a picture; known are .*png"),
        (GATES, "gates.png", {"layers": [1]}, "the gates have 3 layers, and layers names 1"),
    ],
)
def test_bad_input_writes_nothing(
    tmp_path: Path, gates: dict[str, Any], name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plot_gates(gates, tmp_path / "new" / name, **options)
    assert not (tmp_path / "new").exists()


def test_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gates.png").write_text("old")

    def fail(figure: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        plot_gates(GATES, tmp_path / "gates.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("gates.png", "old")]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"install the extra 'plot' \(pip install 'unipelt\[plot\]'\)"):
        plot_gates(GATES, tmp_path / "gates.png")
