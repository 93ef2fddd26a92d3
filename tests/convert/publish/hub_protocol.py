"""The Hub's protocol, as huggingface_hub speaks it without Xet, for the server of loopback_hub.py.

Every request is numbered from 0. `hub.fault(request)` is asked for each; it answers None, or a Fault.
"""

import base64
import hashlib
import json
import re
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "tester"
LARGE = 4096
"""Files from so many bytes on, and all safetensors, are large: they go to storage."""


@dataclass(frozen=True)
class Request:
    number: int
    method: str
    path: str


@dataclass(frozen=True)
class Fault:
    """status: answer with it. `broken`: close the line `before` the request is carried out, `during` its body (half is
    read), or `after` it was carried out, without an answer. `silent`: never answer. `cut`: of an answer, send only so
    many bytes of the body."""

    status: int | None = None
    headers: dict = field(default_factory=dict)
    broken: str | None = None
    silent: bool = False
    cut: int | None = None
    body: str = "{}"


@dataclass
class Repository:
    private: bool = True
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.log.append((branch, message))
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.headers = status, {"X-Error-Message": message or f"refused with {status}"}
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    """`hub` is the LoopbackHub that answers."""

    hub = None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms an answer otherwise

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, OSError):
            self.close_connection = True

    def do_GET(self) -> None:
        hub = self.hub
        with hub.lock:
            request = Request(len(hub.requests), self.command, self.path)
            hub.requests.append(request)
            self.rule = hub.fault(request) or Fault()
        if self.rule.broken == "before":
            return self._break()
        if self.rule.silent:
            hub.closing.wait(30)
            return self._break()
        length = int(self.headers.get("Content-Length") or 0)
        if self.rule.broken == "during":
            self.rfile.read(length // 2)
            return self._break()
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if self.rule.status is not None:
            return self._answer(self.rule.status, self.rule.body, self.rule.headers)
        try:
            with hub.lock:
                status, content, headers = self._route(body)
        except Refused as refusal:
            status, content, headers = refusal.status, json.dumps({"error": "refused"}), refusal.headers
        if self.rule.broken == "after":
            return self._break()
        self._answer(status, content, headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def _break(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.shutdown(socket.SHUT_RDWR)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content, headers: dict | None = None) -> None:
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        if self.command == "PUT" and status == 200 and self.rule.cut is None:
            self.hub.acknowledged.add(self.path)  # not behind the answer, when the next push may have begun
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.rule.cut is not None:
            self.wfile.write(content[: self.rule.cut])
            self.wfile.flush()
            return self._break()
        self.wfile.write(content)

    def _route(self, body: bytes):
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        routes = (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("PUT", r"/storage/(\w+)", self._store),
            ("PUT", r"/storage/(\w+)/(\d+)", self._store_part),
            ("POST", r"/storage/(\w+)/complete", self._complete),
            ("POST", r"/storage/(\w+)/verify", self._confirm),
            ("GET", r"/storage/(\w+)", self._fetch),
            ("HEAD", r"/storage/(\w+)", self._fetch),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for method, pattern, handler in routes:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                return handler(body, query, *(unquote(g) if g else None for g in match.groups()))
        raise Refused(404, "EntryNotFound")

    def _user(self) -> str | None:
        """`writer`, `reader`, or None without a token."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = {self.hub.token: "writer", self.hub.reader: "reader", "": None}
        if given not in known:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return known[given]

    def _find(self, name: str, write: bool = False) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(name)
        if repository is None or (repository.private and user is None):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if repository.gated and user != "writer":
            raise Refused(403 if user else 401, "GatedRepo", "Access to model is restricted")
        if write and user != "writer":
            raise Refused(403, message="you need write access")
        return repository

    def _at(self, repository: Repository, revision: str) -> str:
        name = repository.branches.get(revision, revision)
        if name not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name

    def _create(self, body, query):
        data = json.loads(body)
        if self._user() != "writer":
            raise Refused(403 if self._user() else 401, message="no right to create")
        name = f"{data.get('organization') or OWNER}/{data['name']}"
        if name.split("/")[0] != OWNER:
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        private = data.get("private", data.get("visibility") == "private")
        self.hub.create(name, private=bool(private))
        return 200, {"url": f"{self.hub.url}/{name}"}, {}

    def _validate(self, body, query):
        head = json.loads(body)["content"].split("---")[1]
        try:
            sound = isinstance(yaml.safe_load(head), dict)
        except yaml.YAMLError:
            sound = False
        if not sound:
            return 400, {"errors": [{"message": "the head is not YAML"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _info(self, body, query, name, revision=None):
        repository = self._find(name)
        commit = self._at(repository, revision or "main")
        return 200, {"id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": []}, {}

    def _tree(self, body, query, name, revision):
        repository = self._find(name)
        entries = []
        for path, data in repository.files(self._at(repository, revision)).items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_digest(data)}
            if is_large(path, len(data)):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return 200, entries + self.hub.extra_tree, {}

    def _branch(self, body, query, name, branch):
        repository = self._find(name, write=True)
        if branch in repository.branches:
            raise Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return 200, {}, {}

    def _preupload(self, body, query, name, revision):
        repository = self._find(name, write=True)
        present = repository.files(self._at(repository, revision))
        answer = []
        for file in json.loads(body)["files"]:
            large = is_large(file["path"], file["size"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in present:
                data = present[file["path"]]
                entry["oid"] = sha256(data) if is_large(file["path"], len(data)) else git_digest(data)
            answer.append(entry)
        return 200, {"files": answer}, {}

    def _batch(self, body, query, name):
        self._find(name, write=True)
        answer = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            href = f"{self.hub.storage}/{item['oid']}"
            if item["oid"] not in self.hub.blobs:
                upload = {"href": href}
                if self.hub.part and item["size"] > self.hub.part:
                    count = -(-item["size"] // self.hub.part)
                    header = {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self.hub.part), **header}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            answer.append(entry)
        return 200, {"objects": answer, "transfer": "basic"}, {}

    def _note_put(self):
        self.hub.stored[self.path] += 1
        if self.path in self.hub.acknowledged:
            self.hub.sent_again.append(self.path)

    def _store(self, body, query, oid):
        if "Authorization" in self.headers:
            raise Refused(400, message="storage is signed and takes no token")
        if sha256(body) != oid:
            raise Refused(400, message="the digest is another")
        self._note_put()
        self.hub.blobs[oid] = body
        return 200, b"", {}

    def _store_part(self, body, query, oid, number):
        self._note_put()
        self.hub.blobs.setdefault(f"{oid}/parts", {})[int(number)] = body
        return 200, b"", {"ETag": f'"{git_digest(body)}"'}

    def _complete(self, body, query, oid):
        parts = self.hub.blobs[f"{oid}/parts"]
        data = b"".join(parts[part["partNumber"]] for part in json.loads(body)["parts"])
        if sha256(data) != oid:
            raise Refused(400, message="the parts are other bytes")
        self.hub.blobs[oid] = data
        return 200, {}, {}

    def _confirm(self, body, query, oid):
        if len(self.hub.blobs.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, message="not stored")
        return 200, {}, {}

    def _commit(self, body, query, name, revision):
        wants_pr = "create_pr" in query
        repository = self._find(name, write=not wants_pr)
        lines = [json.loads(line) for line in body.splitlines()]
        head = self._at(repository, revision)
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head and not wants_pr:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, message=f"storage lacks {value['path']}")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del files[value["path"]]
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        branch = f"refs/pr/{number}" if wants_pr else revision
        oid = repository.commit(branch, files, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if wants_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        return 200, answer, {}

    def _resolve(self, body, query, name, revision, path):
        repository = self._find(name)
        commit = self._at(repository, revision)
        files = repository.commits[commit]
        if path not in files:
            raise Refused(404, "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_digest(data)}"', "Accept-Ranges": "bytes"}
        if is_large(path, len(data)):
            self.hub.blobs[sha256(data)] = data
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            return 302, b"", headers | {"Location": f"{self.hub.storage}/{sha256(data)}"}
        return self._ranged(data, headers)

    def _fetch(self, body, query, oid):
        if "Authorization" in self.headers:
            raise Refused(400, message="storage is signed and takes no token")
        return self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, data: bytes, headers: dict):
        asked = self.headers.get("Range")
        if asked and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            self.hub.ranges.append(asked)
            start, stop = int(match[1]), int(match[2]) + 1 if match[2] else len(data)
            span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            return 206, data[start:stop], headers | span
        if self.command == "HEAD":
            return 200, b"", headers | {"Content-Length": str(len(data))}
        return 200, data, headers
