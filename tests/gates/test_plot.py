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
