"""A hub on 127.0.0.1 that speaks the endpoints huggingface_hub calls, counts what it serves, and can be made to fail.

    with HubServer({"org/x": folder, "org/x@v2": other}) as server:
        subprocess.run([...], env=server.environment(home))
        assert server.bytes_served < 1000

Large files are redirected to another host name (`localhost`), as the real hub redirects to a store of blobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


class HubServer:
    """Serves repositories, each a folder or a mapping of names to bytes, by name or `name@revision` (default `main`).

    `gated` repositories refuse everybody, `private` ones everybody without a token. `ranges=False` ignores Range
    headers, `fail` answers everything with that status, `cut` ends each connection after so many bytes of a large file.
    With `silent`, which a client may ask for by getting `/silence`, connections are closed without an answer.
    """

    def __init__(
        self,
        repositories: Mapping[str, pathlib.Path | Files],
        *,
        gated: frozenset[str] = frozenset(),
        private: frozenset[str] = frozenset(),
        ranges: bool = True,
    ) -> None:
        self.repositories: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Files] = {}
        self.blobs: dict[str, bytes] = {}
        self.gated, self.private, self.ranges = gated, private, ranges
        self.fail: int | None = None
        self.cut: int | None = None
        self.dead = self.silent = False
        self.requests: list[Request] = []
        self.bytes_served = 0
        self.lock = threading.Lock()
        for name, files in repositories.items():
            repository, _, branch = name.partition("@")
            self.push(repository, files, branch or "main")

    def push(self, repository: str, files: pathlib.Path | Files, branch: str = "main") -> str:
        """Make a new commit the head of a branch; the commit."""
        if isinstance(files, pathlib.Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        digest = hashlib.sha1(repr([(name, hashlib.sha1(files[name]).hexdigest()) for name in sorted(files)]).encode())
        commit = digest.hexdigest()
        self.repositories.setdefault(repository, {})[branch] = commit
        self.commits[repository, commit] = files
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return commit

    def commit(self, repository: str, revision: str = "main") -> str | None:
        """The commit that a branch, a tag or the beginning of a commit means."""
        branches = self.repositories.get(repository, {})
        if revision in branches:
            return branches[revision]
        fitting = [c for r, c in self.commits if r == repository and len(revision) >= 4 and c.startswith(revision)]
        return fitting[0] if len(fitting) == 1 else None

    def total(self, repository: str) -> int:
        """Bytes of all files at the head of `main`."""
        return sum(map(len, self.commits[repository, self.repositories[repository]["main"]].values()))

    def environment(self, home: pathlib.Path, **more: str) -> dict[str, str]:
        """The environment of a process that takes this server for the hub and keeps its cache in `home`."""
        source = str(pathlib.Path(__file__).parent.parent)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **more,
        }

    def reset(self) -> None:
        """Forget what was counted."""
        with self.lock:
            self.requests, self.bytes_served = [], 0

    def die(self) -> None:
        """Stop answering: new connections are refused, open ones closed."""
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.dead:
            self.die()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_state
        path = unquote(urlsplit(self.path).path)
        hub.silent = hub.silent or path == "/silence"
        if hub.dead or hub.silent:
            self.close_connection = True
            return
        with hub.lock:
            hub.requests.append(
                Request(
                    self.command,
                    path,
                    self.headers.get("Range"),
                    self.headers.get("Authorization"),
                    self.headers.get("Host", "").split(":")[0],
                )
            )
        if hub.fail is not None:
            return self._error(hub.fail)
        if path.startswith("/blobs/"):
            return self._send(hub.blobs[path.removeprefix("/blobs/")], {}, large=True)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            return self._error(404)
        repository, revision = found[1], (api[3] or "main") if api else found[2]
        if repository not in hub.repositories:
            return self._error(401, "RepoNotFound")
        if repository in hub.gated:
            return self._error(403, "GatedRepo")
        if repository in hub.private and not self.headers.get("Authorization"):
            return self._error(401, "RepoNotFound")
        commit = hub.commit(repository, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = hub.commits[repository, commit]
        if api:
            listing = self._tree(files) if api[2] == "tree" else self._model(repository, commit, files)
            return self._send(json.dumps(listing).encode(), {"Content-Type": "application/json"})
        if found[3] not in files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        self._file(found[3], files[found[3]], commit)

    def _model(self, repository: str, commit: str, files: Files) -> dict[str, Any]:
        siblings = []
        for name, content in files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _etag(name, content)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": repository, "modelId": repository, "sha": commit, "private": False, "siblings": siblings}

    def _tree(self, files: Files) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(name, content)}
            for name, content in files.items()
        ]

    def _file(self, name: str, content: bytes, commit: str) -> None:
        etag = _etag(name, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            return self._send(content, headers)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
        self._send(b"", {**headers, "Location": f"http://localhost:{self.server_state.port}/blobs/{etag}"}, status=302)

    def _send(self, content: bytes, headers: Mapping[str, str], *, status: int = 200, large: bool = False) -> None:
        hub, headers = self.server_state, dict(headers)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if hub.ranges else None
        if asked and status == 200:
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and hub.cut is not None and len(content) > hub.cut:
            content, self.close_connection = content[: hub.cut], True
        with hub.lock:
            hub.bytes_served += len(content)
        try:
            self.wfile.write(content)
        except ConnectionError:  # the client has read enough
            self.close_connection = True

    def _error(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        more = {**(headers or {}), **({"X-Error-Code": code, "X-Error-Message": code} if code else {})}
        self._send(b"", more, status=status)


def _etag(name: str, content: bytes) -> str:
    """The SHA-256 of a large file, the git id of a small one, as the hub has them."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
