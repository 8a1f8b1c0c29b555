"""A hub on this machine: as much of the Hugging Face hub's interface as pushing and fetching files needs. Knows no pqkv."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE_TOKEN = "hf_writes"


@dataclass
class Repository:
    """Commits by their hash, in order; a branch ``main`` that is at the last one."""

    visibility: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.files("main") if self.commits else {}
        made = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[made] = {**before, **files}
        return made

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1] if self.commits else None
        return revision if revision in self.commits else None

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[str(self.resolve(revision))]


class FakeHub:
    """Serves repositories from memory at `url` until it is closed. Only `WRITE_TOKEN` may write, or see what is private."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._give_file()

    def do_GET(self) -> None:
        self._give_file()

    def do_PUT(self) -> None:
        self.state.large[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        self.state.requests.append(f"POST {self.path}")
        body = self._body()
        if not self._may_write():
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            return self._answer(200, {"files": [_mode(each["path"]) for each in json.loads(body)["files"]]})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._answer(200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": f"not a part of this hub: {self.path}"})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.state.url}/{name}"}
        if name in self.state.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        visibility = wanted.get("visibility") or ("private" if wanted.get("private") else "public")
        self.state.repositories[name] = Repository(visibility)
        return self._answer(200, url)

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.state.url}/large/{wanted['oid']}", "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
        made = self.state.repositories[name].commit(files)
        self._answer(200, {"success": True, "commitOid": made, "commitUrl": f"{self.state.url}/{name}/commit/{made}"})

    def _give_file(self) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.path)
        repository = self.state.repositories.get(found["name"]) if found else None
        if found is None or repository is None or (repository.visibility == "private" and not self._may_write()):
            return self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        commit = repository.resolve(found["revision"])
        if commit is None:
            return self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        data = repository.commits[commit].get(found["file"])
        if data is None:
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        head = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._answer(200, data, head)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITE_TOKEN}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, content: Any = None, head: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(head or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}
