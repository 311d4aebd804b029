"""The connections of a lab replica: its own HTTP/1.1 server side, where every byte can go wrong."""

import asyncio
import re
import socket
import struct
import traceback
from collections.abc import Awaitable, Callable
from typing import cast

from tests.lab.exchange import Exchange
from tests.lab.head import Head, Malformed, parse_head
from tests.lab.knobs import Knobs
from tests.lab.seen import Outcome, Seen, SeenRequest

Answer = Callable[[Exchange], Awaitable[None]]
ESTABLISHED = 1  # of the states of a TCP socket in linux/tcp_states.h, tcp_info's first byte


class ClientLeft(Exception):
    """The peer closed its connection while its request was open."""


class Cut(Exception):
    """The connection was ended on purpose."""


class Connection(asyncio.Protocol):
    """One accepted connection. Its requests are answered one after another by `answer`."""

    def __init__(
        self,
        seen: Seen,
        knobs: Callable[[], Knobs],
        answer: Answer,
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
        self._deaf = self._knobs().black_hole
        if self._deaf:
            # Not at once: uvloop begins to read only after this call.
            asyncio.get_running_loop().call_soon(self.stop_reading)
        self.task = asyncio.get_running_loop().create_task(self._serve())
        self._tasks.add(self.task)
        self.task.add_done_callback(self._tasks.discard)
        self._seen.changed()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
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
            # Only an idle connection times out: once a byte has come, we wait for the whole request.
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

    async def take(self, count: int) -> bytes:
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
                data = await self.take(left)
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
                data = await self.take(left)
                left -= len(data)
                keep(data)
            if await self._line() != b"":
                raise Malformed("a chunk longer than its size")
        while await self._line():
            pass

    def write(self, data: bytes) -> int:
        """Write bytes. Returns how many bytes the kernel has not taken yet."""
        if self.transport.is_closing():
            raise ClientLeft
        self.transport.write(data)
        return self.transport.get_write_buffer_size()

    async def writable(self) -> None:
        if self._writable is not None:
            await self._writable

    @property
    def is_open(self) -> bool:
        """Has neither end closed it, as far as this kernel knows?"""
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is None or self.transport.is_closing():
            return False
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED

    def end(self, outcome: Outcome) -> None:
        request = self.request
        if request is not None and request.outcome == "open":
            request.outcome = outcome
            request.ended_at = self._seen.now()
            if outcome == "client_left":
                request.client_left_after = request.ended_at - request.received_at
            self._seen.changed()

    def stop_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def race(self) -> None:
        """End the connection as if its last request had come too late to be read: a reset that acknowledges nothing."""
        self.end("raced")
        self.reset(is_read=False)
        raise Cut

    def cut(self, how: str) -> None:
        """End the connection: a reset, or a plain close after what was written."""
        self.end("cut")
        if how == "reset":
            self.reset()
        else:
            self.transport.close()
        raise Cut

    def reset(self, is_read: bool = True) -> None:
        """`is_read`: what was received is acknowledged before that."""
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            if is_read:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
