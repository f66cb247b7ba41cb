"""
A stand-in for the Hub's HTTP interface, for the real huggingface_hub client: repositories, commits, LFS, downloads.

It knows what pushing a folder and downloading a snapshot ask for (with Xet off), keeps everything in memory, and can be
told to fail.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
TOKENS = {"hf_writer": ("alice", "write"), "hf_reader": ("alice", "read")}


@dataclass
class Commit:
    """A state of a repository: the summary of the commit that made it, and every file."""

    oid: str
    summary: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Fault:
    """
    Answer requests whose "METHOD /path" fits a pattern with an error, from the `first` on, `times` times.

    Status 0 breaks the connection off and refuses every later one; `None` answers as ever, after `delay` seconds.
    """

    pattern: str
    status: int | None
    message: str = ""
    delay: float = 0.0
    first: int = 1
    times: int = 10**9
    seen: int = 0

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class HubStandIn:
    """
    Server on a port of this machine, in a thread of its own.

    Attributes:
        repositories (`dict[str, Repository]`):
            By name with namespace.
        faults (`list[Fault]`):
            What goes wrong.
        requests (`list[str]`):
            What was asked for, as "METHOD /path".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Refuse every connection from now on."""
        self._server.socket.close()
        self._server.shutdown()


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def stored_in_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def errors_of_card(content: str) -> list[str]:
    """What the Hub would refuse in the metadata of a model card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [str(error)]
    name = re.compile(r"([\w.-]+/)?[\w.-]+")
    errors = []
    for key in ("base_model", "datasets"):
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not name.fullmatch(value):
                errors.append(f'"{key}" must be names on the Hub, got {value!r}')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:  # one at a time: commits have an order
            self.hub.requests.append(request)
            striking = [fault for fault in self.hub.faults if fault.strikes(request)]  # each of them counts
            fault = striking[0] if striking else None
            if fault is not None and fault.status == 0:
                threading.Thread(target=self.hub.close, daemon=True).start()
                self.close_connection = True
                return
            if fault is not None:
                time.sleep(fault.delay)
            if fault is not None and fault.status is not None:
                self._error(fault.status, fault.message)
                return
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    answer(self, body, **match.groupdict())
                    return
            self._error(404, f"the stand-in does not know {request}")

    # Answers

    def _json(self, value: Any, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _bytes(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self._bytes(content, status, {**headers, "X-Error-Code": code} if code else headers)

    # Who asks, and for what

    def _user(self) -> tuple[str, str] | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository if it may be read, or written to; else the error is sent and the answer is `None`."""
        user, repository = self._user(), self.hub.repositories.get(name)
        owned = user is not None and name.startswith(f"{user[0]}/")
        if repository is None or (repository.private and not owned):
            self._error(401 if user is None else 404, "Repository not found", "RepoNotFound")
        elif write and user is None:
            self._error(401, "Invalid username or password.")
        elif write and not (owned and user is not None and user[1] == "write"):
            self._error(403, "You don't have the required permissions to perform this action")
        else:
            return repository
        return None

    # Routes

    def _create(self, body: bytes) -> None:
        wanted, user = json.loads(body), self._user()
        if user is None:
            self._error(401, "Invalid username or password.")
            return
        namespace = wanted.get("organization") or user[0]
        name = f"{namespace}/{wanted['name']}"
        if namespace != user[0] or user[1] != "write":
            self._error(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
            return
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.hub.endpoint}/{name}"}, status=409 if exists else 200)

    def _auth_check(self, body: bytes, name: str, write: str | None) -> None:
        if self._repository(name, write=bool(write)):
            self._json({})

    def _validate_yaml(self, body: bytes) -> None:
        errors = [{"message": error} for error in errors_of_card(json.loads(body)["content"])]
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        answer = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            lfs, content = stored_in_lfs(path), repository.files.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else git_blob_oid(content)
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _lfs_batch(self, body: bytes, name: str) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(body)["objects"]]
        for file in objects:
            if file["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.endpoint}/lfs/{file['oid']}"}
                file["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, "content does not match the oid")
            return
        self.hub.blobs[oid] = body
        self._json({})

    def _lfs_verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        known = len(self.hub.blobs.get(wanted["oid"], b"")) == wanted["size"]
        self._json({}, status=200 if known else 404)

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        files, summary = dict(repository.files), ""
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "header":
                summary = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._error(400, f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                self._error(400, f"the stand-in does not know {operation['key']}")
                return
        oid = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits.append(Commit(oid, summary, files))
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def _info(self, body: bytes, name: str, revision: str | None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.at(revision or "main")
        if commit is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in commit.files]
        self._json({"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        commit = repository and repository.at(revision)
        if not commit:
            return
        entries = []
        for path, content in commit.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob_oid(content)}
            if stored_in_lfs(path):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None or file not in commit.files:
            self._error(404, "Entry not found", "EntryNotFound")
            return
        content = commit.files[file]
        etag = hashlib.sha256(content).hexdigest() if stored_in_lfs(file) else git_blob_oid(content)
        self._bytes(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid})


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler._create),
    ("GET", rf"/api/models/{_NAME}/auth-check(?P<write>/write)?", _Handler._auth_check),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler._lfs_put),
    ("POST", "/lfs-verify", _Handler._lfs_verify),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler._commit),
    ("GET", rf"/api/models/{_NAME}(/revision/(?P<revision>.+))?", _Handler._info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler._tree),
    ("GET|HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler._resolve),
]
