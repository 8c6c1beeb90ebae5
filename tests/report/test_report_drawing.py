"""Reports: what the pictures show. Read from matplotlib's own objects, which hold the numbers that are drawn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_records import make_record, results_of

from unipelt.gates.plot import new_figure
from unipelt.report import pictures
from unipelt.report.differences import compare_all
from unipelt.report.forest import ABOVE, BELOW, UNCLEAR
from unipelt.report.pictures import Picture
from unipelt.report.results import Results


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from results to the figures by name, and the pictures by name. No file is made of them."""
    figures: list[Any] = []

    def kept(*size: float) -> Any:
        figures.append(new_figure(*size))
        figures[-1].savefig = lambda *_, **__: None
        return figures[-1]

    def draw(results: Results) -> tuple[dict[str, Any], dict[str, Picture]]:
        figures.clear()
        found = pictures.draw(results, compare_all([results.table(k) for k in results.ks]))
        names = [picture.name for picture in found]
        return dict(zip(names, figures, strict=True)), dict(zip(names, found, strict=True))

    monkeypatch.setattr(pictures, "new_figure", kept)
    return draw


def labels_from_the_top(axes: Any) -> list[str]:
    """The names on the y axis, from the top of the picture down; all of them inside the picture."""
    bottom, top = axes.get_ylim()
    ticks = sorted(
        zip(axes.get_yticks(), axes.get_yticklabels(), strict=True),
        key=lambda tick: (tick[0] - top) * (1 if bottom > top else -1),
    )
    assert all(min(bottom, top) < place < max(bottom, top) for place, _ in ticks)
    return [label.get_text() for _, label in ticks]


def points(line: Any) -> tuple[list[float], list[float]]:
    x, y = line.get_data()
    return [round(float(value), 6) for value in x], [round(float(value), 6) for value in y]


def percent(values: Sequence[float]) -> list[float]:
    return [round(100 * value, 6) for value in values]


# The chart at the top


def forest_of(*gains: float, names: Sequence[str] = (), tasks: Sequence[str] = ("sst2", "qnli", "rte")) -> Results:
    """Combinations that gain so much over the adapter; each task and each seed adds a little of its own."""
    return results_of(
        *(make_record(task, "adapter", seed, 0.5) for task in tasks for seed in (1, 2, 3)),
        *(
            make_record(task, "unipelt-ap", seed, 0.5 + gain + 0.01 * seed + 0.02 * place, name=name)
            for gain, name in zip(gains, names or [f"unipelt-ap-{index}" for index in range(len(gains))], strict=True)
            for place, task in enumerate(tasks)
            for seed in (1, 2, 3)
        ),
    )


def test_a_row_of_the_chart_has_a_mark_a_thick_bar_over_seeds_and_a_thin_line_over_tasks(drawn: Any) -> None:
    results = forest_of(-0.03, 0.2, -0.3)
    differences = {found.row: found for found in compare_all([results.table(100)])}
    figures, found = drawn(results)
    [axes] = figures["forest-100-adapter"].axes
    rows = ["unipelt-ap-1", "unipelt-ap-0", "unipelt-ap-2"]
    assert labels_from_the_top(axes) == rows, "the largest difference is at the top"
    *lines, zero = axes.get_lines()
    assert list(zero.get_xdata()) == [0, 0]
    assert len(lines) == 3 * len(rows)
    looks = {"unipelt-ap-1": (ABOVE, ">"), "unipelt-ap-0": (UNCLEAR, "o"), "unipelt-ap-2": (BELOW, "<")}
    for place, row in enumerate(rows):
        thin, thick, mark = lines[3 * place : 3 * place + 3]
        one = differences[row]
        assert one.over_tasks is not None
        height = axes.get_yticks()[place]
        assert points(thick) == (percent([one.effect.low or 0, one.effect.high or 0]), [height, height])
        assert points(thin) == (percent([one.over_tasks.low or 0, one.over_tasks.high or 0]), [height, height])
        assert points(mark) == (percent([one.effect.mean]), [height])
        assert thick.get_linewidth() > 3 * thin.get_linewidth()
        assert mark.get_markersize() > thick.get_linewidth(), "the mark is seen on its bar"
        assert mark.get_markeredgewidth() == 0, "its tip is not blunt"
        assert thick.get_alpha() < 1, "and the line through it"
        assert {to_hex(line.get_color()) for line in (thin, thick, mark)} == {looks[row][0]}
        assert mark.get_marker() == looks[row][1]
    assert axes.get_xlabel() == "points against adapter"
    assert [side for side, spine in axes.spines.items() if spine.get_visible()] == ["bottom"]
    assert axes.get_title() == "Against the best single method, K = 100, 3 tasks"
    assert found["forest-100-adapter"].alt.startswith(
        "Mean difference to adapter, the best single method, in points, with 95 % intervals over seeds: "
        "unipelt-ap-1 +24.00 (+21.52 to +26.48), clear; unipelt-ap-0 +1.00 (−1.48 to +3.48); unipelt-ap-2"  # noqa: RUF001
    )


def test_the_chart_grows_with_its_rows_and_long_names_take_three_lines_at_most(drawn: Any) -> None:
    long_name = "unipelt-ap, " + ", ".join(f"adapter.bottleneck={size}" for size in range(100, 110))
    heights = []
    for names in (["unipelt-a"], ["unipelt-a", "unipelt-b", "unipelt-c"], ["unipelt-a", long_name]):
        figures, _ = drawn(forest_of(*[0.1] * len(names), names=names, tasks=("sst2", "qnli")))
        figure = figures["forest-100-adapter"]
        places = list(figure.axes[0].get_yticks())
        assert all(0.8 <= after - before <= 2 for before, after in itertools.pairwise(places))
        heights.append(figure.get_figheight())
        written = labels_from_the_top(figure.axes[0])
        assert max(len(label.splitlines()) for label in written) == (3 if long_name in names else 1)
        assert max(len(line) for label in written for line in label.splitlines()) <= 26
    assert 1 < heights[0] < 3
    assert heights[0] + 0.6 < heights[1] < heights[0] + 1.5
    assert heights[0] + 0.6 < heights[2] < heights[0] + 1.5, "a name of three lines has the room of two rows"


def test_rows_without_all_tasks_are_not_in_the_chart(drawn: Any) -> None:
    """Their scale is another. One chart for each K and best single method."""
    results = forest_of(0.1, 0.2)
    less = [run.record for run in results.runs if (run.method, run.task) != ("unipelt-ap-1", "rte")]
    others = [run.record for run in forest_of(0.1, tasks=("rte",)).runs]
    for record in others:
        record["settings"]["train_samples"] = 500
    figures, found = drawn(results_of(*less, *others))
    assert labels_from_the_top(figures["forest-100-adapter"].axes[0]) == ["unipelt-ap-0"]
    assert found["forest-500-adapter"].title == "Against the best single method, K = 500, rte"
    assert [name for name in figures if name.startswith("forest")] == ["forest-100-adapter", "forest-500-adapter"], (
        "the one with the most scores comes first"
    )


# Scores and learning curves


SCORES = {"adapter": (0.4, 0.5, 0.7, 0.9), "lora": (0.6, 0.62)}


def test_boxes_are_quartiles_with_the_seeds_and_the_papers_mean(drawn: Any) -> None:
    figures, found = drawn(
        results_of(
            *(make_record("cola", name, seed, score) for name in SCORES for seed, score in enumerate(SCORES[name], 1))
        )
    )
    figure = figures["scores-cola-100"]
    [axes] = figure.axes
    assert labels_from_the_top(axes) == ["adapter", "lora"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (pytest.approx(47.5), pytest.approx(27.5)),  # the quartiles of 40, 50, 70, 90 are 47.5 and 75
        (pytest.approx(60.5), pytest.approx(1.0)),
    ]
    *lines, printed = axes.get_lines()
    for place, name in enumerate(SCORES):
        whole, middle, seeds = lines[3 * place : 3 * place + 3]
        assert points(whole) == (percent([min(SCORES[name]), max(SCORES[name])]), [place, place])
        assert points(middle)[0] == percent([float(np.median(SCORES[name]))] * 2)
        bar = axes.patches[place]
        assert (bar.get_y(), bar.get_y() + bar.get_height()) == pytest.approx(points(middle)[1]), "as high as the box"
        assert points(seeds) == (percent(SCORES[name]), [place] * len(SCORES[name]))
        assert seeds.get_linestyle() == "None"
        assert len({to_hex(item) for item in (whole.get_color(), seeds.get_color(), bar.get_facecolor())}) == 1
    assert len({line.get_marker() for line in lines[2::3]}) == 2, "marks tell the rows apart too"
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 2
    assert points(printed) == ([2.02, 13.31], [0, 1])
    assert (printed.get_marker(), printed.get_label()) == ("D", "paper")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["paper"]
    assert not axes.get_legend().get_frame_on(), "a frame would hide what is behind it"
    assert axes.get_xlabel() == "matthews correlation, test (%)"
    assert 1 < figure.get_figheight() < 2.5
    assert found["scores-cola-100"].alt == (
        "Test scores of the seeds, cola, K = 100: adapter 62.50 ± 22.17; lora 61.00 ± 1.41."
    )


def test_many_methods_have_a_taller_picture_and_short_names(drawn: Any) -> None:
    long_name = "adapter, " + "x" * 60
    names = [f"method-{index:02}" for index in range(11)]
    figures, _ = drawn(
        results_of(*(make_record("rte", "adapter", name=name, score=0.5) for name in (*names, long_name)))
    )
    [axes] = figures["scores-rte-100"].axes
    written = labels_from_the_top(axes)
    assert written[0] == long_name[:33] + "…"
    assert written[1:] == names
    assert 0.25 < figures["scores-rte-100"].get_figheight() / len(written) < 0.45
    assert 3.5 < figures["learning-rte-100"].get_figheight() < 5, "six lines of names stand below the curves"
    fewer, _ = drawn(results_of(make_record("rte", "adapter")))
    assert 2 < fewer["learning-rte-100"].get_figheight() < 3
    assert all(3 < figure.get_figwidth() < 4.5 for figure in (*figures.values(), *fewer.values()))
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in axes.get_lines()[2::3]}
    assert len(looks) == 12, "no two rows look the same"


def test_a_learning_curve_is_a_mean_and_a_range_and_dotted_where_a_seed_has_ended(drawn: Any) -> None:
    records = [
        make_record("rte", "adapter", seed, 0.6, dev=dev, epochs=n) for seed, dev, n in ((1, 0.6, 3), (2, 0.8, 4))
    ]
    figures, found = drawn(results_of(*records, make_record("rte", "lora", dev=0.9, epochs=2)))
    figure = figures["learning-rte-100"]
    [axes] = figure.axes
    solid, dotted, other, _ = axes.get_lines()
    assert points(solid) == ([1, 2, 3], [20, 40, 60]), "means of 20 and 20, 40 and 40, 60 and 60"
    assert points(dotted) == ([3, 4], [60, 80])
    assert dotted.get_linestyle() == ":"
    assert points(other) == ([1, 2], [45, 90])
    assert to_hex(solid.get_color()) == to_hex(dotted.get_color()) != to_hex(other.get_color())
    assert solid.get_marker() != other.get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["adapter", "lora"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy, dev (%)")
    assert found["learning-rte-100"].alt == "Dev score by epoch, rte, K = 100. The best: adapter 70.00; lora 90.00."


def test_the_range_of_a_learning_curve_is_that_of_the_seeds(drawn: Any) -> None:
    records = [
        make_record("rte", "adapter", seed, 0.6, dev=dev, epochs=2) for seed, dev in ((1, 0.4), (2, 0.8), (3, 0.5))
    ]
    figures, _ = drawn(results_of(*records))
    [band] = figures["learning-rte-100"].axes[0].collections
    corners = {tuple(np.round(corner, 6).tolist()) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 20), (1, 40), (2, 40), (2, 80)}
    assert band.get_alpha() < 0.5, "the lines are seen through it"


@pytest.mark.parametrize(
    "names", [("unipelt-apl, lora.rank=16, x", "adapter, adapter.bottleneck"), ("x" * 40, "y" * 40)]
)
def test_the_names_below_learning_curves_are_whole(drawn: Any, names: Sequence[str]) -> None:
    """Two of 28 letters fit side by side; longer ones stand one below the other."""
    figures, _ = drawn(results_of(*(make_record("rte", "adapter", name=name) for name in names)))
    figure = figures["learning-rte-100"]
    figure.draw_without_rendering()
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 < figure.axes[0].get_window_extent().y0, "below the curves"
    tops = {round(text.get_window_extent().y0) for text in legend.get_texts()}
    assert len(tops) == (1 if max(map(len, names)) <= 28 else 2)


# Sizes and gates


def test_the_curve_of_a_size_has_the_means_and_a_deviation_each_way(drawn: Any) -> None:
    scores = {96: (0.5, 0.7), 24: (0.4, 0.4), 48: (0.45,)}
    figures, found = drawn(
        results_of(
            *(
                make_record(
                    "rte",
                    {"preset": "adapter", "adapter": {"bottleneck": size}},
                    seed,
                    score,
                    name=f"adapter, adapter.bottleneck={size}",
                )
                for size, seeds in scores.items()
                for seed, score in enumerate(seeds, 1)
            )
        )
    )
    figure = figures["sizes-adapter.bottleneck-rte-100"]
    [axes] = figure.axes
    assert 3 < figure.get_figwidth() < 4.5
    assert 2 < figure.get_figheight() < 4
    [bars] = axes.containers
    line, _, (spread,) = bars.lines
    assert points(line) == ([24, 48, 96], [40, 45, 60])
    ends = [sorted(round(float(y), 4) for _, y in segment) for segment in spread.get_segments()]
    assert ends == [[40, 40], [45, 45], [45.8579, 74.1421]], "60 less and more 14.1421"
    assert list(axes.get_xticks()) == [24, 48, 96]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("adapter.bottleneck", "accuracy, test (%)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["adapter"]
    assert not axes.get_legend().get_frame_on(), "a frame would hide what is behind it"
    assert found["sizes-adapter.bottleneck-rte-100"].title == "rte, K = 100: adapter.bottleneck"
    assert found["sizes-adapter.bottleneck-rte-100"].alt == (
        "Test score by adapter.bottleneck, rte, K = 100. adapter: 24 40.00, 48 45.00, 96 60.00."
    )


def gated(*values: dict[str, list[float]], task: str = "rte") -> list[dict[str, Any]]:
    records = [make_record(task, "unipelt-ap", seed) for seed in range(1, len(values) + 1)]
    for record, gates in zip(records, values, strict=True):
        record["gates"]["values"] = {name: {"mean": mean} for name, mean in gates.items()}
    return records


def test_gates_are_means_over_seeds_with_the_first_layer_at_the_top(drawn: Any) -> None:
    figures, found = drawn(
        results_of(
            *gated(
                {"adapter": [0.1, 0.3], "lora_query": [0.8, 1.0]},
                {"adapter": [0.3, 0.5], "lora_query": [0.6, 0.9]},
                {"adapter": [0.2, 0.4]},  # of a version that recorded fewer
            )
        )
    )
    figure = figures["gates-rte-100-unipelt-ap"]
    axes, colours = figure.axes
    [mesh] = axes.collections
    assert np.asarray(mesh.get_array()).reshape(2, 2) == pytest.approx(np.array([[0.2, 0.7], [0.4, 0.95]]))
    assert labels_from_the_top(axes) == ["4", "7"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["adapter", "lora\nquery"]
    assert list(axes.get_xticks()) == [0.5, 1.5]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0.5, 0.5): "0.20",
        (1.5, 0.5): "0.70",
        (0.5, 1.5): "0.40",
        (1.5, 1.5): "0.95",
    }
    assert axes.get_ylabel() == "layer"
    for text in axes.texts:  # the colour of a number is far from that of its cell
        back = mesh.to_rgba(float(text.get_text()))[:3]
        brightness = float(np.dot(back, (0.2126, 0.7152, 0.0722)))
        assert text.get_color() == ("black" if brightness > 0.45 else "white"), text.get_text()
    assert mesh.get_clim() == pytest.approx((0.2, 0.95)), "nine tenths of the values, in steps of 0.05"
    assert colours.get_ylim() == pytest.approx((0.2, 0.95))
    assert found["gates-rte-100-unipelt-ap"].alt == (
        "Mean gates by layer, rte, K = 100, unipelt-ap. Over the layers: adapter 0.30; lora_query 0.82."
    )
    assert axes.get_title() == "rte, K = 100\nunipelt-ap"


def test_layers_without_a_name_are_counted_and_pictures_grow_with_their_gates(drawn: Any) -> None:
    one = gated({"adapter": [0.5] * 3})
    many = gated({f"prefix.{index}": [0.5] * 12 for index in range(6)}, task="sst2")
    figures, _ = drawn(results_of(*one, *many))
    small, large = figures["gates-rte-100-unipelt-ap"], figures["gates-sst2-100-unipelt-ap"]
    assert labels_from_the_top(small.axes[0]) == ["0", "1", "2"], "the record names two layers, and there are three"
    assert 1.5 < small.get_figwidth() < 2.5
    assert 1.5 < small.get_figheight() < 2.5
    assert 0.15 < (large.get_figheight() - small.get_figheight()) / 9 < 0.4
    assert 0.4 < (large.get_figwidth() - small.get_figwidth()) / 5 < 1


@pytest.mark.parametrize(("gate", "scale"), [(1.0, (0.95, 1.0)), (0.0, (0.0, 0.05)), (0.5, (0.5, 0.55))])
def test_gates_of_one_value_are_drawn_on_a_scale_of_one_step(
    drawn: Any, gate: float, scale: tuple[float, float]
) -> None:
    """A scale of no width would be drawn as one from 0.9 to 1.1, and no gate is more than 1."""
    figures, _ = drawn(results_of(*gated({"adapter": [gate, gate]})))
    axes, colours = figures["gates-rte-100-unipelt-ap"].axes
    assert [text.get_text() for text in axes.texts] == [f"{gate:.2f}"] * 2
    assert colours.get_ylim() == axes.collections[0].get_clim() == pytest.approx(scale)


# Names and titles


def test_titles_and_names_of_files_hold_what_they_can(drawn: Any) -> None:
    name = "unipelt-ap, of $x_1$\x07 " + "/".join("abcdefghij" * 12)
    figures, found = drawn(results_of(make_record("a/b: c?", "unipelt-ap", name=name)))
    [stem] = [stem for stem in figures if stem.startswith("gates-")]
    assert len(stem) == 120
    assert all(re.fullmatch(r"[a-z0-9.=-]*[a-z0-9]", stem) for stem in figures)
    assert {stem.partition("-a-b-c-")[0] for stem in figures} == {"scores", "learning", "gates"}
    title = figures[stem].axes[0].get_title()
    assert title.startswith("a/b: c?, K = 100\n")
    assert r"\$x_1\$?" in title.replace("\n", " ")
    assert max(map(len, title.replace("\\$", "$").splitlines())) <= 11 * figures[stem].get_figwidth()
    assert found[stem].title == f"a/b: c?, K = 100\n{name}"
