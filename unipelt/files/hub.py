"""Files on a hub of models: bring a few of a repository's by name, and put a folder there in one commit.

Only this module talks to the hub, by `huggingface_hub`, whose settings (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT`) hold. It knows nothing of models; what is in the files is checked by whoever reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unipelt.files.messages import shorten, show

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_BASE = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_LOG_IN = "log in (hf auth login), set HF_TOKEN, or pass token"


class HubError(OSError):
    """The hub cannot be reached, does not have what was asked for, or does not let us; the message says which."""


def is_repository(name: str) -> bool:
    """Whether this is how a repository of somebody's is called, `user/name`."""
    return _may_be(_NAME, name)


def may_be_base(name: str) -> bool:
    """Whether this may be how a model on the hub is called: `user/name`, or a plain name as `bert-base-uncased`."""
    return _may_be(_BASE, name)


def _may_be(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name) is not None and ".." not in name and "--" not in name


def download(
    name: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Bring those of these files that a repository has, all of one commit, into the hub's cache.

    Args:
        name: `user/name`.
        files: their paths in the repository; none other is read.
        revision: a branch, a tag or a commit; by default `main`.
        token: of the hub; by default that of the environment or of the last login, False for none.
        cache_dir: by default the hub's own.
        local_files_only: look into the cache alone.

    Returns:
        The folder that they are in; it is the cache's, and not to be written to.

    Raises:
        HubError: as its name says.
    """
    with _explained(name, revision, "reading"):
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
            library_name="unipelt",
        )
    return Path(folder)


def cached_commit(name: str) -> str | None:
    """The commit that the cache takes for a model's `main`; None if it has none of it.

    Newer versions of Transformers do not say which commit they loaded. If it was another than this, whoever loads
    what is saved finds that the weights differ.
    """
    path = try_to_load_from_cache(name, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def upload(
    folder: Path,
    name: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Put the files of a folder into a repository, in one commit; other files there are left alone.

    Args:
        folder: every file right in it is uploaded.
        name: `user/name`, made if it is not there.
        message: of the commit.
        private: whether only its owner sees a repository that is made; by default what the owner's settings say.
        revision: the branch, made from `main` if it is not there; by default `main`.
        create_pr: open a pull request instead of committing to the branch.
        token: as `download` takes it; it must allow writing.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: as its name says; no half of a commit is ever made.
    """
    api = HfApi(token=token, library_name="unipelt")
    with _explained(name, revision, "writing to"):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir()) if path.is_file()]
        # not upload_folder, which makes several commits of many files
        done = api.create_commit(name, operations=added, commit_message=message, revision=revision, create_pr=create_pr)
    return str(done.pr_url or done.commit_url)


@contextmanager
def _explained(name: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turn what `huggingface_hub` and the HTTP library below it raise into one error in our words."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, name, revision)
        if reason is None:
            raise
        raise HubError(f"{doing} {name!r} on the hub failed: {reason}") from error


def _reason(error: Exception, name: str, revision: str | None) -> str | None:
    """Why, in words; None for what the hub has no part in."""
    cause = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in; {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {show(revision)}"
    if isinstance(error, GatedRepoError):
        return f"its owner grants access one by one; ask for it at {constants.ENDPOINT}/{name}"
    if isinstance(error, RepositoryNotFoundError):
        return f"it is not there, or is not for everybody and no token that may see it was given; {_LOG_IN}"
    if isinstance(error, OfflineModeIsEnabled) or isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked, and this is not (wholly) in the cache"
    if isinstance(error, LocalEntryNotFoundError):
        if cause is None:
            return "it is not (wholly) in the cache, and only that was looked into"
        return f"the hub was not reached ({shorten(cause)}), and it is not (wholly) in the cache"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the hub does not allow it ({status}); {_LOG_IN}, with a token that may do so"
        return shorten(error)
    # httpx or its successor, as the version of huggingface_hub has it; its uploads of large files raise Python's own
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0].startswith("httpx"):
        return f"the hub was not reached ({type(error).__name__}: {shorten(error)})"
    return None
