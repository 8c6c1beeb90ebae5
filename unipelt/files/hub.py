"""Files on a model hub: download named files of a repository, and upload a folder in one commit.

Only this module accesses the hub. It uses `huggingface_hub` with its settings (`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT`). This module does not check the content of files; the code that reads a file checks its content.
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
    """The hub cannot be reached, lacks the repository or revision, or denies access. The message gives the reason."""


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a user's repository, `user/name`."""
    return _may_be(_NAME, name)


def may_be_base(name: str) -> bool:
    """Return whether a name has the form of a model on the hub: `user/name`, or only `name` (`bert-base-uncased`)."""
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
    """Download files of a repository, all from one commit, into the hub's cache. Missing files are skipped.

    Args:
        name: the repository, `user/name`.
        files: paths of the files in the repository. No other file is downloaded.
        revision: a branch, a tag or a commit; by default `main`.
        token: the hub's token; by default the token of the environment or of the last login; False for no token.
        cache_dir: the folder of the cache; by default the hub's cache.
        local_files_only: whether to use only the cache.

    Returns:
        The folder with the files. The folder belongs to the cache and must not be changed.

    Raises:
        HubError: the download failed.
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
    """Return the commit of a model's `main` in the cache, or None if the cache does not have the model.

    Newer versions of Transformers do not tell which commit they loaded. If they loaded another commit, the check of the
    base model's weights finds the difference when the saved submodules are loaded.
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
    """Upload the files of a folder to a repository, in one commit. Other files of the repository do not change.

    Args:
        folder: the folder. Its files are uploaded, but not the files of its subfolders.
        name: the repository, `user/name`. A missing repository is created.
        message: the commit's message.
        private: whether a created repository is private; by default as in the owner's settings.
        revision: the branch; by default `main`. A missing branch is created from `main`.
        create_pr: whether to open a pull request instead of a commit to the branch.
        token: the hub's token, as in `download`. The token must allow writing.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        HubError: the upload failed. The repository never gets a part of a commit.
    """
    api = HfApi(token=token, library_name="unipelt")
    with _explained(name, revision, "writing to"):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir()) if path.is_file()]
        # upload_folder would make several commits of many files
        done = api.create_commit(name, operations=added, commit_message=message, revision=revision, create_pr=create_pr)
    return str(done.pr_url or done.commit_url)


@contextmanager
def _explained(name: str, revision: str | None, doing: str) -> Iterator[None]:
    """Replace errors of `huggingface_hub` and of its HTTP library by a `HubError` with a plain message."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, name, revision)
        if reason is None:
            raise
        raise HubError(f"{doing} {name!r} on the hub failed: {reason}") from error


def _reason(error: Exception, name: str, revision: str | None) -> str | None:
    """Return the reason of an error in words, or None for an error that does not come from the hub."""
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
    # the HTTP library is httpx or its successor; uploads of large files raise Python's own ConnectionError
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0].startswith("httpx"):
        return f"the hub was not reached ({type(error).__name__}: {shorten(error)})"
    return None
