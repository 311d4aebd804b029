"""One request and the writing of its response, framed as a test wants it."""

import hashlib
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

from tests.lab.head import Head
from tests.lab.knobs import Framing
from tests.lab.seen import Seen, SeenRequest

if TYPE_CHECKING:
    from tests.lab.http1 import Connection

BODY_KEPT = 1 << 20


def standard_headers(content_type: str) -> list[tuple[str, str]]:
    """The headers that SGLang sends with every answer."""
    ordinary = [("date", formatdate(usegmt=True)), ("server", "uvicorn")]
    return ordinary + ([("content-type", content_type)] if content_type else []) + [("vary", "Origin")]


class Exchange:
    """One request and the writing of its response."""

    def __init__(self, connection: "Connection", head: Head, seen: Seen) -> None:
        self.connection = connection
        self.head = head
        self.body = b""
        self.keeps_alive = head.keep_alive
        self.record = SeenRequest(
            number=len(seen.requests) + 1,
            connection=connection.number,
            method=head.method,
            target=head.target,
            version=head.version,
            headers=head.headers,
            body_chunked=head.chunked,
            received_at=seen.now(),
        )
        connection.request = self.record
        self._chunked = False
        self._written = 0

    async def read_body(self) -> None:
        pieces: list[bytes] = []
        digest = hashlib.sha256()

        def keep(data: bytes) -> None:
            pieces.append(data)
            digest.update(data)
            self.record.body_length += len(data)

        if self.head.expects_continue and self.record.status is None:
            await self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await self.connection.read_body(self.head, keep)
        self.body = b"".join(pieces)
        self.record.body = self.body[:BODY_KEPT]
        self.record.body_sha256 = digest.hexdigest()
        self.record.body_whole = True

    def head_bytes(
        self,
        status: int,
        headers: list[tuple[str, str]],
        framing: Framing,
        length: int | None,
    ) -> bytes:
        """The response head. `length` is the body's, or None if it is unknown until the body ends."""
        if framing == "auto":
            framing = "chunked" if length is None else "content-length"
        if framing == "chunked" and self.head.version == "HTTP/1.0":
            framing = "close"  # HTTP/1.0 has no chunks
        old = framing.startswith("http/1.0")
        lines = [f"HTTP/1.{0 if old else 1} {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers]
        bodiless = status in (204, 304)
        if framing in ("content-length", "http/1.0+length"):
            if length is None:
                raise ValueError(f"framing {framing} wants a body whose length is known")
            if not bodiless:
                lines.append(f"content-length: {length}")
        elif framing == "chunked" and not bodiless:
            lines.append("transfer-encoding: chunked")
        self._chunked = framing == "chunked" and not bodiless and self.head.method != "HEAD"
        if (framing in ("close", "http/1.0") and not bodiless and self.head.method != "HEAD") or old:
            self.keeps_alive = False
        if not self.keeps_alive and not old:
            lines.append("connection: close")
        self.record.status = status
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    async def write(self, data: bytes) -> None:
        self._written += len(data)
        self.record.bytes_sent = self._written - self.connection.write(data)
        await self.connection.writable()

    async def finish(self) -> None:
        """Ends the body."""
        if self._chunked:
            await self.write(b"0\r\n\r\n")
        self.record.bytes_sent = self._written
        self.connection.end("answered")

    async def reply(self, status: int, content_type: str, body: bytes) -> None:
        """A whole answer without any faults."""
        await self.write(self.head_bytes(status, standard_headers(content_type), "auto", len(body)))
        if body and self.head.method != "HEAD":
            await self.write(body)
        await self.finish()
