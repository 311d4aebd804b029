"""The lab's own HTTP/1.1 server side: strict reading, and writing where every byte can go wrong."""

import asyncio
import hashlib
import re
import socket
import struct
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

from tests.lab.knobs import Framing, Knobs
from tests.lab.seen import Outcome, Seen, SeenRequest

BODY_KEPT = 1 << 20
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class ClientLeft(Exception):
    """The peer closed its connection while its request was open."""


class Cut(Exception):
    """The connection was ended on purpose."""


class Malformed(Exception):
    """What came is no HTTP/1.1 request."""


@dataclass(frozen=True, slots=True)
class Head:
    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    length: int
    chunked: bool
    keep_alive: bool
    expects_continue: bool


def parse_head(data: bytes) -> Head:
    """A request head without its empty line. Raises Malformed with what is wrong."""
    first, *lines = data.split(b"\r\n")
    parts = first.split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Malformed(f"request line {first!r}")
    headers: list[tuple[str, str]] = []
    lengths: set[str] = set()
    codings: list[str] = []
    hosts = 0
    options = ""
    expects_continue = False
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or b"\n" in value or b"\r" in value or b"\0" in value:
            raise Malformed(f"header line {line!r}")
        text = value.strip(b" \t").decode("latin-1")
        headers.append((name.decode("ascii"), text))
        match name.lower():
            case b"content-length":
                lengths.add(text)
            case b"transfer-encoding":
                codings.append(text.lower())
            case b"host":
                hosts += 1
            case b"connection":
                options += "," + text.lower()
            case b"expect":
                expects_continue = text.lower() == "100-continue"
    version = parts[2].decode()
    if version == "HTTP/1.1" and hosts != 1:
        raise Malformed(f"{hosts} Host headers")
    if codings and (lengths or codings != ["chunked"]):
        raise Malformed(f"Transfer-Encoding {codings} with Content-Length {sorted(lengths)}")
    if len(lengths) > 1 or not all(length.isascii() and length.isdigit() for length in lengths):
        raise Malformed(f"Content-Length {sorted(lengths)}")
    said = {option.strip() for option in options.split(",")}
    keep_alive = "close" not in said if version == "HTTP/1.1" else "keep-alive" in said
    return Head(
        method=parts[0].decode(),
        target=parts[1].decode("latin-1"),
        version=version,
        headers=headers,
        length=int(lengths.pop()) if lengths else 0,
        chunked=bool(codings),
        keep_alive=keep_alive,
        expects_continue=expects_continue,
    )


class Connection(asyncio.Protocol):
    """One accepted connection. Its requests are answered one after another by `answer`."""

    def __init__(
        self,
        seen: Seen,
        knobs: Callable[[], Knobs],
        answer: "Answer",
        connections: set["Connection"],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        self._seen = seen
        self._knobs = knobs
        self._answer = answer
        self._open = connections
        self._tasks = tasks
        self._buffer = bytearray()
        self._eof = False
        self._more: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.served = 0
        self.request: SeenRequest | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=65536)
        self._seen.connections_accepted += 1
        self._seen.connections_open += 1
        self.number = self._seen.connections_accepted
        self._open.add(self)
        if self._knobs().black_hole:
            self.transport.pause_reading()
        self.task = asyncio.get_running_loop().create_task(self._serve())
        self._tasks.add(self.task)
        self.task.add_done_callback(self._tasks.discard)
        self._seen.changed()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._wake()

    def connection_lost(self, _: Exception | None) -> None:
        self._eof = True
        self._open.discard(self)
        self._seen.connections_open -= 1
        if self.request is not None and self.request.outcome == "open":
            self.end("client_left")
            self.task.cancel()
        self._wake()
        self.resume_writing()
        self._seen.changed()

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def _wait(self) -> None:
        if self._eof:
            raise ClientLeft
        self._more = asyncio.get_running_loop().create_future()
        await self._more

    async def _serve(self) -> None:
        try:
            while await self._next_request():
                pass
        except (ClientLeft, Cut):
            pass
        except Malformed as error:
            self._seen.malformed.append(str(error))
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        except Exception:
            self._seen.crashes.append(traceback.format_exc())
        finally:
            self.transport.close()
            self._seen.changed()

    async def _next_request(self) -> bool:
        if not self._buffer:
            # Only an idle connection is closed: once a byte has come, the request is waited for.
            try:
                async with asyncio.timeout(self._knobs().keep_alive if self.served else None):
                    await self._wait()
            except TimeoutError:
                return False
        head = await self._read_head()
        exchange = Exchange(self, head, self._seen)
        await self._answer(exchange)
        self.served += 1
        return exchange.keeps_alive and not self.transport.is_closing()

    async def _read_head(self) -> Head:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._wait()
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        return parse_head(head)

    async def _take(self, count: int) -> bytes:
        """1 to `count` bytes."""
        while not self._buffer:
            await self._wait()
        data = bytes(self._buffer[:count])
        del self._buffer[: len(data)]
        return data

    async def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            await self._wait()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    async def read_body(self, head: Head, keep: Callable[[bytes], None]) -> None:
        """Hand the request's body to `keep`, piece by piece, without its framing."""
        if not head.chunked:
            left = head.length
            while left:
                data = await self._take(left)
                left -= len(data)
                keep(data)
            return
        while True:
            size = await self._line()
            if not re.fullmatch(rb"[0-9A-Fa-f]+(;.*)?", size):
                raise Malformed(f"chunk size {size!r}")
            left = int(size.partition(b";")[0], 16)
            if left == 0:
                break
            while left:
                data = await self._take(left)
                left -= len(data)
                keep(data)
            if await self._line() != b"":
                raise Malformed("a chunk longer than its size")
        while await self._line():
            pass

    def write(self, data: bytes) -> int:
        """Hand bytes over. Returns how many bytes the kernel has not taken yet."""
        if self.transport.is_closing():
            raise ClientLeft
        self.transport.write(data)
        return self.transport.get_write_buffer_size()

    async def writable(self) -> None:
        if self._writable is not None:
            await self._writable

    def end(self, outcome: Outcome) -> None:
        request = self.request
        if request is not None and request.outcome == "open":
            request.outcome = outcome
            request.ended_at = self._seen.now()
            if outcome == "client_left":
                request.client_left_after = request.ended_at - request.received_at
            self._seen.changed()

    def stop_reading(self) -> None:
        self.transport.pause_reading()

    def cut(self, how: str) -> None:
        """End the connection: a reset, or a plain close after what was written."""
        self.end("cut")
        if how == "reset":
            self.reset()
        else:
            self.transport.close()
        raise Cut

    def reset(self) -> None:
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Exchange:
    """One request and the writing of its response."""

    def __init__(self, connection: Connection, head: Head, seen: Seen) -> None:
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
        """The response head. `length` is the body's, or None when it is not known before its end."""
        if framing == "auto":
            framing = "chunked" if length is None else "content-length"
        if framing == "chunked" and self.head.version == "HTTP/1.0":
            framing = "close"  # HTTP/1.0 knows no chunks
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
        """The end of the body."""
        if self._chunked:
            await self.write(b"0\r\n\r\n")
        self.record.bytes_sent = self._written
        self.connection.end("answered")


Answer = Callable[[Exchange], Awaitable[None]]
