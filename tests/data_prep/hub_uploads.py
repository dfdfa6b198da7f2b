"""A local server that plays the part of the hub that receives uploads (plain and LFS files)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar

from typing_extensions import Self

LFS = (".parquet", ".safetensors")


class UploadHandler(BaseHTTPRequestHandler):
    """Hands requests to a hub and its answers back."""

    hub: ClassVar[Any]

    def log_message(self, *args: Any) -> None: ...

    def answer(
        self, status: int, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        data = self.body()
        if self.hub.breaks > 0:
            self.hub.breaks -= 1
            self.answer(403, {"error": "expired"})
            return
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = data
        self.hub.puts += 1
        self.answer(200, {})

    def do_GET(self) -> None:
        self.hub.get(self)

    def do_HEAD(self) -> None:
        self.hub.get(self)

    def do_POST(self) -> None:
        data, token = self.body(), self.headers.get("Authorization", "")
        self.hub.tokens.add(token)
        self.answer(*self.hub.post(self.path, data, token))


class UploadHub:
    """Keeps what was committed; ``breaks`` uploads are answered with 403 first.

    Attributes:
        repos: Created repositories with their settings.
        files: Committed files.
        objects: Uploaded LFS files by SHA-256.
        puts: Number of LFS uploads that were accepted.
        tokens: Authorization headers of all posts.
        kind: "datasets/" or, for models, nothing: what stands before a repository's name.
    """

    kind = "datasets/"

    def __init__(self, breaks: int = 0) -> None:
        self.repos: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.puts = 0
        self.breaks = breaks
        self.tokens: set[str] = set()
        handler = type("Handler", (UploadHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, request: UploadHandler) -> None:
        """Answer a GET or HEAD."""
        if "/revision/" in request.path or request.path.startswith("/api/datasets/"):
            request.answer(200, {"id": "me/views", "sha": "0" * 40, "siblings": []})
        else:
            request.answer(404, {"error": request.path})

    def post(self, path: str, data: bytes, token: str) -> tuple[int, Any]:
        """Return status and body of a POST."""
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = "me/" + asked["name"]
            if name in self.repos:
                return 409, {"url": f"{self.url}/{self.kind}{name}"}
            self.repos[name] = asked
            return 200, {"url": f"{self.url}/{self.kind}{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            mode = [("lfs" if f["path"].endswith(LFS) else "regular") for f in files]
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": m, "shouldIgnore": False, "oid": None}
                    for f, m in zip(files, mode, strict=True)
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(data)["objects"]:
                there = wanted["oid"] in self.objects
                href = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}
                objects.append(wanted if there else {**wanted, "actions": href})
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return self.commit(path, [json.loads(line) for line in data.splitlines()])
        return 404, {"error": path}

    def commit(self, path: str, entries: list[Any]) -> tuple[int, Any]:
        """Take the files of a commit; return status and body."""
        changed(self.files, entries, self.objects)
        name, oid = next(iter(self.repos)), "1" * 40
        url = f"{self.url}/{self.kind}{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url}


def changed(files: dict[str, bytes], entries: list[Any], objects: Mapping[str, bytes]) -> None:
    """Apply the entries of a commit to files."""
    for entry in entries:
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        if entry["key"] == "lfsFile":
            files[value["path"]] = objects[value["oid"]]
        if entry["key"] == "deletedFile":
            del files[value["path"]]
