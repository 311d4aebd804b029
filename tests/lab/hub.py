"""A model hub for tests: what huggingface_hub needs, with pauses, cuts, wrong bytes and gated models on demand."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10 << 10  # bytes from which on a file is stored and named by its SHA-256
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_MODEL = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)")


def etag_of(data: bytes) -> str:
    """The hub's name for a file with this content."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


@dataclass
class Model:
    """One model of the hub. `token` is the token needed to read it; None: anyone may."""

    files: dict[str, bytes]
    licence: str = "apache-2.0"
    token: str | None = None


@dataclass
class Hub:
    """Serves `models` on loopback until it is closed.

    `cuts`: after how many bytes each of the next downloads breaks off. `wrong`: how many of them have inverted bits.
    These two apply to files from LARGE on. `statuses`: what the next downloads are answered with instead.
    `piece_seconds`: how long each 64 KiB takes. `ignores_ranges`: a request for a range gets the whole file.
    """

    models: dict[str, Model]
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    wrong: int = 0
    piece_seconds: float = 0.0
    ignores_ranges: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # downloads requested: path and Range
    sent: int = 0  # bytes of files

    def __post_init__(self) -> None:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := _MODEL.fullmatch(path):
            self._model(*found.groups())
        elif found := _FILE.fullmatch(path):
            self._file(*found.groups(), with_body=with_body)
        else:
            self._say(404, {"X-Error-Code": "RepoNotFound"})

    def _model(self, repo: str, form: str, revision: str) -> None:
        model = self.hub.models.get(repo)
        if model is None:
            self._say(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._say(404, {"X-Error-Code": "RevisionNotFound"})
        elif form == "tree":
            self._json([self._entry(path, data) for path, data in model.files.items()])
        else:
            siblings = []
            for path, data in model.files.items():
                entry = self._entry(path, data)
                lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
                siblings.append({"rfilename": path, "size": len(data), "blobId": entry["oid"], **lfs})
            card = {"license": model.licence}
            gated = "manual" if model.token else False
            self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "gated": gated})

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": etag_of(data)}
        if len(data) < LARGE:
            return entry
        pointer = b"oid sha256:" + etag_of(data).encode()
        return {**entry, "oid": etag_of(pointer), "lfs": {"oid": etag_of(data), "size": len(data), "pointerSize": 134}}

    def _file(self, repo: str, revision: str, path: str, with_body: bool) -> None:
        hub, model = self.hub, self.hub.models[repo]
        if model.token and self.headers.get("Authorization") != f"Bearer {model.token}":
            self._say(401, {"X-Error-Code": "GatedRepo"})
            return
        data = model.files[path]
        fields = {"ETag": f'"{etag_of(data)}"', "X-Repo-Commit": COMMIT}
        if not with_body:
            self._say(200, {**fields, "Content-Length": str(len(data))})
            return
        hub.asked.append((path, self.headers.get("Range")))
        if hub.statuses:
            self._say(hub.statuses.pop(0))
            return
        begin = 0
        if (asked := self.headers.get("Range")) and not hub.ignores_ranges:
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            fields["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        rest = data[begin:]
        if hub.wrong and len(data) >= LARGE:
            hub.wrong -= 1
            rest = bytes(255 - byte for byte in rest)
        end = hub.cuts.pop(0) if hub.cuts and len(data) >= LARGE else len(rest)
        self.send_response(206 if begin else 200)
        for name, value in {**fields, "Content-Length": str(len(rest))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, min(end, len(rest)), 64 << 10):
            piece = rest[start : min(end, start + (64 << 10))]
            self.wfile.write(piece)
            hub.sent += len(piece)
            time.sleep(hub.piece_seconds)
        self.close_connection = end < len(rest)

    def _json(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _say(self, status: int, fields: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(fields or {})}.items():
            self.send_header(name, value)
        self.end_headers()
