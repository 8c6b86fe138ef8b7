"""A Hub of one's own: enough of its HTTP interface for huggingface_hub to push and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


def digest(value: object) -> str:
    return hashlib.sha1(repr(value).encode()).hexdigest()


class LocalHub:
    """Repositories in memory, behind ``address``; ``asked`` lists every (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuse: int | None = None  # this status to whoever asks for anything
        self.commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(size)
                path = unquote(urlsplit(self.path).path)
                hub.asked.append((self.command, path))
                status, body, headers = hub.answer(self.command, path.split("/")[1:], sent)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def answer(self, method: str, path: list[str], sent: bytes):
        """(status, body, headers)."""
        if self.refuse is not None:
            return self.refuse, b"{}", {}
        match path:
            case ["api", "repos", "create"]:
                return self.create(json.loads(sent))
            case ["api", "validate-yaml"]:
                return said({"errors": [], "warnings": []})
            case ["api", "models", user, name, *rest]:
                return self.repository(f"{user}/{name}", rest, sent)
            case [user, name, "resolve", revision, *parts]:
                return self.file(f"{user}/{name}", revision, "/".join(parts))
        return missing("EntryNotFound")

    def create(self, wanted: dict):
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        made = {"url": f"{self.address}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repositories:
            return said(made, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories[repo_id] = Repository(private=bool(private))
        return said(made)

    def repository(self, repo_id: str, rest: list[str], sent: bytes):
        repository = self.repositories.get(repo_id)
        if repository is None:
            return missing("RepoNotFound")
        answer = missing("EntryNotFound")
        match rest:
            case ["branch", name]:
                answer = said({}, 409 if name in repository.branches else 200)
                repository.branches.setdefault(name, dict(repository.branches["main"]))
            case ["preupload", _]:
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                files = json.loads(sent)["files"]
                answer = said({"files": [{"path": file["path"], **kept} for file in files]})
            case ["commit", revision]:
                self.commits += 1
                for entry in map(json.loads, sent.splitlines()):
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        repository.branches[revision][entry["value"]["path"]] = content
                sha = digest(repository.branches[revision])
                url = f"{self.address}/{repo_id}/commit/{sha}"
                answer = said({"commitUrl": url, "commitOid": sha})
            case [] | ["revision", _]:
                files = self.files(repository, rest[1] if rest else "main")
                about = {"id": repo_id, "sha": digest(files), "private": repository.private}
                answer = missing("RevisionNotFound") if files is None else said(about)
            case ["tree", revision]:
                files = self.files(repository, revision)
                answer = said(
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                        for path, content in files.items()
                    ]
                )
        return answer

    def files(self, repository: Repository, revision: str) -> dict[str, bytes] | None:
        by_name = dict(repository.branches)
        by_name |= {digest(files): files for files in repository.branches.values()}
        return by_name.get(revision)

    def file(self, repo_id: str, revision: str, path: str):
        files = self.files(self.repositories[repo_id], revision)
        if path not in files:
            return missing("EntryNotFound")
        headers = {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": digest(files)}
        return 200, files[path], headers


def said(value: object, status: int = 200):
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def missing(what: str):
    return 404, b"{}", {"X-Error-Code": what, "X-Error-Message": what}
