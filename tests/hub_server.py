"""A Hub on the loopback interface: datasets and models, commits, pull requests and LFS uploads, in memory, with faults on order."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopbackSecretToken"
Tree = dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Tree]
    refs: dict[str, str]  # main, refs/pr/N: the commit
    titles: dict[str, str] = field(default_factory=dict)  # of commits
    log: list[str] = field(default_factory=list)  # commits of main, oldest first

    @property
    def files(self) -> Tree:
        return self.commits[self.refs["main"]]


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves at `hub.url`.

    `faults`: one for each coming commit request, None for none: called with the handler, it may wait, answer and
    return True (the commit is not looked at), or return a function that is called in the place of the answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Callable[[Handler], Any] | None] = []
        self.down = 0  # requests that are answered 503 before the next is served,
        self.down_for = ""  # of those whose path has this
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.numbers = itertools.count()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are what tests are about."""

    def create(self, name: str, files: Tree | None = None, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private, {}, {})
        self.add(repo, {".gitattributes": b"*.parquet filter=lfs\n", **(files or {})}, "initial commit")
        return repo

    def add(self, repo: Repo, files: Tree, title: str, ref: str = "main") -> str:
        oid = hashlib.sha1(str(next(self.numbers)).encode()).hexdigest()
        repo.commits[oid], repo.titles[oid], repo.refs[ref] = files, title, oid
        if ref == "main":
            repo.log.append(oid)
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: object = None, body: bytes | None = None, **headers: str) -> None:
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, text: str, code: str = "") -> None:
        self.close_connection = True  # the request's body may not have been read
        self.answer(
            status, {"error": text}, X_Error_Code=code, X_Error_Message=" ".join(text.split()), Connection="close"
        )

    def route(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        hub.requests.append(f"{self.command} {path}")
        if self.path.startswith("/lfs/") and self.command == "PUT":
            data = self.body()
            hub.blobs[hashlib.sha256(data).hexdigest()] = data
            return self.answer(200)
        if hub.down and hub.down_for in path:
            hub.down -= 1
            return self.error(503, "overloaded")
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return self.error(401, "Invalid credentials in Authorization header")
        for method, pattern, call in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                if "POST" in method and given is None:
                    return self.error(401, "Invalid username or password.")
                return call(self, *match.groups())
        return self.error(404, "not served here")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def commit_of(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") is None):
            self.error(404, "Repository not found", "RepoNotFound")
            return None
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            self.error(404, "Revision not found", "RevisionNotFound")
            return None
        return repo, oid

    # ------------------------------------------------------------ what is served

    def create_repo(self) -> None:
        wanted = json.loads(self.body())
        name = f"{'spaces/' * (wanted.get('type') == 'space')}{wanted['organization']}/{wanted['name']}"
        assert wanted.get("type") != "space" or wanted["sdk"] == "static"
        known = name in self.server.repos
        if not known:
            self.server.create(name, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{kind}{name}"})

    def validate_yaml(self) -> None:
        given = json.loads(self.body())
        head = yaml.safe_load(given["content"].split("\n---", 1)[0])
        if given["repoType"] == "model":
            good = isinstance(head, dict) and all(r["metrics"] for m in head["model-index"] for r in m["results"])
        elif given["repoType"] == "space":
            good = isinstance(head, dict) and head["sdk"] == "static" and bool(head["title"])
        else:
            good = isinstance(head, dict) and [c for c in head["configs"] if c.get("default")] == head["configs"][:1]
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "bad YAML"}], "warnings": []})

    def info(self, name: str, revision: str | None) -> None:
        if (found := self.commit_of(name, revision or "main")) is None:
            return
        repo, oid = found
        siblings = [{"rfilename": p} for p in repo.commits[oid]]
        self.answer(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        if (found := self.commit_of(name, revision)) is None:
            return
        files = found[0].commits[found[1]]
        prefix = f"{folder}/" if folder else ""
        below = {p: d for p, d in files.items() if p.startswith(prefix)}
        if folder and not below:
            return self.error(404, "no such folder", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for p, d in below.items():
            first, slash, _ = p.removeprefix(prefix).partition("/")
            if slash:
                entries[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
            if deep or not slash:
                entries[p] = {"type": "file", "path": p, "size": len(d), "oid": blob_id(d)}
        self.answer(200, list(entries.values()))

    def paths_info(self, name: str, revision: str) -> None:
        wanted = self.body()
        if (found := self.commit_of(name, revision)) is None:
            return
        files = found[0].commits[found[1]]
        try:
            paths = json.loads(wanted)["paths"]
        except ValueError:
            paths = parse_qs(wanted.decode())["paths"]
        known = [p for p in paths if p in files]
        self.answer(200, [{"type": "file", "path": p, "size": len(files[p]), "oid": blob_id(files[p])} for p in known])

    def resolve(self, name: str, rest: str) -> None:
        repo = self.server.repos.get(name)
        refs = list(repo.refs) if repo else []
        revision = next((r for r in refs if rest.startswith(r + "/")), rest.partition("/")[0])
        if (found := self.commit_of(name, revision)) is None:
            return
        repo, oid = found
        data = repo.commits[oid].get(rest.removeprefix(revision + "/"))
        if data is None:
            return self.error(404, "Entry not found", "EntryNotFound")
        same = {"X_Repo_Commit": oid, "ETag": f'"{blob_id(data)}"', "Accept_Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            where = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, body=data[first : last + 1], Content_Range=where, **same)
        self.answer(200, body=data, Content_Length=str(len(data)), **same)

    def preupload(self, name: str, revision: str) -> None:
        wanted = json.loads(self.body())["files"]
        if (found := self.commit_of(name, revision)) is None:
            return
        files = found[0].commits[found[1]]
        self.answer(
            200,
            {
                "files": [
                    {"path": p, "uploadMode": mode, "shouldIgnore": False}
                    | ({"oid": blob_id(files[p], mode)} if p in files else {})
                    for p, mode in [
                        (f["path"], "lfs" if f["path"].endswith((".parquet", ".safetensors")) else "regular")
                        for f in wanted
                    ]
                ]
            },
        )

    def lfs_batch(self, name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
            for o in json.loads(self.body())["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, revision: str) -> None:
        hub = self.server
        with hub.lock:
            fault = hub.faults.pop(0) if hub.faults else None
        after = fault(self) if fault else None
        if after is True:
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        with hub.lock:
            if (found := self.commit_of(name, revision)) is None:
                return
            repo, head = found
            proposed = "create_pr" in self.query
            parent = header.get("parentCommit", head)
            if not proposed and parent != head:
                return self.error(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[parent])
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                else:
                    del files[value["path"]]
            number = len(repo.refs)
            oid = hub.add(repo, files, header["summary"], f"refs/pr/{number}" if proposed else "main")
        page = f"{hub.url}/{name}" if name.startswith("spaces/") else f"{hub.url}/datasets/{name}"
        pull = {"pullRequestUrl": f"{page}/discussions/{number}"} if proposed else {}
        if after:
            return after()
        self.answer(200, {"commitUrl": f"{page}/commit/{oid}", "commitOid": oid, **pull})

    def discussions(self, name: str) -> None:
        repo = self.server.repos[name]
        found = [
            {
                "num": int(ref.rpartition("/")[2]),
                "title": repo.titles[oid],
                "author": {"name": "somebody"},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "isPullRequest": True,
                "repo": {"name": name, "type": "dataset"},
            }
            for ref, oid in repo.refs.items()
            if ref.startswith("refs/pr/")
        ]
        self.answer(200, {"count": len(found), "start": 0, "discussions": found})

    def cut(self) -> None:
        """Close the connection where it is."""
        self.close_connection = True
        self.connection.shutdown(2)


def blob_id(data: bytes, mode: str = "regular") -> str:
    """What git calls the content; of LFS files their SHA-256."""
    if mode == "lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"((?:spaces/)?[\w.-]+/[\w.-]+)"
API = f"/api/(?:(?:datasets|models)/)?{NAME}"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"{API}(?:/revision/(.+))?", Handler.info),
    ("GET", f"{API}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", f"{API}/paths-info/(.+)", Handler.paths_info),
    ("POST", f"{API}/preupload/(.+)", Handler.preupload),
    ("POST", f"{API}/commit/(.+)", Handler.commit),
    ("GET", f"{API}/discussions", Handler.discussions),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("GET HEAD", f"/(?:datasets/)?{NAME}/resolve/(.+)", Handler.resolve),
]
