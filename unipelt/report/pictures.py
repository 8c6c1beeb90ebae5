"""Draw the pictures of a report as SVG, one panel each: forest plots, box plots, learning curves, sizes and gates."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from unipelt.gates.plot import new_figure
from unipelt.report.cells import Cell
from unipelt.report.compare import Curve, curves
from unipelt.report.differences import Difference
from unipelt.report.forest import draw_forest, forests
from unipelt.report.numbers import k_name, percent
from unipelt.report.results import Results

# Okabe and Ito's colours, which people with any colour vision can tell apart. The marks help with more rows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


Looks = dict[str, tuple[str, str]]
"""The colour and the mark of each row."""


@dataclass(frozen=True)
class Picture:
    """A panel.

    Attributes:
        section: the group of pictures to which the picture belongs.
        name: the name of its file without suffix; unique.
        title: the title of the picture.
        alt: the numbers of the picture in words, for readers who cannot see the picture.
        svg: the content of the file, in bytes.
    """

    section: str
    name: str
    title: str
    alt: str
    svg: bytes


def check_matplotlib() -> None:
    """Raise `ImportError` with the name of the extra if matplotlib is not installed."""
    new_figure(width=1.0, height=1.0)


def draw(results: Results, differences: Sequence[Difference] = ()) -> list[Picture]:
    """Draw and return all pictures that have data. The forest plots show `differences`."""
    import matplotlib

    # text stays text, so that files are small and can be searched; a fixed salt gives the same file for the same data
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "unipelt",
        "font.size": 9,
        "axes.titlesize": 10,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(style):
        pictures = []
        taken: set[str] = set()
        for section, words, title, alt, paint, size in (*_forests(results, differences), *_panels(results)):
            name = stem = _clean("-".join((section, *words)))
            while name in taken:  # names may differ only in characters that file names cannot have
                name = f"{stem}-{len(taken)}"
            taken.add(name)
            pictures.append(Picture(section, name, title, alt, _svg(paint, title, size)))
        return pictures


Panel = tuple[str, tuple[str, ...], str, str, Callable[[Any], None], tuple[float, float]]


def _forests(results: Results, differences: Sequence[Difference]) -> Iterator[Panel]:
    for forest in forests(results, differences):
        over = f"{len(forest.tasks)} tasks" if len(forest.tasks) > 1 else forest.tasks[0]
        title = f"Against the best single method, {k_name(forest.k)}, {over}"
        words = (str(forest.k), forest.against)
        yield "forest", words, title, forest.words, partial(draw_forest, forest=forest), forest.size


def _panels(results: Results) -> Iterator[Panel]:
    rows = list(dict.fromkeys(cell.row for cell in results.cells))
    looks = {row: (_COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]) for i, row in enumerate(rows)}
    groups: dict[tuple[int | None, str], list[Cell]] = defaultdict(list)
    for cell in results.cells:
        groups[cell.k, cell.task].append(cell)

    sized: dict[tuple[str, int | None, str], list[Curve]] = defaultdict(list)
    for curve in curves(results):
        first = next(iter(curve.cells.values()))
        sized[curve.key, first.k, first.task].append(curve)
    for (key, k, task), found in sized.items():
        title = f"{task}, {k_name(k)}: {key}"
        series = (f"{c.name}: {', '.join(f'{x:g} {percent(cell.mean)}' for x, cell in c.cells.items())}" for c in found)
        alt = f"Test score by {key}, {task}, {k_name(k)}. {'; '.join(series)}."
        yield "sizes", (key, task, str(k)), title, alt, partial(_draw_sizes, found=found), (3.4, 2.8)

    for (k, task), cells in groups.items():
        words, title = (task, str(k)), f"{task}, {k_name(k)}"
        values = "; ".join(f"{cell.row} {percent(cell.mean, cell.std)}" for cell in cells)
        alt = f"Test scores of the seeds, {title}: {values}."
        size = (3.8, 0.9 + 0.3 * len(cells))
        yield "scores", words, title, alt, partial(_draw_boxes, cells=cells, looks=looks), size
    for (k, task), cells in groups.items():
        words, title = (task, str(k)), f"{task}, {k_name(k)}"
        values = "; ".join(f"{cell.row} {percent(cell.average(lambda run: run.dev))}" for cell in cells)
        alt = f"Dev score by epoch, {title}. The best: {values}."
        size = (3.8, 2.5 + 0.15 * len(cells))
        yield "learning", words, title, alt, partial(_draw_learning, cells=cells, looks=looks), size
    gated = [(cell, means) for cell in results.cells if (means := _gate_means(cell)) is not None]
    if not gated:
        return
    every = np.concatenate([means[2][np.isfinite(means[2])] for _, means in gated])
    least, most = np.percentile(every, [5, 95])  # a few almost closed gates would give all others one colour
    start = min(int(np.floor(20 * least)), 19)  # in steps of 0.05, of which the scale has at least one
    scale = (start / 20, max(int(np.ceil(20 * most)), start + 1) / 20)
    for cell, means in gated:
        title = f"{cell.task}, {k_name(cell.k)}\n{cell.row}"
        values = "; ".join(
            f"{name} {mean:.2f}" for name, mean in zip(means[0], np.nanmean(means[2], axis=0), strict=True)
        )
        alt = f"Mean gates by layer, {cell.task}, {k_name(cell.k)}, {cell.row}. Over the layers: {values}."
        size = (1.2 + 0.62 * len(means[0]), 1.3 + 0.21 * len(means[1]))
        paint = partial(_draw_gates, means=means, scale=scale)
        yield "gates", (cell.task, str(cell.k), cell.row), title, alt, paint, size


def _draw_boxes(axes: Any, cells: Sequence[Cell], looks: Looks) -> None:
    """Draw a box over seeds for each method, with the seeds as marks and the paper's mean as a diamond."""
    places = range(len(cells))
    for place, cell in zip(places, cells, strict=True):
        scores = [100 * score for score in cell.scores.values()]
        low, middle, high = np.percentile(scores, [25, 50, 75])
        colour, mark = looks[cell.row]
        axes.barh(place, high - low, left=low, height=0.6, color=colour, alpha=0.35)
        axes.plot([min(scores), max(scores)], [place, place], color=colour, linewidth=0.8)
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color="black", linewidth=1.2)
        axes.plot(scores, [place] * len(scores), mark, color=colour, markersize=3.5)
    printed = [(cell.paper.mean, place) for place, cell in zip(places, cells, strict=True) if cell.paper]
    if printed:
        axes.plot(*zip(*printed, strict=True), "D", color="none", markeredgecolor="black", markersize=5, label="paper")
        axes.legend(fontsize=7, loc="best", frameon=False)
    axes.set_yticks(list(places), [_short(cell.row) for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel(f"{cells[0].runs[0].primary.replace('_', ' ')}, test (%)")
    axes.grid(axis="x", alpha=0.3)


def _draw_learning(axes: Any, cells: Sequence[Cell], looks: Looks) -> None:
    """Draw the dev score by epoch: mean and range over the seeds, and a dotted line after the first seed has ended."""
    for cell in cells:
        series = [
            {round(item["epoch"], 3): 100 * item["metrics"][run.primary] for item in run.record["evaluations"]}
            for run in cell.runs
        ]
        epochs = sorted({epoch for item in series for epoch in item})
        values = [[item[epoch] for item in series if epoch in item] for epoch in epochs]
        means = [float(np.mean(item)) for item in values]
        whole = sum(len(item) == len(series) for item in values)
        colour, mark = looks[cell.row]
        line = {"marker": mark, "markersize": 4, "markevery": max(1, len(epochs) // 6)}
        axes.plot(epochs[:whole], means[:whole], **line, color=colour, linewidth=1.4, label=_short(cell.row))
        axes.plot(epochs[max(whole - 1, 0) :], means[max(whole - 1, 0) :], ":", color=colour, linewidth=1)
        low, high = [min(item) for item in values], [max(item) for item in values]
        axes.fill_between(epochs[:whole], low[:whole], high[:whole], color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{cells[0].runs[0].primary.replace('_', ' ')}, dev (%)")
    axes.grid(alpha=0.3)
    columns = 2 if max(len(cell.row) for cell in cells) <= 28 else 1  # two long names are wider than the picture
    axes.figure.legend(fontsize=7, loc="outside lower center", ncols=columns, frameon=False)


def _draw_sizes(axes: Any, found: Sequence[Curve]) -> None:
    """Draw the score by one number, with a bar of one standard deviation in each direction."""
    for index, curve in enumerate(found):
        sizes = list(curve.cells)
        means = [100 * cell.mean for cell in curve.cells.values()]
        stds = [100 * (cell.std or 0.0) for cell in curve.cells.values()]
        colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
        axes.errorbar(
            sizes, means, yerr=stds, marker=mark, markersize=4, capsize=3, color=colour, label=_short(curve.name)
        )
    first = next(iter(found[0].cells.values()))
    axes.set_xticks(sorted({size for curve in found for size in curve.cells}))
    axes.set_xlabel(found[0].key)
    axes.set_ylabel(f"{first.runs[0].primary.replace('_', ' ')}, test (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)


def _gate_means(cell: Cell) -> tuple[list[str], list[str], np.ndarray] | None:
    """Return names, layers, and the gates' means averaged over seeds, (layers, names), or None if no run has gates."""
    gates = [run.record["gates"] for run in cell.runs if run.record["gates"]]
    if not gates:
        return None
    names = list(gates[0]["values"])
    heights = [max(len(item["mean"]) for item in record["values"].values()) for record in gates]
    total = np.full((len(gates), max(heights), len(names)), np.nan)
    for index, record in enumerate(gates):
        for column, name in enumerate(names):
            mean = record["values"].get(name, {}).get("mean", [])
            total[index, : len(mean), column] = mean
    counts = np.isfinite(total).sum(axis=0)
    values = np.where(counts > 0, np.nansum(total, axis=0) / np.maximum(counts, 1), np.nan)
    layers = [str(layer) for layer in gates[0]["layers"]]
    return names, layers if len(layers) == len(values) else [str(row) for row in range(len(values))], values


def _draw_gates(axes: Any, means: tuple[Sequence[str], Sequence[str], np.ndarray], scale: tuple[float, float]) -> None:
    """Draw the gates, layers by submodules. All pictures of a report share the scale of colours."""
    names, layers, values = means
    image = axes.pcolormesh(values, vmin=scale[0], vmax=scale[1], cmap="cividis")
    axes.set_xticks(
        np.arange(len(names)) + 0.5, [name.replace("_", "\n").replace(".", "\n") for name in names], fontsize=7
    )
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers)
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    for row, column in np.ndindex(values.shape):
        if np.isfinite(value := values[row, column]):
            share = (value - scale[0]) / (scale[1] - scale[0])
            colour = "black" if share > 0.55 else "white"  # cividis is light above this value
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.figure.colorbar(image, ax=axes, extend="both")


def _svg(paint: Callable[[Any], None], title: str, size: tuple[float, float]) -> bytes:
    figure = new_figure(*size)
    axes = figure.subplots()
    paint(axes)
    lines = (textwrap.wrap(line, max(16, int(11 * size[0]))) for line in title.splitlines())
    axes.set_title(_plain("\n".join(itertools.chain.from_iterable(lines))))
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the SVG uses the reader's fonts, not these
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _short(row: str, most: int = 34) -> str:
    return _plain(row if len(row) <= most else f"{row[: most - 1]}…")


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as a formula, and that an SVG can hold."""
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "?", text)
    return text.replace("$", r"\$")


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name).strip("-.")[:120]
