"""Raw requests as h1spec sends them: what HTTP/1.1 asks of a server, one connection each."""

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.clients.outcome import Outcome

HOST = b"Host: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n"
CHUNKED = b"POST /v1/tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
GOOD, BAD = range(200, 300), (400,)
# name: the bytes, and which statuses are right; none at all: the connection is closed without an answer, or with a 400.
CASES: dict[str, tuple[bytes, range | tuple[int, ...]]] = {
    "a plain GET": (HEALTH + HOST + b"\r\n", GOOD),
    "HEAD": (b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n", GOOD),
    "names in any case": (HEALTH + b"hOsT: localhost\r\n\r\n", GOOD),
    "spaces around a value": (HEALTH + b"Host: \t localhost \t\r\n\r\n", GOOD),
    "an absolute target": (b"GET http://localhost/health HTTP/1.1\r\n" + HOST + b"\r\n", GOOD),
    "an unknown field": (HEALTH + HOST + b"X-Anything: at all\r\n\r\n", GOOD),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", GOOD),
    "an empty line before the request": (b"\r\n" + HEALTH + HOST + b"\r\n", GOOD),
    "Expect: 100-continue": (
        b"GET /health HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n",
        (100, 200),
    ),
    "no Host": (HEALTH + b"\r\n", BAD),
    "two Hosts": (HEALTH + HOST + b"Host: other\r\n\r\n", BAD),
    "a Host with a path": (HEALTH + b"Host: localhost/x\r\n\r\n", BAD),
    "a space before the colon": (HEALTH + b"Host : localhost\r\n\r\n", BAD),
    "a folded field": (HEALTH + HOST + b"X-A: b\r\n c\r\n\r\n", BAD),
    "a bare LF": (b"GET /health HTTP/1.1\nHost: localhost\n\n", BAD),
    "a NUL in a value": (HEALTH + HOST + b"X-A: b\0c\r\n\r\n", BAD),
    "a field without a name": (HEALTH + HOST + b": b\r\n\r\n", BAD),
    "a space in the target": (b"GET /hea lth HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    "an unknown version": (b"GET /health HTTP/9.1\r\n" + HOST + b"\r\n", (400, 505)),
    "no version": (b"GET /health\r\n\r\n", BAD),
    "a method in lower case": (b"get /health HTTP/1.1\r\n" + HOST + b"\r\n", (400, 405, 501)),
    "an unknown method": (b"BREW /health HTTP/1.1\r\n" + HOST + b"\r\n", (400, 405, 501)),
    "two lengths": (
        b"POST /v1/tokenize HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        BAD,
    ),
    "a negative length": (b"POST /v1/tokenize HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", BAD),
    "length and chunks": (
        b"POST /v1/tokenize HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        BAD,
    ),
    "an unknown coding": (b"POST /v1/tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", (400, 501)),
    "a chunk size that is none": (CHUNKED + b"zz\r\n\r\n", BAD),
    "a chunk longer than its size": (CHUNKED + b"1\r\nabc\r\n0\r\n\r\n", BAD),
    "a target of 100 kB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", (400, 414, 431)),
    "fields of 100 kB": (HEALTH + HOST + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n", (400, 431)),
}


def run(url: str) -> Iterator[Outcome]:
    parts = urlsplit(url)
    for name, (data, right) in CASES.items():
        status = _status(parts.hostname or "", parts.port or 80, data)
        yield Outcome("HTTP/1.1", name, "" if status in right else f"{status or 'no answer'} for {data[:60]!r}")


def _status(host: str, port: int, data: bytes) -> int:
    """The status of the first answer; 0 if none came."""
    with socket.create_connection((host, port), timeout=30) as connection:
        try:
            connection.sendall(data)
            said = connection.recv(4096)
        except ConnectionError:
            said = b""
    return int(said[9:12]) if said.startswith(b"HTTP/1.1 ") else 0
