"""A small Hub on a loopback port, for the real huggingface_hub client: repositories, branches, tokens, faults.

Everything is kept in memory and is lost with the server. `HubServer.fault` makes it fail as real servers do.

    def test_something(hub):  # the fixture below: a running server, and this process and its children pointed at it
        push_folder(folder, "me/x")
        assert hub.files("me/x")["config.json"]

Modules that keep the endpoint from their import (datasets does, transformers partly) are best run in a child process:
`hub.run(code)` runs Python code in a fresh one, `hub.run(code, without_package=True)` where the package cannot be
imported, each with fresh caches.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "aTokenOfTheUserMeForTests" + "0123456789"
OTHER_TOKEN = "hf_" + "aTokenOfSomebodyElse" + "0123456789abcd"
WRONG_TOKEN = "hf_" + "aTokenThatNobodyHas" + "0123456789abcde"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".arrow")

WITHOUT_PACKAGE = Path(__file__).parent / "without_package.py"


@dataclass
class Fault:
    """What goes wrong with the requests that match, `times` times, after `after` that go well.

    `action` is "die" (the whole server stops at once, in mid-request), "reset" (the connection breaks in mid-request),
    "hang" (no answer, until the server stops), "lose" (done, but the answer is lost), "delay" (an answer after
    `seconds`, which a test may shorten meanwhile), or an HTTP status.
    """

    method: str
    path: str
    action: str | int
    times: int = 1
    after: int = 0
    seconds: float = 0.0
    hits: int = 0


@dataclass
class Commit:
    sha: str
    message: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", "a-branch", "refs/pr/1" -> commit

    def add(self, ref: str, message: str, files: dict[str, bytes], parent: str | None) -> Commit:
        sha = hashlib.sha1(f"{ref}{message}{len(self.commits)}{parent}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, message, parent, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class HubServer:
    """A Hub at `url`, with the users of `tokens` (token -> user). Stopped, it remembers all; `start` goes on."""

    def __init__(self, home: Path, tokens: dict[str, str] | None = None):
        self.home = Path(home)
        self.tokens = tokens or {TOKEN: "me", OTHER_TOKEN: "somebody"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self._connections: set = set()

    # Running

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "HubServer":
        self.stopping.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        """Stop at once: no new connection is taken, and the open ones break."""
        server, self._server = self._server, None
        if server is None:
            return
        self.stopping.set()
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            _break(connection)

    # What tests ask

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The contents of every file at a revision."""
        return dict(self.repos[repo_type, repo_id].find(revision).files)

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """The commit messages of a revision, oldest first, without the one that made the repository."""
        repo, messages = self.repos[repo_type, repo_id], []
        commit = repo.find(revision)
        while commit.parent:
            messages.insert(0, commit.message)
            commit = repo.commits[commit.parent]
        return messages

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        return self.repos[repo_type, repo_id].find(revision).sha

    def fault(self, method: str, path: str, action: str | int, **options) -> Fault:
        """Let requests fail whose method and path (a regular expression, searched) match; see `Fault`."""
        self.faults.append(Fault(method, path, action, **options))
        return self.faults[-1]

    def heal(self):
        self.faults.clear()

    # Child processes

    def env(self, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that point a child process here, with caches of its own under `home`."""
        gone = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
        variables = {k: v for k, v in os.environ.items() if k not in gone}
        variables |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_MODULES_CACHE": str(self.home / "modules"),
            "HF_DATASETS_CACHE": str(self.home / "datasets"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        if token:
            variables["HF_TOKEN"] = token
        return variables

    def run(
        self, code: str, *, without_package: bool = False, token: str | None = TOKEN, timeout: float = 300, check=True
    ) -> subprocess.CompletedProcess:
        """Run Python code in a fresh process pointed here, in an empty folder, with fresh caches."""
        runs = sum(1 for _ in self.home.glob("run-*"))
        folder = self.home / f"run-{runs}"
        folder.mkdir(parents=True)
        variables = self.env(token)
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
            variables[name] = str(folder / name.lower())
        if without_package:
            variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            [sys.executable, "-c", (WITHOUT_PACKAGE.read_text() if without_package else "") + code],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running `HubServer`; this process's huggingface_hub, logged in as "me", and its children are pointed at it."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    server = HubServer(tmp_path / "hub_home").start()
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(server.home / "hub"),
        "HF_TOKEN_PATH": str(server.home / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    huggingface_hub.close_session()
    yield server
    server.stop()
    huggingface_hub.close_session()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # broken connections are part of the tests


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self):
        self.hub._connections.discard(self.connection)
        super().finish()

    def answer(self):
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            fault = self._fault(url.path)
        if fault and self._fail(fault):
            return
        body = self._body()
        try:
            self.user = self._user()
            status, headers, content = self._route([unquote(part) for part in url.path.strip("/").split("/")], body)
        except _Refused as refusal:
            status = refusal.status
            headers = {"X-Error-Message": refusal.message} if refusal.message else {}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            content = json.dumps({"error": refusal.message or refusal.code}).encode()
        if fault and fault.action == "lose":
            _break(self.connection)
            self.close_connection = True
            return
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    # Faults

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.method == self.command and re.search(fault.path, path):
                fault.hits += 1
                if fault.after < fault.hits <= fault.after + fault.times:
                    return fault
        return None

    def _fail(self, fault: Fault) -> bool:
        """Go wrong; True if there will be no regular answer."""
        if fault.action == "lose":
            return False
        if fault.action == "delay":
            start = time.monotonic()
            while time.monotonic() - start < fault.seconds:
                time.sleep(0.01)
            return False
        if fault.action == "hang":
            self.hub.stopping.wait(60)
        elif fault.action == "die":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
            self.hub.stop()
        elif fault.action == "reset":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
        else:
            self._body()
            # Some proxies repeat a request's headers in their error pages: a client must not show them.
            content = f"fault {fault.action} for {self.headers.get('Authorization')}".encode()
            self.send_response(fault.action)
            self.send_header("X-Error-Message", content.decode())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return True
        _break(self.connection)
        self.close_connection = True
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # Who may

    def _user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if not authorization:
            return None
        user = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_type: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            raise _Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _may_write(self, repo_id: str):
        if self.user != repo_id.split("/")[0]:
            raise _Refused(403 if self.user else 401, message="You don't have the rights to write here")

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Routes

    def _route(self, parts: list[str], body: bytes) -> tuple[int, dict, object]:
        match parts:
            case ["api", "whoami-v2"]:
                if self.user is None:
                    raise _Refused(401, message="Invalid username or password.")
                return 200, {}, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                return 200, {}, {"errors": [], "warnings": []}
            case ["lfs", oid] if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _Refused(400, message="content does not match its sha256")
                self.hub.lfs[oid] = body
                return 200, {}, b""
            case ["api", ("models" | "datasets" | "spaces") as kind, owner, name, *rest]:
                return self._api(kind[:-1], f"{owner}/{name}", rest, body)
            case [("datasets" | "spaces") as kind, owner, name, *rest]:
                return self._files(kind[:-1], f"{owner}/{name.removesuffix('.git')}", rest, body)
            case [owner, name, *rest] if rest and owner != "api":
                return self._files("model", f"{owner}/{name.removesuffix('.git')}", rest, body)
        raise _Refused(404, message=f"no such page: {self.path}")

    def _create(self, request: dict) -> tuple[int, dict, object]:
        if self.user is None:
            raise _Refused(401, message="Invalid username or password.")
        repo_id = f"{request.get('organization') or self.user}/{request['name']}"
        repo_type = request.get("type") or "model"
        self._may_write(repo_id)
        answer = {"url": f"{self.hub.url}/{f'{repo_type}s/' * (repo_type != 'model')}{repo_id}", "name": repo_id}
        with self.hub.lock:
            if (repo_type, repo_id) in self.hub.repos:
                return 409, {}, {"error": "You already created this repo", **answer}
            private = request.get("visibility") == "private" or bool(request.get("private"))
            repo = self.hub.repos[repo_type, repo_id] = Repo(private)
            repo.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, None)
        return 200, {}, answer

    def _api(self, repo_type: str, repo_id: str, rest: list[str], body: bytes) -> tuple[int, dict, object]:
        repo = self._repo(repo_type, repo_id)
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                commit = self._commit(repo, rest[1] if rest else "main")
                return 200, {}, self._info(repo_id, repo, commit)
            case "GET", ["tree", revision, *folder]:
                commit = self._commit(repo, revision)
                return 200, {}, self._tree(commit, "/".join(folder), bool(self.query.get("recursive")))
            case "POST", ["paths-info", revision]:
                commit = self._commit(repo, revision)
                paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
                entries = {entry["path"]: entry for entry in self._tree(commit, "", True)}
                return 200, {}, [entries[path] for path in paths if path in entries]
            case "GET", ["refs"]:
                refs = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": s} for r, s in repo.refs.items()]
                return 200, {}, {"branches": [r for r in refs if "/" not in r["name"]], "tags": [], "converts": []}
            case "GET", ["commits", revision]:
                commits, commit = [], self._commit(repo, revision)
                while commit:
                    commits.append(
                        {"id": commit.sha, "title": commit.message, "message": "", "authors": [],
                         "date": "2026-01-01T00:00:00.000Z"}
                    )  # fmt: skip
                    commit = repo.commits.get(commit.parent)
                return 200, {}, commits
            case "POST", ["branch", branch]:
                self._may_write(repo_id)
                start = json.loads(body or b"{}").get("startingPoint") or "main"
                with self.hub.lock:
                    if branch in repo.refs:
                        raise _Refused(409, message="Reference already exists")
                    repo.refs[branch] = self._commit(repo, start).sha
                return 200, {}, {}
            case "POST", ["preupload", revision]:
                self._may_propose(repo_id)
                files = self._commit(repo, revision).files
                return 200, {}, {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                            "shouldIgnore": False,
                            "oid": _oid(f["path"], files[f["path"]]) if f["path"] in files else None,
                        }
                        for f in json.loads(body)["files"]
                    ]
                }  # fmt: skip
            case "POST", ["commit", revision]:
                self._may_propose(repo_id)
                return self._make_commit(repo_type, repo_id, repo, revision, body)
        raise _Refused(404, message=f"no such page: {self.path}")

    def _may_propose(self, repo_id: str):
        """Anybody with a token may open a pull request; only the owner may commit."""
        if not (self.query.get("create_pr") and self.user):
            self._may_write(repo_id)

    def _info(self, repo_id: str, repo: Repo, commit: Commit) -> dict:
        return {
            "_id": "0" * 24, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit.sha,
            "private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }  # fmt: skip

    def _tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path, content in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            depth = len(parents) if recursive else min(len(parents), 1)
            folders |= {prefix + "/".join(parents[: i + 1]) for i in range(depth)}
            if parents and not recursive:
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        if folder and not entries and not folders:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        return [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)] + entries

    def _make_commit(
        self, repo_type: str, repo_id: str, repo: Repo, revision: str, body: bytes
    ) -> tuple[int, dict, object]:
        with self.hub.lock:
            parent = self._commit(repo, revision)
            files, header = dict(parent.files), {}
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                match item["key"]:
                    case "header":
                        header = value
                        if value.get("parentCommit") not in (None, parent.sha):
                            raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in self.hub.lfs:
                            raise _Refused(400, message=f"LFS pointer of {value['path']} points to nothing")
                        files[value["path"]] = self.hub.lfs[value["oid"]]
                    case "deletedFile":
                        if files.pop(value["path"], None) is None:
                            raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                    case "deletedFolder":
                        files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
            url = f"{self.hub.url}/{f'{repo_type}s/' * (repo_type != 'model')}{repo_id}"
            answer = {"success": True}
            if self.query.get("create_pr"):
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                revision = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{url}/discussions/{number}"
            elif revision not in repo.refs:
                raise _Refused(400, message=f"{revision} is not a branch")
            commit = repo.add(revision, header["summary"], files, parent.sha)
            return 200, {}, {**answer, "commitUrl": f"{url}/commit/{commit.sha}", "commitOid": commit.sha}

    def _files(self, repo_type: str, repo_id: str, rest: list[str], body: bytes) -> tuple[int, dict, object]:
        repo = self._repo(repo_type, repo_id)
        match self.command, rest:
            case "POST", ["info", "lfs", "objects", "batch"]:
                if self.user is None:
                    raise _Refused(401, message="Invalid username or password.")
                objects = []
                for item in json.loads(body)["objects"]:
                    known = item["oid"] in self.hub.lfs
                    upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
                    objects.append(item if known else {**item, "actions": upload})
                return 200, {}, {"transfer": "basic", "objects": objects}
            case (("GET" | "HEAD"), ["resolve", revision, *path]):
                commit = self._commit(repo, revision)
                name = "/".join(path)
                if name not in commit.files:
                    raise _Refused(404, "EntryNotFound", f"{name} does not exist")
                return self._content(commit, name)
        raise _Refused(404, message=f"no such page: {self.path}")

    def _content(self, commit: Commit, name: str) -> tuple[int, dict, object]:
        content = commit.files[name]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{_oid(name, content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) < len(content):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        return status, {**headers, "Content-Length": str(len(content))}, content


def _break(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(2)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(content)


def put_on_hub(hub, repo_id: str, folder: Path, ref: str = "main"):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    repo = hub.repos.setdefault(("model", repo_id), Repo(private=False))
    repo.add(ref, "files", files, None)
