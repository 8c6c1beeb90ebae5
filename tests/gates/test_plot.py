"""Pictures of gates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from unipelt.gates.plot import plot_gates

GATES: dict[str, Any] = {
    "adapter": torch.tensor([[0.1, 0.9], [0.3, 0.7]]),
    "prefix": np.array([[0.5, 0.5], [0.5, 0.7]]),
}


def test_cells_hold_the_means_on_a_fixed_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, images = [], []
    text, imshow = Axes.text, Axes.imshow

    def note_text(self: Axes, x: Any, y: Any, s: str, *args: Any, **kwargs: Any) -> Any:
        texts.append((y, x, s))
        return text(self, x, y, s, *args, **kwargs)

    def note_image(self: Axes, values: Any, **kwargs: Any) -> Any:
        images.append((np.asarray(values), kwargs["vmin"], kwargs["vmax"]))
        return imshow(self, values, **kwargs)

    monkeypatch.setattr(Axes, "text", note_text)
    monkeypatch.setattr(Axes, "imshow", note_image)
    path = plot_gates(GATES, tmp_path / "new" / "gates.png", layers=[3, 5], title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["gates.png"]
    assert sorted(texts) == [(0, 0, "0.20"), (0, 1, "0.50"), (1, 0, "0.80"), (1, 1, "0.60")]
    values, low, high = images[0]
    np.testing.assert_allclose(values, [[0.2, 0.5], [0.8, 0.6]], atol=1e-6)
    assert (low, high) == (0.0, 1.0)

    texts.clear()
    plot_gates({**GATES, "decoder.lora_query": torch.full((1, 3), 0.25)}, tmp_path / "uneven.png")
    assert (2, 2, "0.25") in sorted(texts), "a longer stack has a cell for each of its layers"
    assert len(texts) == 2 + 2 + 3, "and a shorter one has none where it has no layers"


def test_the_words_and_sizes_of_a_picture(tmp_path: Path, figures: list[Any]) -> None:
    gates = {"adapter": [[0.1, 0.6], [0.3, 0.7]], "decoder.lora_query": [[0.5, 0.9]], "lora_value": [[0.5, 0.9]]}
    plot_gates(gates, tmp_path / "gates.png", title="a run")
    (figure,) = figures
    axes, bar = figure.axes
    assert figure.get_suptitle() == "a run"
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "adapter",
        "decoder\nLoRA\nquery",
        "LoRA\nvalue",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert (axes.get_ylabel(), bar.get_ylabel()) == ("layer", "mean gate value")
    colours = {(cell.get_text(), cell.get_color()) for cell in axes.texts}
    assert colours == {("0.20", "white"), ("0.65", "black"), ("0.50", "white"), ("0.90", "black")}
    header = (tmp_path / "gates.png").read_bytes()[16:24]  # the width and the height
    inches = [int.from_bytes(part, "big") / 150 for part in (header[:4], header[4:])]
    assert inches == pytest.approx([1.6 + 3 * 1.1, 1.4 + 2 * 0.42], abs=0.01), "150 dots an inch"
    for empty in ("", None):
        plot_gates(gates, tmp_path / "gates.png", title=empty)
        assert figures[-1].get_suptitle() == ""


@pytest.mark.parametrize(
    ("gates", "name", "options", "match"),
    [
        ({}, "a.png", {}, "no gates to draw"),
        ({"adapter": torch.zeros(0, 2)}, "a.png", {}, "none of them 0"),
        ({"adapter": torch.zeros(3)}, "a.png", {}, "examples, layers"),
        (GATES, "a.xyz", {}, "no suffix of a picture"),
        (GATES, "a.png", {"layers": [1]}, "have 2 layers, and layers names 1"),
    ],
)
def test_bad_input_writes_nothing(gates: Any, name: str, options: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        plot_gates(gates, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_says_which_extra_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="install the extra 'plot'"):
        plot_gates(GATES, tmp_path / "gates.png")
