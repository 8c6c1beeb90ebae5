"""Readers of data files. Each returns named columns, and the line or row number of each row in the file."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from unipelt.files.messages import shorten, show, show_path


class DataError(ValueError):
    """Error of data that cannot be read. The message gives the place, the value that was seen and the remedy."""


@dataclass(frozen=True)
class Table:
    """Columns of one file, with the place of each row in the file."""

    path: Path
    names: tuple[str, ...]  # every column of the file, read or not
    columns: dict[str, list[Any]]
    places: Sequence[int]  # line number, or row number, of each row
    unit: str = "line"
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # classes of a column, if the file has them

    def place(self, row: int) -> str:
        """Return the file and the line (or row) of a row, for messages."""
        return f"{self.path}, {self.unit} {self.places[row]}"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, counted from 1, and the text of each line of a file.

    Lines end only at line feeds. Other line breaks are a part of the text.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: byte 0x{error.object[error.start]:02x} at position "
                        f"{error.start + 1} is not UTF-8; save the file as UTF-8"
                    ) from error
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the name, or add the file") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check that it is a file and that you may read it"
        ) from error


def read_tsv(
    path: Path, choose: Callable[[Sequence[str]], Mapping[str, int]] | None = None, bare: tuple[str, ...] = ()
) -> Table:
    """Read tab-separated text without quoting.

    Args:
        path: The file.
        choose: Function that takes the header, and returns the index of each column to keep by the new name of the
            column. None keeps all columns.
        bare: The column names of a file that may have no header. A first line without the last of these names is data.

    Raises:
        DataError: The file cannot be read, is empty, or has a row with more or fewer fields than the header.
    """
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} is empty; get the file again")
    header = tuple(first[1].split("\t"))
    if bare and bare[-1] not in header:
        header, start, lines = bare, 1, itertools.chain([first], lines)
    else:
        start = 2
    indices = choose(header) if choose else _index_columns(path, header)
    columns: dict[str, list[Any]] = {name: [] for name in indices}
    kept = [(columns[name].append, index) for name, index in indices.items()]
    rows = 0
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {number}: saw {len(fields)} tab-separated fields, expected {len(header)} "
                f"({shorten(', '.join(header))}); correct or delete the line{separator_hint(header)}"
            )
        for append, index in kept:
            append(fields[index])
        rows += 1
    if not rows:
        raise DataError(f"{path} has a header but no rows; get the file again")
    return Table(path, header, columns, range(start, start + rows))


def _read_csv(path: Path) -> Table:
    """Read comma-separated text. A quoted field may hold commas and line breaks."""
    reader = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    rows: list[list[str]] = []
    places: list[int] = []
    try:
        header = tuple(next(reader, ()))
        if not header:
            raise DataError(f"{path} is empty; get the file again")
        indices = _index_columns(path, header)
        line = reader.line_num + 1
        for row in reader:
            if row:  # in CSV, an empty line is not a row
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {line}: saw {len(row)} comma-separated fields, expected {len(header)} "
                        f"({shorten(', '.join(header))}); correct the line, and quote fields that hold commas"
                        f"{separator_hint(header)}"
                    )
                rows.append(row)
                places.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}); correct the quoting") from error
    if not rows:
        raise DataError(f"{path} has a header but no rows; get the file again")
    columns: dict[str, list[Any]] = {name: [row[index] for row in rows] for name, index in indices.items()}
    return Table(path, header, columns, places)


def _read_json(path: Path) -> Table:
    """Read a list of JSON objects, or one JSON object on each line."""
    lines = list(read_lines(path))
    text = "\n".join(line for _, line in lines)
    if not text.strip():
        raise DataError(f"{path} is empty; get the file again")
    places: Sequence[int]
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct it") from error
        except (ValueError, RecursionError) as error:  # a number with too many digits, or too many nested brackets
            raise DataError(f"{path}: not valid JSON ({shorten(error)}); correct it") from error
        places, unit = range(1, len(rows) + 1), "row"
    else:
        rows, places, unit = [], [number for number, line in lines if line.strip()], "line"
        for number, line in lines:
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}, line {number}: not valid JSON ({shorten(getattr(error, 'msg', error))}); "
                        "give a list of objects, or one whole object a line"
                    ) from error
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, {unit} {place}: saw {show(row):.60}, expected an object such as {{"text": "..."}}'
            )
    if not rows:
        raise DataError(f"{path} holds no rows; get the file again")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table(path, names, {name: [row.get(name) for row in rows] for name in names}, places, unit)


def _read_parquet(path: Path) -> Table:
    """Read a parquet file. Class ids become class names if `datasets` stored the names in the file."""
    try:
        # read_table would add columns that it guesses from folder names such as `x=1`.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the name, or add the file") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet ({shorten(error)}); get the file again") from error
    names = tuple(table.column_names)
    _index_columns(path, names)
    if not table.num_rows:
        raise DataError(f"{path} holds no rows; get the file again")
    try:
        columns = {name: table.column(name).to_pylist() for name in names}
    except (ValueError, OverflowError, pa.ArrowException) as error:  # a text that is not UTF-8, or a year above 9999
        raise DataError(f"{path} holds what is no value of Python ({shorten(error)}); get the file again") from error
    try:
        features = Features.from_arrow_schema(table.schema)
    except Exception as error:  # `datasets` raises many kinds of errors for foreign metadata
        kind = type(error).__name__
        raise DataError(
            f"{path}: what its metadata say of its columns cannot be read ({kind}: {shorten(error)}); write it without "
            "the metadata 'huggingface', or get the file again"
        ) from error
    class_names = {}
    for name, feature in features.items():
        if isinstance(feature, ClassLabel) and feature.names:
            class_names[name] = tuple(feature.names)
            # The hub marks a row without a label with -1.
            try:
                columns[name] = [None if value in (None, -1) else feature.int2str(value) for value in columns[name]]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}: a value of {show(name)} is none of the {len(feature.names)} classes that its metadata "
                    f"name ({shorten(error)}); correct one of them"
                ) from error
    return Table(path, names, columns, range(1, table.num_rows + 1), "row", class_names)


def separator_hint(names: Sequence[str]) -> str:
    """Return a remark if the name of the only column holds the separator of another file format, else an empty text."""
    if len(names) != 1:
        return ""
    found = [word for sign, word in _SEPARATORS.items() if sign in names[0]]
    if not found:
        return ""
    return (
        f" (its only column is {show(names[0])}, so its fields seem to be parted by {found[0]}; a .csv file has commas "
        "and a .tsv file has tabs)"
    )


def name_hint(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Return a remark if a name differs from a wanted name only in outer space or case, else an empty text."""
    known = {name.strip().casefold(): name for name in wanted}
    for name in names:
        meant = known.get(name.strip().casefold())
        if meant is not None and meant != name:
            how = "a space around it" if name.strip() == meant.strip() else "other letters in upper case"
            return f" (there is {show(name)}, which is {show(meant)} with {how}; correct the header)"
    return ""


_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
_READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": read_tsv,
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def read_file(path: Path) -> Table:
    """Read every column of a file, in the format of its suffix.

    Raises:
        DataError: The file does not exist, cannot be read, or has an unknown suffix.
    """
    if not os.path.exists(path):  # also false if the name is too long or holds a NUL
        raise DataError(f"{show_path(path)} does not exist; check the name, or add the file")
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise DataError(f"{path} is a pipe or a device, and not a file; give a file")
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path} has the suffix {show(path.suffix)}; give a file named {', '.join(_READERS)}")
    return _READERS[path.suffix.lower()](path)


def _index_columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: the column {show(twice[0])} stands twice in {shorten(', '.join(header))}; rename one")
    return {name: index for index, name in enumerate(header)}
