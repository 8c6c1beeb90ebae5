"""The strict reader: where a value stands that is refused, and what YAML may repeat."""

from __future__ import annotations

import re

import pytest

from unipelt.files.strict import DEEPEST, PlainError, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": {"b": [1, NaN]}}', "a.b[1] is nan, which is no finite number"),
        (b"[[2, Infinity]]", "[0][1] is inf, which is no finite number"),
        (b"NaN", "it is nan, which is no finite number"),
        (b'{"a": "x\\ud800"}', "a holds 'x\\ud800', with a character that no text has"),
        (b'{"a": "\\u0000"}', "a holds '\\x00', with a character that no text has"),
        (b'{"a": 1, "a": 2}', "'a' stands twice in one mapping; keep one of them"),
        (b'"\xff"', "byte 0xff at position 1 is not UTF-8; save it as UTF-8"),
        (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), f"it is nested more than {DEEPEST} deep"),
    ],
)
def test_a_json_text_is_refused_with_the_place(content: bytes, message: str) -> None:
    with pytest.raises(PlainError, match=f"^{re.escape(message)}$"):
        parse_json(content)


def test_texts_of_other_scripts_and_deep_lists_are_read() -> None:
    assert parse_json('{"grün": ["日本", "👩"]}'.encode()) == {"grün": ["日本", "👩"]}
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST)


def test_an_alias_repeats_a_value() -> None:
    assert parse_yaml("a: &x [1, 2.5]\nb: *x\nc: 'yes'") == {"a": [1, 2.5], "b": [1, 2.5], "c": "yes"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: !!python/name:os.system", "line 2: the tag 'tag:yaml.org,2002:python/name:os.system' is not"),
        ("a: 1\na: 2", "line 2: 'a' stands twice; keep one of them"),
        ("a: 1\n? [1]\n: 2", "line 2: a list or a mapping stands where a name should"),
        ("a: 2020-01-01", "a is a date, neither text nor number; put it in quotes if it is a text"),
        ("a:\n  1: b", "a.1: a name must be a text; put it in quotes"),
        ("&x [*x]", "line 1: 'x' stands within itself"),
    ],
)
def test_a_yaml_text_is_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(PlainError, match=f"^{re.escape(message)}"):
        parse_yaml(text)
