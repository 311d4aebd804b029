"""A client that controls every byte it sends, and checks everything it receives."""

import asyncio
import re
import socket
import struct
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import orjson

CHAT = "/v1/chat/completions"
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")


class BadAnswer(AssertionError):
    """The bytes received are no HTTP/1.1 answer."""


class Ended(Exception):
    """The connection ended where more was due; `rest` is the part that had come."""

    def __init__(self, rest: bytes) -> None:
        super().__init__(f"ended after {rest[-200:]!r}")
        self.rest = rest


@dataclass(frozen=True)
class Answer:
    """One answer. `is_whole` is False if the connection ended before the answer did."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    is_whole: bool = True
    interim: tuple[int, ...] = ()
    trailers: tuple[tuple[str, str], ...] = ()

    def header(self, name: str) -> str | None:
        """The only value of a header; None if there is none. More than one fails the test."""
        values = self.all(name)
        assert len(values) < 2, f"{name} came {len(values)} times: {values}"
        return values[0] if values else None

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    @property
    def error(self) -> dict[str, str]:
        """The error object of an OpenAI-shaped body."""
        body = orjson.loads(self.body)
        assert set(body) == {"error"}, body
        assert set(body["error"]) == {"message", "type", "code", "param"}, body
        assert self.header("content-type") == "application/json"
        message: str = body["error"]["message"]
        assert re.search(r"\w.*[.:].*\w.*\.$", message), f"says what is wrong, not what to do: {message}"
        result: dict[str, str] = body["error"]
        return result

    @property
    def is_last(self) -> bool:
        """Does it announce that its connection ends with it?"""
        return (self.header("connection") or "").lower() == "close"


def request(
    method: str = "POST",
    path: str = CHAT,
    body: bytes | None = None,
    headers: tuple[tuple[str, str], ...] = (),
    version: str = "1.1",
    host: str = "wire.test",
) -> bytes:
    """A well-formed request; a `body` gets its Content-Length."""
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", *(f"{name}: {value}" for name, value in headers)]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def chat(tokens: int = 3, stream: bool = False, **more: object) -> bytes:
    """A generating request's body."""
    return orjson.dumps({"messages": [], "max_tokens": tokens, "stream": stream, **more})


def chunks(*pieces: bytes) -> bytes:
    """A chunked body of these pieces."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


class Client:
    """One connection. It reads only when asked to, so a test makes a slow client by not asking."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, url: str, receive_buffer: int = 0, source: str = "") -> Self:
        """Connects; `receive_buffer` is the size of the kernel's receive buffer in bytes (0: the kernel decides).

        `source` is a local address to connect from: 127.0.0.2 counts as another client than 127.0.0.1.
        """
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        sock = socket.socket(socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            if source:
                sock.bind((source, 0))
            await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    def leave(self, how: str = "close") -> None:
        """Closes the connection; "reset" does it with a RST, "half" closes only the sending side."""
        if how == "half":
            self.sock.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def more(self) -> bytes:
        """The next bytes that come; empty at the end of the connection."""
        try:
            data = await self._loop.sock_recv(self.sock, 1 << 18)
        except ConnectionError:
            data = b""
        self.received += data
        return data

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and including `mark`. Raises Ended."""
        while (end := self.received.find(mark)) < 0:
            if not await self.more():
                raise Ended(self._taken(len(self.received)))
        return self._taken(end + len(mark))

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes. Raises Ended."""
        while len(self.received) < count:
            if not await self.more():
                raise Ended(self._taken(len(self.received)))
        return self._taken(count)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        while await self.more():
            pass
        return self._taken(len(self.received))

    async def is_ended(self) -> bool:
        """Waits for bytes or the end of the connection: True if it ended and nothing came before."""
        return not self.received and not await self.more()

    def _taken(self, count: int) -> bytes:
        data, self.received = self.received[:count], self.received[count:]
        return data

    async def answer(self, method: str = "POST") -> Answer:
        """The next answer, to a request with this method. Raises BadAnswer, and Ended if not even a head came."""
        interim: list[int] = []
        while True:
            status, headers = await self.head()
            if status >= 200:
                break
            interim.append(status)
        if method == "HEAD" or status in (204, 304):
            return Answer(status, headers, b"", True, tuple(interim))
        body, is_whole, trailers = await self._body(headers)
        return Answer(status, headers, body, is_whole, tuple(interim), tuple(trailers))

    async def head(self) -> tuple[int, list[tuple[str, str]]]:
        """Status and headers of the next head."""
        first, *lines = (await self.until(b"\r\n\r\n"))[:-4].split(b"\r\n")
        if not re.fullmatch(rb"HTTP/1\.1 [1-9]\d\d [ -~]+", first):
            raise BadAnswer(f"status line {first!r}")
        headers = []
        for line in lines:
            field = _FIELD.fullmatch(line)
            if field is None:
                raise BadAnswer(f"field {line!r}")
            headers.append((field[1].decode(), field[2].decode("latin-1")))
        return int(first[9:12]), headers

    async def _body(self, headers: list[tuple[str, str]]) -> tuple[bytes, bool, list[tuple[str, str]]]:
        said = [(name.lower(), value) for name, value in headers]
        lengths = [value for name, value in said if name == "content-length"]
        codings = [value for name, value in said if name == "transfer-encoding"]
        if len(lengths) + len(codings) > 1 or (codings and codings != ["chunked"]):
            raise BadAnswer(f"framing {lengths} {codings}")
        if codings:
            return await self._chunked()
        if not lengths:
            return await self.rest(), True, []
        try:
            return await self.exactly(int(lengths[0])), True, []
        except Ended as end:
            return end.rest, False, []

    async def _chunked(self) -> tuple[bytes, bool, list[tuple[str, str]]]:
        body = b""
        try:
            while True:
                size = (await self.until(b"\r\n"))[:-2]
                if not re.fullmatch(rb"[0-9a-f]+", size):
                    raise BadAnswer(f"chunk size {size!r}")
                if int(size, 16) == 0:
                    break
                body += await self.exactly(int(size, 16))
                if await self.exactly(2) != b"\r\n":
                    raise BadAnswer("a chunk longer than its size")
            trailers = []
            while line := (await self.until(b"\r\n"))[:-2]:
                name, _, value = line.decode("latin-1").partition(": ")
                trailers.append((name, value))
            return body, True, trailers
        except Ended as end:
            return body + end.rest, False, []
