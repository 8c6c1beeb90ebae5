"""Messages to a user when the hub refuses, cannot be reached, or must not be asked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unipelt.files import hub
from unipelt.files.hub import HubError, download, is_repository, may_be_base

http: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
"""The HTTP library of `huggingface_hub`: httpx, or its successor httpx2."""


def answer(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "http://127.0.0.1/a/b"))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


LOG_IN = "log in (hf auth login), set HF_TOKEN, or pass token"
OFFLINE = "HF_HUB_OFFLINE is set, so the hub is not asked, and this is not (wholly) in the cache"
ABSENT = f"it is not there, or is not for everybody and no token that may see it was given; {LOG_IN}"
ASKED = f"its owner grants access one by one; ask for it at {constants.ENDPOINT}/a/b"
ERRORS: list[tuple[Exception, str]] = [
    (LocalTokenNotFoundError("x"), f"nobody is logged in; {LOG_IN}"),
    (RevisionNotFoundError("x", response=answer(404)), "it has no revision 'v2'"),
    (GatedRepoError("x", response=answer(403)), ASKED),
    (RepositoryNotFoundError("x", response=answer(404)), ABSENT),
    (OfflineModeIsEnabled("x"), OFFLINE),
    (caused(LocalEntryNotFoundError("x"), OfflineModeIsEnabled("y")), OFFLINE),
    (LocalEntryNotFoundError("x"), "it is not (wholly) in the cache, and only that was looked into"),
    (
        caused(LocalEntryNotFoundError("x"), ValueError("no\nroute")),
        "the hub was not reached (no route), and it is not (wholly) in the cache",
    ),
    *(
        (
            HfHubHTTPError("x", response=answer(status)),
            f"the hub does not allow it ({status}); {LOG_IN}, with a token that may do so",
        )
        for status in (401, 403)
    ),
    (HfHubHTTPError("the hub is\nbroken", response=answer(500)), "the hub is broken"),
    (ConnectionResetError("reset"), "the hub was not reached (ConnectionResetError: reset)"),
    (http.ReadTimeout("slow"), "the hub was not reached (ReadTimeout: slow)"),
]


@pytest.mark.parametrize(("error", "reason"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_an_error_of_the_hub_has_a_reason(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(HubError) as caught:
        download("a/b", ["x.json"], revision="v2")
    assert str(caught.value) == f"reading 'a/b' on the hub failed: {reason}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyError("a"), OSError(28, "No space left")])
def test_another_error_stays_what_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(type(error)) as caught:
        download("a/b", ["x.json"])
    assert caught.value is error


def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def note(name: str, **options: object) -> str:
        asked.update({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", note)
    options = {"revision": "v2", "token": False, "cache_dir": tmp_path, "local_files_only": True}
    assert download("a/b", ("x.json", "y"), **options) == tmp_path  # type: ignore[arg-type]
    assert asked == {"name": "a/b", **options, "allow_patterns": ["x.json", "y"], "library_name": "unipelt"}


@pytest.mark.parametrize(
    ("name", "repository", "base"),
    [
        ("user/name", True, True),
        ("name", False, True),
        ("a/b/c", False, False),
        ("us--er/name", False, False),
        ("user/na..me", False, False),
        ("../name", False, False),
        ("user/" + "x" * 96, True, True),
        ("user/" + "x" * 97, False, False),
        ("user/näme", False, False),
        ("user/name.", False, False),
    ],
)
def test_names_on_the_hub(name: str, repository: bool, base: bool) -> None:
    assert (is_repository(name), may_be_base(name)) == (repository, base)
