"""Plot the mean values of gates."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unipelt.files.atomic import write_whole

_LABELS = {"lora_query": "LoRA\nquery", "lora_value": "LoRA\nvalue"}


def plot_gates(
    gates: Mapping[str, Tensor | np.ndarray | Sequence[Sequence[float]]],
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Path:
    """Draw a heat map of mean gate values, layers by submodules, with the numbers in the cells.

    The colour scale is 0 (closed) to 1 (open) in every picture, so that pictures can be compared.

    Args:
        gates: by name, (examples, layers), as `unipelt.record_gates` records them. Where some gates have fewer layers
            than others (an encoder's and a decoder's), cells stay empty.
        path: the file; its suffix gives the format (`.png`, `.pdf`, `.svg`). A failed write leaves no partial file.
        layers: the layers' indices in the model, where only some layers carry submodules; by default 0, 1, ….
        title: a line above the picture.

    Returns:
        The path.

    Raises:
        ValueError: there are no gates or no examples, `layers` has another length than the gates, or the suffix is not
            a known format.
        ImportError: matplotlib is not installed.
    """
    means = _means(gates)
    names = list(means)
    values = np.full((max(map(len, means.values())), len(names)), np.nan)
    for column, name in enumerate(names):
        values[: len(means[name]), column] = means[name]
    rows = range(len(values)) if layers is None else layers
    if len(rows) != len(values):
        raise ValueError(f"the gates have {len(values)} layers, and layers names {len(rows)}")
    path = Path(path)
    figure = new_figure(width=1.6 + 1.1 * len(names), height=1.4 + 0.42 * len(values))
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in known:
        raise ValueError(f"{path} has no suffix of a picture; known are {', '.join(known)}")

    axes = figure.subplots()
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), [_label(name) for name in names])
    axes.set_yticks(range(len(values)), [str(row) for row in rows])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if np.isnan(value):
            continue
        colour = "black" if value > 0.6 else "white"  # viridis is light above 0.6
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, label="mean gate value")
    if title:
        figure.suptitle(title, fontsize=10)

    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    write_whole(path, content.getvalue())
    return path


def _means(gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the mean of each gate over the examples: (layers,)."""
    if not gates:
        raise ValueError("there are no gates to draw; use a gated method and record_gates")
    means = {}
    for name, values in gates.items():
        array = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                f"gate {name!r} has the shape {array.shape}; it must be (examples, layers), none of them 0"
            )
        means[name] = array.mean(axis=0)
    return means


def _label(name: str) -> str:
    stack, _, gate = name.rpartition(".")
    return f"{stack}\n{_LABELS.get(gate, gate)}".strip()


def new_figure(width: float, height: float) -> Any:
    """Return a figure without a window and without pyplot's global state; `width` and `height` are in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed; install the extra 'plot' (pip install 'unipelt[plot]')"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
