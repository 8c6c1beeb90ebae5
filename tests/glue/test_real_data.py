"""GLUE's real files, where a folder with them is given."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unipelt.glue.data import fingerprint, load_task, split_note
from unipelt.glue.tasks import TASKS, Task
from unipelt.runs.sampling import few_shot


@pytest.fixture(scope="module")
def glue_dir() -> Path:
    folder = os.environ.get("UNIPELT_GLUE_DIR")
    if not folder:
        pytest.skip("set UNIPELT_GLUE_DIR to a folder with GLUE data")
    return Path(folder)


def split_file(task: Task, folder: Path, split: str) -> Path:
    return folder / task.folder / ("dev_matched.tsv" if (task.name, split) == ("mnli", "dev") else f"{split}.tsv")


def manifest_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What `manifest.json` says of each file, by the file's SHA-256; nothing where there is no manifest."""
    path = folder / "manifest.json"
    return {entry["sha256"]: entry for entry in json.loads(path.read_text()).values()} if path.exists() else {}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_rows_and_labels(glue_dir: Path, task: Task, split: str) -> None:
    rows = load_task(task, glue_dir)[split]
    content = split_file(task, glue_dir, split).read_bytes()
    lines = content.count(b"\n")
    assert len(rows) in (
        lines,
        lines - 1,
    )  # the files end in a line feed; only CoLA may come without a header
    assert rows.column_names == [*task.columns, "label"]
    assert all(isinstance(row[column], str) for row in rows.select(range(100)) for column in task.columns)
    if task.is_regression:
        assert all(0.0 <= label <= 5.0 for label in rows["label"])
    else:
        assert set(rows["label"]) == set(range(task.num_labels))
    if len(rows) == task.official_rows[split]:
        assert split_note(task, split, len(rows)) is None
    else:
        assert f"{len(rows):,} of {task.official_rows[split]:,}" in str(split_note(task, split, len(rows)))

    entry = manifest_entries(glue_dir).get(hashlib.sha256(content).hexdigest())
    if entry is not None:
        assert len(rows) == entry["rows"]
        assert task.official_rows[split] == entry["official_rows"]
        if entry["labels"]:
            assert Counter(task.file_labels[label] for label in rows["label"]) == entry["labels"]


def test_the_manifest_is_about_these_files(glue_dir: Path) -> None:
    known = manifest_entries(glue_dir)
    if not known:
        pytest.skip("the folder in UNIPELT_GLUE_DIR has no manifest.json")
    unlisted = {
        (task.name, split)
        for task in TASKS.values()
        for split in ("train", "dev")
        if hashlib.sha256(split_file(task, glue_dir, split).read_bytes()).hexdigest() not in known
    }
    assert unlisted <= {("qnli", "train"), ("qnli", "dev")}  # these two may be cut from a file that is listed


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_largest_sample_of_the_paper(glue_dir: Path, task: Task) -> None:
    train = load_task(task, glue_dir)["train"]
    shots, dev = few_shot(train, 1000, 1000, 42)
    shuffled = train.shuffle(seed=42)
    assert shots[:] == shuffled[:1000]
    assert dev[:] == shuffled[1000:2000]
    assert fingerprint(shots) == fingerprint(shuffled.select(range(1000))) != fingerprint(dev)
