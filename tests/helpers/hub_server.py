"""A hub on the loopback: the protocol of huggingface.co, as far as the package huggingface_hub uses it.

Large files are answered by a redirect to a second host, as the hub redirects to its storage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

_FILE = r"/[^/]+/[^/]+/resolve/[^/]+/(.+)|/storage/[^/]+/[^/]+/(.+)"


@dataclass
class Repository:
    """A model on the hub.

    Attributes:
        files: content by name.
        commit: commit of the branch `main`.
        token: token that may read it; None for everyone.
        gated: its terms were not accepted.
        open_info: a gated model is described to everyone, as on the hub.
        large: bytes from which a file lies in the storage.
    """

    files: dict[str, bytes]
    commit: str = "a" * 40
    token: str | None = None
    gated: bool = False
    open_info: bool = True
    large: int = 100_000


@dataclass(frozen=True)
class Request:
    """A request that the hub has answered."""

    method: str
    path: str
    host: str
    token: str | None
    range: str | None


@dataclass
class Hub:
    """The hub.

    Attributes:
        cut: bytes after which the next answers of the storage end, one entry each.
        stall: bytes after which the storage falls silent, until `release` is set.
    """

    port: int
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    stall: int | None = None
    release: Event = field(default_factory=Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        paths = (re.fullmatch(_FILE, r.path) for r in self.requests if r.method == "GET")
        return [path[1] or path[2] for path in paths if path]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs a hub on a free port of the loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(server.server_address[1])
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent: the hub keeps its own list."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path, authorization = unquote(urlsplit(self.path).path), self.headers.get("authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        host = self.headers.get("host", "").split(":")[0]
        hub.requests.append(Request(self.command, path, host, token, self.headers.get("range")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        stored = re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path)
        match = info or file or stored
        repository = hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self._refuse(401 if match else 404, "RepoNotFound")
        if stored:
            return self._content(repository.files[stored[2]], {}, hub)
        if repository.gated and not (info and repository.open_info):
            return self._refuse(403 if token else 401, "GatedRepo")
        if repository.token is not None and token != repository.token:
            return self._refuse(401, "RepoNotFound")
        if match[2] not in ("main", repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if info:
            siblings = [{"rfilename": n, "size": len(c)} for n, c in sorted(repository.files.items())]
            data = {"id": match[1], "modelId": match[1], "sha": repository.commit, "siblings": siblings}
            return self._content(json.dumps(data).encode(), {"Content-Type": "application/json"})
        assert file is not None
        content = repository.files.get(file[3])
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        headers = {"X-Repo-Commit": repository.commit}
        if len(content) < repository.large:
            etag = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
            return self._content(content, {**headers, "ETag": f'"{etag}"'})
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{hub.port}/storage/{file[1]}/{file[3]}",
            "Content-Length": "0",
        }
        self._head(302, headers)

    def _content(self, content: bytes, headers: dict[str, str], storage: Hub | None = None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        start = int(asked[1]) if asked else 0
        part = content[start:]
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        self._head(206 if asked else 200, {**headers, **more, "Content-Length": str(len(part))})
        if self.command == "HEAD":
            return
        if storage is None or (not storage.cut and storage.stall is None):
            self.wfile.write(part)
            return
        end = storage.cut.pop(0) if storage.cut else storage.stall
        self.wfile.write(part[:end])
        self.wfile.flush()
        self.close_connection = True
        if storage.stall is not None:
            storage.release.wait(120)
            storage.stall = None

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._head(status, {**(headers or {}), "X-Error-Code": code, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
