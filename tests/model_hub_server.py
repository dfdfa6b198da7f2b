"""A local server that plays the Hugging Face hub for model repositories: uploads and downloads."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from tests.data_prep.hub_uploads import LFS, UploadHandler, UploadHub, changed

TOKEN = "hf_mine"


class ModelHub(UploadHub):
    """Repositories with branches and commits.

    Attributes:
        commits: Files by (repository, commit).
        branches: Commit by (repository, branch).
        asked: Path of every GET and HEAD, in order.
        cut: Files that end half-way, although their full length was promised.
        lies: Other bytes than those promised, by file.
        status: Answer every GET and HEAD with this.
        refuse: How many commits are answered with 500.
        posts: Path of every POST.
    """

    kind = ""

    def __init__(self, breaks: int = 0) -> None:
        super().__init__(breaks)
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []
        self.cut: set[str] = set()
        self.lies: dict[str, bytes] = {}
        self.status: int | None = None
        self.refuse = 0
        self.posts: list[str] = []
        self.pulls: list[str] = []

    def head(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a branch."""
        return self.commits[repo, self.branches[repo, branch]]

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit, and the repository if need be; return its name."""
        self.repos.setdefault(repo, {"private": False})
        oid = hashlib.sha1(f"{repo} {len(self.commits)}".encode(), usedforsecurity=False)
        self.commits[repo, oid.hexdigest()] = files
        self.branches[repo, branch] = oid.hexdigest()
        return oid.hexdigest()

    def post(self, path: str, data: bytes, token: str) -> tuple[int, Any]:
        plain = urlsplit(path).path
        self.posts.append(plain)
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if plain == "/api/repos/create":
            status, body = super().post(path, data, token)
            name = body["url"].removeprefix(f"{self.url}/")
            if status == 200:
                self.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return status, body
        if "/branch/" in plain:
            repo, _, branch = plain.removeprefix("/api/models/").partition("/branch/")
            if (repo, branch) in self.branches:
                return 409, {"error": "Reference already exists"}
            self.branches[repo, branch] = self.branches[repo, "main"]
            return 200, {}
        return super().post(path, data, token)

    def commit(self, path: str, entries: list[Any]) -> tuple[int, Any]:
        if self.refuse > 0:
            self.refuse -= 1
            return 500, {"error": "out of order"}
        parts = urlsplit(path)
        repo, _, branch = parts.path.removeprefix("/api/models/").partition("/commit/")
        files = dict(self.head(repo, unquote(branch)))
        changed(files, entries, self.objects)
        answer: dict[str, Any] = {"success": True}
        if "create_pr=1" in parts.query:
            branch = f"refs/pr/{len(self.pulls) + 1}"
            self.pulls.append(branch)
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{len(self.pulls)}"
        oid = self.put(repo, files, unquote(branch))
        return 200, {**answer, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}

    def get(self, request: UploadHandler) -> None:
        path = urlsplit(request.path).path
        self.asked.append(path)
        if self.status is not None:
            request.answer(self.status, {"error": "out of order"})
        elif path.startswith("/cdn/"):
            repo, commit, file = path.removeprefix("/cdn/").split("--", 2)
            self._send(request, file, self.commits[repo, commit][file])
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.list_files(request, repo, unquote(revision) or "main")
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._resolve(request, repo, unquote(revision), unquote(file))

    def _commit_of(self, request: UploadHandler, repo: str, revision: str) -> str | None:
        """Find a commit, or answer as the hub does where there is none."""
        known = self.repos.get(repo)
        mine = request.headers.get("Authorization", "") == f"Bearer {TOKEN}"
        hidden = known is None or known.get("private") or known.get("visibility") == "private"
        if hidden and not mine:
            # strangers cannot tell what is private from what is not there
            said = "Invalid username or password."
            request.answer(401, {"error": said}, {"X-Error-Message": said})
            return None
        if known is None:
            request.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if known.get("gated") and not mine:
            request.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        commit = self.branches.get((repo, revision), revision)
        if (repo, commit) not in self.commits:
            request.answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def list_files(self, request: UploadHandler, repo: str, revision: str) -> None:
        """Answer what a commit holds."""
        commit = self._commit_of(request, repo, revision)
        if commit is None:
            return
        siblings = []
        for file, data in self.commits[repo, commit].items():
            one: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": _git(data)}
            if file.endswith(LFS):
                sha = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 130}
            siblings.append(one)
        request.answer(200, {"id": repo, "sha": commit, "private": False, "siblings": siblings})

    def _resolve(self, request: UploadHandler, repo: str, revision: str, file: str) -> None:
        commit = self._commit_of(request, repo, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit}
        data = self.commits[repo, commit].get(file)
        if data is None:
            request.answer(404, {"error": "no"}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif file.endswith(LFS):
            headers["X-Linked-Size"] = str(len(data))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            # another host name, as the hub's CDN has
            port = urlsplit(self.url).port
            headers["Location"] = f"http://localhost:{port}/cdn/{repo}--{commit}--{file}"
            request.answer(302, b"", headers)
        else:
            self._send(request, file, data, {**headers, "ETag": f'"{_git(data)}"'})

    def _send(
        self, request: UploadHandler, file: str, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        first, status, headers = 0, 200, dict(headers or {})
        wanted = request.headers.get("Range")
        if wanted:
            first, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - first)
        sent = self.lies.get(file, data)[first:]
        if request.command != "HEAD" and file in self.cut:
            sent = sent[: len(sent) // 2]
        request.answer(status, sent, headers)


def _git(data: bytes) -> str:
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let huggingface_hub of this process take an address for the hub, with a cache of its own."""
    # what the environment variables set when huggingface_hub is imported
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    # huggingface_hub waits whole seconds between its own tries
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.3) / 30))


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
