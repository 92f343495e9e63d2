"""A hub on the loopback: as much of its protocol as huggingface_hub, datasets, transformers and evaluate use.

What they ask for (huggingface_hub 2.4, datasets 5.2, transformers 5.23, evaluate 0.4.6):

- `hf_hub_download`, `AutoTokenizer`, `AutoModelForCausalLM`: HEAD of `REPO/resolve/REVISION/FILE`, whose
  commit, ETag and size (of what lies in the large file storage: the linked ones, with a redirect) name the
  cache's file; then GET. A download that was cut goes on with a Range.
- `snapshot_download`: `api/models/REPO/revision/REVISION` for the commit, its whole `tree`, then each file.
- `datasets.load_dataset`: README.md by `resolve`, which tells the commit; `.huggingface.yaml`, NAME.py and
  `dataset_infos.json`, mostly not there; `tree`s for the patterns of files; each file of all splits by
  `resolve`. With streaming these are read with GET and a Range. HfFileSystem is the same.
- `evaluate.load` (humaneval and mbpp): `spaces/evaluate-metric/NAME/resolve/vVERSION/NAME.py`, then `main`.

Files of `LARGE` suffixes answer by a redirect to another host, as those in the large file storage do. There
is no Xet.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = {".parquet", ".safetensors", ".arrow", ".gz", ".zst"}
PAGE = 3  # entries of a tree on one page: small, so that every test turns pages
CHUNK = 65536  # bytes between two waits of a slow hub

Files = Mapping[str, bytes]


class Request(NamedTuple):
    """What was asked for; `path` is without the query."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Fault:
    """What goes wrong with requests whose path has `pattern` in it (a regular expression).

    method: of the requests; None: all.
    times: how many requests; None: all.
    status: answer with this one, and `headers`.
    cut: break the connection off after so many bytes of the content.
    pause: seconds between each `CHUNK` bytes of the content, and before the first.
    """

    pattern: str
    method: str | None = None
    times: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pause: float = 0.0


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch and tag; `token` is asked for if it is gated."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None


class HubServer:
    """The hub: `with HubServer() as hub`, then `HF_ENDPOINT=hub.url`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"  # another host, as the storage is

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(
        self, kind: str, repo: str, files: Files, *, tag: str | None = None, commit: str | None = None
    ) -> str:
        """A commit on `main` that consists of these files; gives its SHA-1.

        Args:
            kind: models, datasets or spaces.
            tag: another name of the commit.
            commit: its SHA-1, where settings name one already.
        """
        repository = self.repositories.setdefault(f"{kind}/{repo}", Repository())
        content = f"{kind}/{repo}/{len(repository.commits)}".encode() + b"".join(files.values())
        commit = commit or hashlib.sha1(content).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs["main"] = commit
        if tag:
            repository.refs[tag] = commit
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return commit

    def gate(self, kind: str, repo: str, token: str) -> None:
        """Let in only those who show this token."""
        self.repositories[f"{kind}/{repo}"].token = token

    def asked(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests whose path has `pattern` in it (a regular expression)."""
        with self._lock:
            return [
                request
                for request in self.requests
                if re.search(pattern, request.path) and method in (None, request.method)
            ]

    def note(self, request: Request) -> Fault | None:
        """Record a request; gives what goes wrong with it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.pattern, request.path) and fault.method in (None, request.method):
                    if fault.times is None:
                        return fault
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None


class _RefusedError(Exception):
    """A status and, as the hub gives it, a code of the error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(file: str) -> bool:
    return PurePosixPath(file).suffix in LARGE


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if _is_large(path):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below a folder ("" is the root).

    Raises:
        _RefusedError: no such folder.
    """
    inside = [PurePosixPath(path) for path in files if PurePosixPath(path).is_relative_to(folder)]
    if folder and not inside:
        raise _RefusedError(404, "EntryNotFound", f"{folder} does not exist")
    folders = {str(parent) for path in inside for parent in path.parents} - {".", folder}
    folders = {path for path in folders if PurePosixPath(path).is_relative_to(folder)}
    entries = {path: _folder_entry(path) for path in folders}
    entries |= {str(path): _file_entry(str(path), files[str(path)]) for path in inside}
    return [
        entry
        for path, entry in sorted(entries.items())
        if recursive or PurePosixPath(path).parent == PurePosixPath(folder)
    ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing, where a client hung up, as those do that see a redirect they do not follow."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_of_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the hub's requests are in `HubServer.requests`."""

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        bearer = self.headers.get("Authorization")
        self.token = bearer.removeprefix("Bearer ") if bearer else None
        # transformers quotes a revision's slashes, as in refs%2Fpr%2F1.
        path = unquote(address.path)
        request = Request(self.command or "", path, self.headers.get("Range"), self.token)
        self.fault = self.server_of_hub.note(request)
        try:
            if self.fault and self.fault.status:
                self._send(self.fault.status, b"{}", self.fault.headers)
            else:
                self._route(path)
        except _RefusedError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            if self.token is None:
                raise _RefusedError(401, "", "Invalid username or password.")
            self._send_json({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif match := re.fullmatch("/cdn/([0-9a-f]{64})", path):
            self._send_content(self.server_of_hub.blobs[match[1]], {"ETag": f'"{match[1]}"'})
        elif match := re.fullmatch("/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            self._api(match[1], match[2], match[3] or "revision/main")
        elif match := re.fullmatch("/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            self._resolve(match[1] or "models", match[2], match[3], match[4])
        else:
            raise _RefusedError(404, "", "Sorry, we can't find the page you are looking for.")

    def _api(self, kind: str, repo: str, what: str) -> None:
        word, _, rest = what.partition("/")
        if word == "refs":
            refs = self._repository(kind, repo).refs
            entries = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in refs.items()]
            self._send_json({"branches": entries, "converts": [], "tags": []})
            return
        revision, _, folder = rest.partition("/")
        commit, files = self._commit(kind, repo, revision)
        if word == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            about = {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            self._send_json({**about, "gated": self._repository(kind, repo).token is not None})
        elif word == "tree":
            entries = _tree(files, folder, self.query.get("recursive", [""])[0].lower() in ("true", "1"))
            start = int(self.query.get("cursor", ["0"])[0])
            query = "&".join(f"{name}={values[0]}" for name, values in self.query.items() if name != "cursor")
            after = f"{self.server_of_hub.url}{urlsplit(self.path).path}?{query}&cursor={start + PAGE}"
            link = {"Link": f'<{after}>; rel="next"'} if start + PAGE < len(entries) else {}
            self._send_json(entries[start : start + PAGE], link)
        elif word == "paths-info":
            asked = json.loads(self.body) if self.body.startswith("{") else parse_qs(self.body)
            entries = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            self._send_json([entries[path] for path in asked["paths"] if path in entries])
        else:
            raise _RefusedError(404, "", f"{word}: not spoken here")

    def _resolve(self, kind: str, repo: str, revision: str, file: str) -> None:
        commit, files = self._commit(kind, repo, revision)
        headers = {"X-Repo-Commit": commit}
        if file not in files:  # with the commit, at which the cache then notes it as missing
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Not found"})
            return
        data = files[file]
        if _is_large(file):
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            place = {"Location": f"{self.server_of_hub.storage_url}/cdn/{oid}"}
            self._send(302, b"", headers | linked | place)
        else:
            self._send_content(data, headers | {"ETag": f'"{_git_oid(data)}"'})

    def _repository(self, kind: str, repo: str) -> Repository:
        """As the hub, which tells a stranger of a missing repository what it tells of a private one."""
        repository = self.server_of_hub.repositories.get(f"{kind}/{repo}")
        if repository is None:
            if self.token is None:
                raise _RefusedError(401, "RepoNotFound", "Invalid username or password.")
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(kind, repo)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        reads_files = "/resolve/" in self.path
        if reads_files and repository.token is not None and self.token != repository.token:
            status = 401 if self.token is None else 403
            raise _RefusedError(status, "GatedRepo", f"Access to {kind}/{repo} is restricted.")
        return commit, repository.commits[commit]

    def _send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_content(self, data: bytes, headers: Mapping[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if wanted is None:
            self._send(200, data, headers)
            return
        start = int(wanted[1])
        part = data[start : int(wanted[2]) + 1 if wanted[2] else None]
        if not part:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        place = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self._send(206, part, headers | {"Content-Range": place})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and (self.fault.cut is not None or self.fault.pause):
            self._send_badly(content[: self.fault.cut], self.fault.pause)
            self.close_connection = self.fault.cut is not None
        else:
            self.wfile.write(content)

    def _send_badly(self, content: bytes, pause: float) -> None:
        for start in range(0, len(content), CHUNK):
            time.sleep(pause)
            self.wfile.write(content[start : start + CHUNK])
