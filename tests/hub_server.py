"""A hub in one process: those of its endpoints that `huggingface_hub` calls to read and write models, over real HTTP.

Written from what the client sends. All files go up inside the commit; the real hub takes large ones another way, which
is the client's affair.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants

WRITER = "hf_writer"
READER = "hf_reader"


@dataclass
class Repository:
    """A repository: what each commit holds, and which commit each branch is at."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str, parent: str = "") -> str:
        """Add a commit to a branch; its hash."""
        whole = {**self.commits.get(self.branches.get(parent or branch, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = whole
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch or a hash."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server's state, for tests to look at and to change.

    Attributes:
        endpoint: its address.
        repositories: by name.
        requests: what was asked for: method and path.
        fails: status of every answer, where it is not None.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: int | None = None

    def publish(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put files there, as if somebody had; the commit's hash."""
        return self.repositories.setdefault(name, Repository(private)).commit("main", files, "by hand")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.hub.fails is not None:
            return self._answer(self.hub.fails, {"error": "it is broken"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for pattern, do in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return do(self, match, query, body, token)
        return self._answer(404, {"error": f"no such endpoint: {self.command} {path}"})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may_write(self, token: str) -> bool:
        if token != WRITER:
            self._answer(401 if not token else 403, {"error": "you may not"})
        return token == WRITER

    def _find(self, name: str, token: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token not in (WRITER, READER)):
            self._answer(401 if not token else 404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def _find_commit(self, repository: Repository, revision: str) -> str | None:
        sha = repository.find(revision)
        if sha is None:
            self._answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        return sha

    def create(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        if not self._may_write(token):
            return None
        values = json.loads(body)
        name = f"{values.get('organization') or 'somebody'}/{values['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        private = values.get("visibility") == "private" or bool(values.get("private"))  # by the client's version
        self.hub.repositories[name] = repository = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._answer(200, url)

    def validate(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        content = json.loads(body)["content"]
        try:
            metadata = yaml.safe_load(content.split("---\n")[1])
            missing = [] if isinstance(metadata, dict) else [{"message": "no mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            missing = [{"message": str(error)}]
        self._answer(400 if missing else 200, {"errors": missing, "warnings": []})

    def branch(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token) if self._may_write(token) else None
        if repository is None:
            return None
        if match[2] in repository.branches:
            return self._answer(409, {"error": "it is there"})
        repository.branches[match[2]] = repository.branches["main"]
        return self._answer(200, {})

    def preupload(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token) if self._may_write(token) else None
        if repository is None or self._find_commit(repository, match[2]) is None:
            return
        given = json.loads(body)["files"]
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in given]
        self._answer(200, {"files": files})

    def commit(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token) if self._may_write(token) else None
        if repository is None or self._find_commit(repository, match[2]) is None:
            return
        files, message = {}, ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            else:
                assert item["key"] == "file"
                files[value["path"]] = base64.b64decode(value["content"])
        pull = "create_pr" in query
        branch = "refs/pr/1" if pull else match[2]
        sha = repository.commit(branch, files, message, parent=match[2])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{sha}"}
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{match[1]}/discussions/1"
        self._answer(200, answer)

    def info(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token)
        sha = repository and self._find_commit(repository, match[2] or "main")
        if not repository or not sha:
            return
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        name = match[1]
        self._answer(200, {"_id": name, "id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token)
        sha = repository and self._find_commit(repository, match[2])
        if not repository or not sha:
            return
        files = repository.commits[sha]
        self._answer(
            200,
            [{"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])} for path in files],
        )

    def resolve(self, match: re.Match[str], query: Any, body: bytes, token: str) -> None:
        repository = self._find(match[1], token)
        sha = repository and self._find_commit(repository, match[2])
        if not repository or not sha:
            return None
        content = repository.commits[sha].get(match[3])
        if content is None:
            return self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self._answer(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=sha)


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPOSITORY}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_REPOSITORY}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPOSITORY}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_REPOSITORY}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_REPOSITORY}/tree/([^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_REPOSITORY}/resolve/(.+?)/([^/]+)", _Handler.resolve),
)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave as it likes; what is wrong in a handler shows in its answer."""


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the block ends."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def only_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that the whole process talks to, as one that may write, with an empty cache in a folder."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        # newer Transformers keep one, with the address that it was made with
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # PEFT looks there itself
        huggingface_hub.utils.disable_progress_bars()
        yield hub
