"""A local server that plays the part of the hub that receives uploads (plain and LFS files)."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class UploadHub:
    """Keeps what was committed; ``breaks`` uploads are answered with 503 first.

    Attributes:
        repos: Created repositories with their settings.
        files: Committed files.
        puts: Number of LFS uploads that were accepted.
    """

    def __init__(self, breaks: int = 0) -> None:
        hub = self
        self.repos: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.puts = 0
        self.breaks = breaks
        self.tokens: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None: ...

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_PUT(self) -> None:
                data = self.body()
                if hub.breaks > 0:
                    hub.breaks -= 1
                    self.answer(403, {"error": "expired"})
                    return
                hub.objects[self.path.rsplit("/", 1)[-1]] = data
                hub.puts += 1
                self.answer(200, {})

            def do_GET(self) -> None:
                if "/revision/" in self.path or self.path.startswith("/api/datasets/"):
                    self.answer(200, {"id": "me/views", "sha": "0" * 40, "siblings": []})
                else:
                    self.answer(404, {"error": self.path})

            def do_POST(self) -> None:
                data = self.body()
                hub.tokens.add(self.headers.get("Authorization", ""))
                self.answer(*hub.post(self.path, data))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> UploadHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, data: bytes) -> tuple[int, Any]:
        """Return status and body of a POST."""
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = "me/" + asked["name"]
            if name in self.repos:
                return 409, {"url": f"{self.url}/datasets/{name}"}
            self.repos[name] = asked
            return 200, {"url": f"{self.url}/datasets/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            mode = [("lfs" if f["path"].endswith(".parquet") else "regular") for f in files]
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
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            return 200, {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{self.url}/datasets/me/views/commit/{'1' * 40}",
            }
        return 404, {"error": path}
