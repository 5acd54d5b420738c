"""A hub on loopback that speaks what the huggingface_hub client needs, logs requests and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx")


@dataclass
class Repo:
    """`commits`: hash -> name -> content; `refs`: branch or tag -> hash."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False  # the listing is public, files need the token
    private: bool = False  # nothing is to be seen without the token


def repo(files: dict[str, bytes], **switches: bool) -> Repo:
    """A repository with one commit."""
    commit = "a" * 40
    return Repo({commit: files}, {"main": commit}, **switches)


@dataclass
class FakeHub:
    """Serves `repos`. `requests`: (method, what, name) in order. `cuts`: name -> bytes after which the connection ends,
    one entry per download; after the last one, requests for the name fail with `then` if it is given.
    """

    repos: dict[str, Repo]
    token: str = "hf_right"
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    ranges: list[tuple[str, int]] = field(default_factory=list)  # (name, first byte) of each partial download
    cuts: dict[str, list[int]] = field(default_factory=dict)
    then: dict[str, int] = field(default_factory=dict)  # name -> status
    down: int | None = None  # status of every answer

    def files(self) -> list[str]:
        """Names of the files that were requested, each once."""
        return sorted({name for _, what, name in self.requests if what == "file"})

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or file
        if match is None:
            self._send(404)
            return
        name, revision = match[1], unquote(match[3 if listing else 2] or "main")
        what = (match[2] or "revision") if listing else "file"
        self.hub.requests.append((self.command, what, unquote(file[3]) if file else revision))
        if self.hub.down is not None:
            self._send(self.hub.down)
            return
        repo = self.hub.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not allowed):
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif listing:
            self._list(name, repo, commit, what)
        elif repo.gated and not allowed:
            self._send(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})
        else:
            assert file is not None
            self._file(commit, repo.commits[commit], unquote(file[3]))

    def _list(self, name: str, repo: Repo, commit: str, what: str) -> None:
        files = {path: _facts(path, content) for path, content in repo.commits[commit].items()}
        if what == "tree":
            answer: object = [{"type": "file", "path": path, **facts} for path, facts in files.items()]
        else:
            siblings = [{"rfilename": path, "size": facts["size"]} for path, facts in files.items()]
            answer = {
                **{"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings},
                **{"gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0},
            }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _file(self, commit: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(name, content)}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._send(200, headers, content)
            return
        if name in self.hub.then and not self.hub.cuts.get(name):
            self._send(self.hub.then[name])
            return
        begin, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and int(asked[1]):
            begin, status = int(asked[1]), 206
            self.hub.ranges.append((name, begin))
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cuts = self.hub.cuts.get(name)
        self._send(status, headers, content[begin:], cut=cuts.pop(0) if cuts else None)

    def _send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        if cut is not None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])


def _etag(name: str, content: bytes) -> str:
    """git's hash of a small file, sha256 of a large one."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _facts(name: str, content: bytes) -> dict[str, object]:
    facts: dict[str, object] = {"size": len(content), "oid": _etag(name, content)[:40]}
    if name.endswith(LFS_SUFFIXES):
        facts["lfs"] = {"oid": _etag(name, content), "size": len(content), "pointerSize": 130}
    return facts
