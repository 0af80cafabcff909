"""A small local server with the endpoints of the Hub that uploads and downloads use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors",)
REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"


class HubError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    summary: str = "initial commit"


@dataclass
class Repository:
    private: bool = False
    revisions: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("0" * 40, {".gitattributes": b""})})
    history: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit:
        known = {commit.oid: commit for commit in (*self.history, *self.revisions.values())} | self.revisions
        if revision not in known:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]


@dataclass
class Fault:
    """An error for requests whose path contains a part, so many times; without a status the connection is closed."""

    method: str
    part: str
    status: int | None = None
    times: int = 1000
    message: str = "out of order"
    code: str | None = None


@dataclass
class Hub:
    """The state of the server, which tests set and read.

    Attributes:
        url: of the server.
        users: by token; a user has a name, a role and organizations.
        requests: method, path and query of each request so far.
    """

    url: str = ""
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def add_user(self, token: str, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> None:
        self.users[token] = {"name": name, "role": role, "organizations": organizations}

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repository].at(revision).files


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self.rfile.read(length)
            if "chunked" not in self.headers.get("Transfer-Encoding", "")
            else b"".join(self._chunks())
        )
        try:
            if (fault := self._fault()) is not None:
                if fault.status is None:
                    self.close_connection = True
                    return
                raise HubError(fault.status, fault.message, fault.code)
            for method, pattern, answer in ROUTES:
                if method in (self.command, "GET" if self.command == "HEAD" else None) and (
                    found := re.fullmatch(pattern, self.route)
                ):
                    self._send(200, answer(self, **{name: unquote(value) for name, value in found.groupdict().items()}))
                    return
            raise HubError(404, f"no such page: {self.route}")
        except HubError as error:
            headers = {"X-Error-Message": error.message, "Retry-After": "0"}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, {"error": error.message, **error.more}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and fault.part in self.path:
                fault.times -= 1
                return fault
        return None

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**getattr(self, "found_headers", {}), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.found_headers: dict[str, str] = {}

    # Who asks, and for what

    def user(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def owns(self, name: str) -> bool:
        user = self.user()
        return user is not None and name.partition("/")[0] in (user["name"], *user["organizations"])

    def repository(self, name: str, *, write: bool = False) -> Repository:
        found, owns = self.hub.repositories.get(name), self.owns(name)
        if found is None or (found.private and not owns):
            raise HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        if write and not (owns and self.user()["role"] != "read"):
            raise HubError(403, "You don't have the rights to write to this repository")
        return found

    # Answers

    def whoami(self) -> dict[str, Any]:
        if (user := self.user()) is None:
            raise HubError(401, "Invalid username or password.")
        organizations = [{"name": name} for name in user["organizations"]]
        token = {"displayName": "test", "role": user["role"]}
        return {"type": "user", "name": user["name"], "orgs": organizations, "auth": {"accessToken": token}}

    def create(self) -> dict[str, Any]:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user['name']}/{asked['name']}"
        if not self.owns(name) or user["role"] == "read":
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        return {"url": f"{self.hub.url}/{name}"}

    def validate(self) -> dict[str, Any]:
        text = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        errors = [] if found and isinstance(yaml.safe_load(found[1]).get("tags"), list) else [{"message": "no tags"}]
        if errors:
            raise HubError(400, "no metadata")
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str = "main") -> dict[str, Any]:
        found = self.repository(name)
        commit = found.at(revision)
        files = [{"rfilename": path} for path in commit.files]
        return {"id": name, "modelId": name, "sha": commit.oid, "private": found.private, "siblings": files, "tags": []}

    def may_write(self, name: str) -> dict[str, Any]:
        self.repository(name, write=True)
        return {}

    def branch(self, name: str, revision: str) -> dict[str, Any]:
        found = self.repository(name, write=True)
        if revision in found.revisions:
            raise HubError(409, "Reference already exists")
        found.revisions[revision] = found.at("main")
        return {}

    def preupload(self, name: str, revision: str) -> dict[str, Any]:
        commit = self._target(name, revision).at(revision)
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LFS_ENDINGS) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(one["path"], commit.files[one["path"]]) if one["path"] in commit.files else None,
                }
                for one in json.loads(self.body)["files"]
            ]
        }

    def _target(self, name: str, revision: str) -> Repository:
        """The repository of a commit or pull request."""
        is_pull_request = self.query.get("create_pr") == ["1"] or revision.startswith("refs/pr/")
        if self.user() is None:
            raise HubError(401, "Invalid username or password.")
        return self.repository(name, write=not is_pull_request)

    def batch(self, name: str) -> dict[str, Any]:
        self.repository(name)
        objects = []
        for one in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/storage/{one['oid']}"
            actions = {} if one["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}}}
            objects.append({**one, **actions})
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str) -> dict[str, Any]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is not of this hash")
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, name: str, revision: str) -> dict[str, Any]:
        found = self._target(name, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(found.at(revision).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.objects:
                raise HubError(400, f"{value['path']} was not uploaded")
            is_lfs = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if is_lfs else base64.b64decode(value["content"])
        oid = hashlib.sha1(self.body + found.at(revision).oid.encode()).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{oid}"
        where, answer = revision, {"commitOid": oid, "commitUrl": url, "success": True}
        if self.query.get("create_pr"):
            number = sum(one.startswith("refs/pr/") for one in found.revisions) + 1
            where, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.hub.url}/{name}/discussions/{number}"
        if where in found.revisions:
            found.history.append(found.revisions[where])
        found.revisions[where] = Commit(oid, files, lines[0]["value"]["summary"])
        return answer

    def tree(self, name: str, revision: str) -> list[dict[str, Any]]:
        files = self.repository(name).at(revision).files
        return [
            {"type": "file", "path": path, "size": len(data), "oid": _oid("", data)} for path, data in files.items()
        ]

    def resolve(self, name: str, revision: str, path: str) -> bytes:
        commit = self.repository(name).at(revision)
        self.found_headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.found_headers |= {"ETag": f'"{_oid(path, commit.files[path])}"', "Accept-Ranges": "none"}
        return commit.files[path]


def _oid(path: str, data: bytes) -> str:
    """The hash that the client compares with that of a file."""
    if path.endswith(LFS_ENDINGS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{REPOSITORY}/auth-check/write", _Handler.may_write),
    ("POST", f"/api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"/{REPOSITORY}[.]git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("GET", f"/api/models/{REPOSITORY}", _Handler.info),
    ("GET", f"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/.*)?", _Handler.tree),
    ("GET", f"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
