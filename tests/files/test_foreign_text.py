"""What others wrote is printed, and put into reports and cards, without acting upon a terminal or a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from helpers import trained

import unipelt
from unipelt.checkpoint.manifest import MANIFEST
from unipelt.checkpoint.model_card import model_card
from unipelt.cli import main
from unipelt.files.atomic import write_whole
from unipelt.files.messages import complain, printable, say, shorten, show, show_path
from unipelt.files.strict import PlainError, parse_yaml, read_plain
from unipelt.injection.parameters import parameter_counts
from unipelt.report import _csv
from unipelt.report.blocks import Grid, Heading, Items, Paragraph
from unipelt.report.render import to_html, to_markdown

CLEAR = "\x1b[2J\x1b]0;mine\x07\x9b1m\rover\u202eback"
SPELT = r"\x1b[2J\x1b]0;mine\x07\x9b1m\rover\u202eback"


def controls(text: str) -> set[str]:
    return {found for found in text if not found.isprintable() and found not in "\n\t"}


@pytest.mark.parametrize("make", [printable, show_path, show])
def test_escapes_are_spelt_out(make: Any) -> None:
    assert not controls(make(CLEAR))
    assert SPELT.replace("\\", "") in make(CLEAR).replace("\\", "")


def test_a_text_without_escapes_stays() -> None:
    text = "grün, 日本, 👩\u200d🚀, a\tb\nc"
    assert printable(text) == text
    assert not controls(shorten(CLEAR))


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say(CLEAR)
    complain("unipelt", ValueError(CLEAR))
    assert main(["report", CLEAR]) == 2
    printed = capsys.readouterr()
    assert not controls(printed.out + printed.err)
    assert SPELT in printed.out


def test_reports() -> None:
    blocks: list[Any] = [
        Heading(2, CLEAR),
        Paragraph(CLEAR),
        Items((CLEAR,)),
        Grid((CLEAR,), (((((CLEAR, "")),),),)),
    ]
    for text in (to_html(blocks), to_markdown(blocks, "pictures")):
        assert not controls(text)
        assert text.count("]0;mine") >= 4


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", '=HYPERLINK("http://a")', "-", "\n=1"])
def test_a_formula_in_a_table_is_a_text(text: str) -> None:
    row = next(
        csv.DictReader(io.StringIO(_csv([{"a": text, "b": -1.5, "c": "-0.25", "d": "1e-4", "e": "plain"}]).decode()))
    )
    assert row == {"a": f"'{text}", "b": "-1.5", "c": "-0.25", "d": "1e-4", "e": "plain"}


def test_a_card(tmp_path: Path) -> None:
    model = trained("lora")
    unipelt.save(model, tmp_path)
    manifest = read_plain(tmp_path / MANIFEST)
    manifest["base"]["name_or_path"] = f"models/{CLEAR}"
    assert not controls(model_card(unipelt.resolve("lora"), parameter_counts(model), manifest))


def test_a_draft_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr("os.getpid", lambda: 1)
    (tmp_path / ".a.json.1.tmp").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a.json", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


# --- numbers in YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:10", "1:10"),
        ("-1:10:05", "-1:10:05"),
        ("1:10.5", "1:10.5"),
        ("10", 10),
        ("0", 0),
        ("007", 7),
        ("1_000", 1000),
        ("0x10", 16),
        ("-3", -3),
        ("0.5", 0.5),
        ("1.0e-4", 1e-4),
        ("'010'", "010"),
    ],
)
def test_a_number_is_what_it_looks_like(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "+010", "-0_17", "00012"])
def test_an_octal_number_is_refused(text: str) -> None:
    with pytest.raises(PlainError, match=r"line 2: .* is -?\d+ in YAML, which .* base 8; write \d+, or put it in"):
        parse_yaml(f"b: 1\na: {text}")
