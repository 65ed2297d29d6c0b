"""A Hub on this machine: what huggingface_hub asks for when it pushes and loads, kept in memory, in a thread.

    with LocalHub() as hub:
        subprocess.run(..., env=hub.environment(home))

Repositories are commits of whole trees; every file goes through the commit itself ("regular"). What is asked for and
not known here is answered with 501 and kept in `unknown`, so that a test can see it.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "somebody"
TOKEN = "hf_local"
_NAME = r"([^/]+/[^/]+)"


@dataclass
class Repository:
    """Commits from the oldest; a tree is {path: content}."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def add(self, files: dict[str, bytes]) -> str:
        seed = b"".join(path.encode() + content for path, content in sorted(files.items()))
        name = hashlib.sha1(str(len(self.commits)).encode() + seed).hexdigest()
        self.commits.append((name, files))
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LocalHub:
    """`repositories` by id; `requests` as "GET /path"; `unknown` those that this server does not know."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process whose Hub this is: its own empty cache, no settings of the machine's user."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **more}

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name].commits[-1][1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *parts: object) -> None:
        pass

    def answer(self, code: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def handle_request(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return answer(self, *match.groups(), body=body)
            self.hub.unknown.append(f"{self.command} {path}")
            return self.answer(501, {"error": f"not known here: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def repository(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The commit, or None after having answered that there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.missing("RepoNotFound")
        commit = repository.at(revision)
        return self.missing("RevisionNotFound") if commit is None else commit

    def who(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        self.answer(200, {"type": "user", "id": "1", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": token})

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given.get('organization') or OWNER}/{given['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.hub.repositories[name] = Repository()
        self.hub.repositories[name].add({})
        return self.answer(200, url)

    def validate(self, body: bytes) -> None:
        """As the Hub: a card without front matter has a warning, one whose front matter is no mapping an error."""
        import yaml

        content = json.loads(body)["content"]
        match = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else None
        errors = [] if match is None or isinstance(found, dict) else [{"message": "metadata is no mapping"}]
        warnings = [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self.repository(name, revision) is not None:
            files = [{"path": f["path"], "shouldIgnore": False, "uploadMode": "regular"}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        before = self.repository(name, revision)
        if before is None:
            return None
        files = dict(before[1])
        for line in filter(None, body.splitlines()):
            what, value = (given := json.loads(line))["key"], given["value"]
            if what == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif what == "deletedFile":
                files.pop(value["path"], None)
            elif what != "header":
                return self.answer(400, {"error": f"not known here: {what}"})
        new = self.hub.repositories[name].add(files)
        return self.answer(200, {"commitOid": new, "commitUrl": f"{self.hub.url}/{name}/commit/{new}"})

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        if (commit := self.repository(name, revision or "main")) is not None:
            listed = [{"rfilename": path} for path in sorted(commit[1])]
            self.answer(200, {"_id": "0" * 24, "id": name, "modelId": name, "sha": commit[0], "private": False,
                              "tags": [], "downloads": 0, "likes": 0, "siblings": listed})  # fmt: skip

    def tree(self, name: str, revision: str, body: bytes) -> None:
        if (commit := self.repository(name, revision)) is not None:
            self.answer(200, [{"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                              for path, content in sorted(commit[1].items())])  # fmt: skip

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        commit = self.repository(name, revision)
        if commit is None:
            return None
        about = {"X-Repo-Commit": commit[0]}
        if path not in commit[1]:
            return self.missing("EntryNotFound", about)
        content = commit[1][path]
        return self.answer(200, content, {**about, "ETag": f'"{_oid(content)}"'})

    def absent(self, *parts: str, body: bytes) -> None:
        self.missing("EntryNotFound")


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("GET", r"/api/agent-harnesses", _Handler.absent),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
