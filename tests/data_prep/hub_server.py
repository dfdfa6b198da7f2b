"""A real HTTP server that plays the Hugging Face hub for one dataset repo, and misbehaves to order.

It answers what huggingface_hub asks for a download: HEAD and GET of /datasets/REPO/resolve/REV/PATH
with X-Repo-Commit, X-Linked-Size and X-Linked-ETag, a redirect to a "CDN" under another host name
(localhost instead of 127.0.0.1), and Range requests there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

REPO = "allenai/objaverse"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Fault = Literal["", "500", "429", "reset", "truncated", "slow", "stall"]
FAULTS: tuple[Fault, ...] = ("500", "reset", "truncated", "slow")


def uid_of(number: int) -> str:
    """A uid like Sketchfab's."""
    return hashlib.md5(f"object {number}".encode(), usedforsecurity=False).hexdigest()


def path_of(number: int) -> str:
    return f"glbs/000-{number % 4:03d}/{uid_of(number)}.glb"


def small_glb(number: int) -> bytes:
    """A GLB of one triangle and some kilobytes of padding, different for each number."""
    corners = struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0.1 * number)
    blob = corners + random.Random(number).randbytes(4 * (500 + 40 * (number % 50)))
    header: dict[str, Any] = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": len(corners)}],
        "buffers": [{"byteLength": len(blob)}],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    start = struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + len(blob), len(text), 0x4E4F534A)
    return start + text + struct.pack("<II", len(blob), 0x004E4942) + blob


def _pause(seconds: float) -> None:
    # tests shorten time.sleep, and mean the client's
    threading.Event().wait(seconds)


def json_gz(value: Any) -> bytes:
    return gzip.compress(json.dumps(value).encode(), mtime=0)


def objaverse_files(count: int) -> dict[str, bytes]:
    """The files of a small Objaverse: index, LVIS categories, metadata, GLBs."""
    files = {path_of(i): small_glb(i) for i in range(count)}
    files["object-paths.json.gz"] = json_gz({uid_of(i): path_of(i) for i in range(count)})
    files["lvis-annotations.json.gz"] = json_gz(
        {"mug": [uid_of(i) for i in range(0, 6)], "teapot": [uid_of(i) for i in range(4, 9)]}
    )
    for folder in range(4):
        files[f"metadata/000-{folder:03d}.json.gz"] = json_gz(
            {
                uid_of(i): {
                    "uid": uid_of(i),
                    "name": f"object {i}",
                    "license": ("by", "by-nc")[i % 2],
                    "user": {"displayName": f"author {i}", "profileUrl": f"https://x.test/{i}"},
                    "viewerUrl": f"https://x.test/3d/{i}",
                }
                for i in range(count)
                if i % 4 == folder
            }
        )
    return files


@dataclass
class FakeHub:
    """What the server serves, how it misbehaves, and what it was asked.

    Attributes:
        files: Content by path in the repo.
        share: Share of the requests for GLBs that go wrong, by a seeded rule.
        seed: Of that rule.
        always: (fault, n): of the first n requests for a path. 429 goes wrong at HEAD, the rest
            at GET.
        lies: Other bytes than those promised, by path.
        tell_sha: Send the ETag of a file in LFS, its SHA-256.
        down: Answer everything with 503.
        pause: Seconds before each answer of the CDN for a GLB.
    """

    files: dict[str, bytes]
    share: float = 0.0
    seed: int = 0
    always: dict[str, tuple[Fault, int]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    tell_sha: bool = True
    down: bool = False
    pause: float = 0.0
    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    _asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def glb_requests(self) -> list[tuple[str, str]]:
        return [r for r in self.requests if r[1].endswith(".glb")]

    def fault(self, method: str, path: str) -> Fault:
        """Decide by (seed, method, path, how often it was asked), not by the order of threads."""
        with self._lock:
            self.requests.append((method, path))
            self._asked[method, path] += 1
            times = self._asked[method, path]
            chosen: Fault = ""
            if path in self.always:
                fault, first = self.always[path]
                of = "HEAD" if fault == "429" else "GET"
                chosen = fault if method == of and times <= first else ""
            elif path.endswith(".glb"):
                rule = random.Random(f"{self.seed} {method} {path} {times}")
                if rule.random() < self.share:
                    chosen = rule.choice(FAULTS)
            if self.down:
                chosen = "500"
            if chosen:
                self.faults[chosen] += 1
            return chosen

    @contextmanager
    def serve(self) -> Iterator[FakeHub]:
        """Answer on a free port of this machine until the block ends."""
        hub = self

        class Handler(_Handler):
            state = hub

        server = _QuietServer(("127.0.0.1", 0), Handler)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed reset their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        if self.path.startswith("/cdn/"):
            self._cdn(self.path.removeprefix("/cdn/"))
        else:
            self._resolve()

    def _resolve(self) -> None:
        start = f"/datasets/{REPO}/resolve/"
        if not self.path.startswith(start):
            self._answer(404, {"X-Error-Code": "RepoNotFound"})
            return
        revision, _, path = self.path.removeprefix(start).partition("/")
        fault = self.state.fault(self.command, path)
        if self._misbehaves(fault):
            return
        if revision not in ("main", COMMIT):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif path not in self.state.files:
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            data = self.state.files[path]
            sha = hashlib.sha256(data).hexdigest()
            etag = sha if self.state.tell_sha else sha[:40]
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{etag}"',
                "Location": f"http://localhost:{self.state.port}/cdn/{path}",
            }
            self._answer(302, headers)

    def _cdn(self, path: str) -> None:
        _pause(self.state.pause if path.endswith(".glb") else 0.0)
        fault = self.state.fault("GET", path)
        if self._misbehaves(fault):
            return
        data = self.state.lies.get(path, self.state.files[path])
        wanted, status = self.headers.get("Range"), 200
        if wanted:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            status, total, data = 206, len(data), data[first:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "slow":
            for i in range(0, len(data), 1000):
                self.wfile.write(data[i : i + 1000])
                _pause(0.05)
        else:
            self.wfile.write(data)

    def _misbehaves(self, fault: Fault) -> bool:
        if fault == "500":
            self._answer(503 if self.state.down else 500, {})
        elif fault == "429":
            self._answer(429, {"RateLimit": '"resolvers";r=0;t=1'})
        elif fault == "reset":
            # a reset instead of an orderly end: no lingering
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "stall":
            _pause(2.0)
            self.close_connection = True
        elif fault == "slow":
            _pause(0.3)
            return False
        return fault not in ("", "truncated", "slow")

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
