"""Data files that are none, and what the messages say of separators and names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unipelt.runs.tables import DataError, name_hint, read_file, separator_hint


def test_a_pipe_and_a_folder_are_no_files(tmp_path: Path) -> None:
    """A pipe would be waited for forever."""
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(DataError, match=r"pipe\.tsv is a pipe or a device, and not a file; give a file"):
        read_file(tmp_path / "pipe.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match=r"folder\.tsv cannot be read \(Is a directory\); check that it is a file"):
        read_file(tmp_path / "folder.tsv")


def test_a_parquet_file_with_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"text": {"_type": "NoSuchType"}}}})}
    pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: what its metadata say of its columns cannot be read \(\w+Error: "
    ):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["text"], None),
        (["text\tlabel"], "tabs"),
        (["text;label"], "semicolons"),
        (["text|label"], "bars"),
        (["text,label"], "commas"),
        (["text;label", "other"], None),
    ],
)
def test_a_column_that_holds_a_separator(names: list[str], said: str | None) -> None:
    hint = separator_hint(names)
    assert hint == "" if said is None else f"seem to be parted by {said}; a .csv file has commas" in hint


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["text", "label"], ""),
        (
            ["other", "Label "],
            "(there is 'Label ', which is 'label' with other letters in upper case; correct the header)",
        ),
        (["label "], "(there is 'label ', which is 'label' with a space around it; correct the header)"),
    ],
)
def test_a_name_that_is_almost_right(names: list[str], said: str) -> None:
    assert name_hint(names, ["text", "label"]).strip() == said
