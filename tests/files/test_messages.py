"""Values, paths and guesses in messages: what is cut, where, and which name is suggested."""

from __future__ import annotations

import pytest

from unipelt.files.messages import complain, shorten, show, show_path, suggest


def test_a_value_is_cut_to_about_200_characters() -> None:
    whole = [str(number) * 31 for number in range(1, 7)]  # 6 texts of 31 characters: 210 characters with quotes
    whole[-1] = whole[-1][:21]
    assert len(repr(whole)) == 200
    assert show(whole) == repr(whole)
    whole[-1] += "6"
    assert show(whole) == f"{repr(whole)[:200]}..."


def test_long_containers_lose_their_end() -> None:
    assert show(list(range(12))) == repr(list(range(12)))
    assert show(list(range(13))) == f"{repr(list(range(12)))[:-1]}, ...]"
    assert show(tuple(range(13))) == f"{repr(tuple(range(12)))[:-1]}, ...)"
    assert show(dict.fromkeys(range(13), 0)).count(":") == 12
    assert show("x" * 98) == repr("x" * 98)
    assert len(show("x" * 99)) == 100
    assert show([[[[["deep"]]]]]) == "[[[[[...]]]]]"


def test_a_message_and_a_path_keep_both_ends() -> None:
    text = f"start{'-' * 390}end!!"
    assert shorten(text) == show_path(text) == text
    assert shorten(f"{text}!") == f"{text[:300]}...{text[-89:]}!"
    assert show_path(f"{text}!") == f"{text[:150]}...{text[-149:]}!"
    assert shorten("two\n  lines\tand a tab ") == "two lines and a tab"


@pytest.mark.parametrize(
    ("name", "known", "question"),
    [
        ("lorra", ["prefix", "lora"], "did you mean 'lora'?"),
        ("--dev-size", ["--dev_size", "--seed"], "did you mean '--dev_size'?"),
        ("LORA", ["lora", "dora"], "did you mean 'lora'?"),
        ("sst2", ["sst-2", "sts2"], "did you mean 'sts2'?"),  # the same letters in another order
        ("a2", ["a1", "a3", "a4", "a5"], "nothing is near"),  # a ratio of 0.5
        ("abc2", ["abc1", "xyz", "abc3"], "did you mean 'abc1' or 'abc3'?"),
        ("abc0", ["abc1", "abc2", "abc3", "abc4"], "did you mean 'abc1', 'abc2' or 'abc3'?"),
        ("abcXX", ["abcYY"], "did you mean 'abcYY'?"),  # a ratio of 0.6 is near
        ("lora", [], "nothing is near"),
        (3, ["3"], "did you mean '3'?"),
    ],
)
def test_the_nearest_names_are_suggested(name: object, known: list[str], question: str) -> None:
    assert suggest(name, known, "nothing is near") == question


def test_only_the_start_of_a_long_name_is_compared() -> None:
    name = "abcdefghij" * 10
    assert suggest(f"{name}{'z' * 1000}", [name]) == f"did you mean {name!r}?"


def test_an_error_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    complain("unipelt", ValueError("first\n\n  second"))
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "unipelt: first second\n")
