"""What the replica acknowledged decides whether a request on a connection that ended was sent."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.relay.acknowledged import acknowledged, never_arrived
from balancer.relay.pool import ConnectionPool
from balancer.relay.upstream import ReplicaConnection
from balancer.spec.settings import Settings
from tests.support.until import until
from tests.wire.running import on_uvloop

HEAD = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n"
BODY = [b"abc", b"def"]


class Taker:
    """Takes an answer, and does nothing with it."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> bool:
        return True

    def on_body(self, data: bytes, now: float) -> None: ...

    def on_end(self, seconds: float) -> bool:
        return True


class Peer:
    """The replica's end of one connection: a plain socket, every call of which is over when it returns."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def read(self, count: int = len(HEAD) + 6) -> None:
        sock, loop = self.sock, asyncio.get_running_loop()
        sock.setblocking(False)
        while count > 0:
            count -= len(await loop.sock_recv(sock, count))

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class _Place:
    alive_at = 0.0

    def heard(self, at: float) -> None: ...

    def away(self, now: float) -> float:
        return 0.0


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[ReplicaConnection, Peer]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pool = ConnectionPool(Settings(), asyncio.get_running_loop())
        connection = await pool.connect(ReplicaAddress.of("a", f"http://127.0.0.1:{listener.getsockname()[1]}"))
        sock = listener.accept()[0]
        with sock:
            yield connection, Peer(sock)
        connection.close()


async def exchange(connection: ReplicaConnection, body: list[bytes] = BODY) -> Outcome:
    return await connection.exchange(_Place(), HEAD, body, False, Taker())  # type: ignore[arg-type]


async def once(connection: ReplicaConnection, peer: Peer) -> None:
    """One request that is answered."""
    first = asyncio.ensure_future(exchange(connection))
    await peer.read()
    peer.sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert await first is Outcome.ANSWERED


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("kept", [True, False])
@on_uvloop
async def test_closed_before_the_request_came(kept: bool, by: str) -> None:
    async with connected() as (connection, peer):
        if kept:
            await once(connection, peer)
        peer.reset() if by == "reset" else peer.sock.close()
        assert await exchange(connection) is Outcome.REFUSED


@pytest.mark.parametrize("by", ["close", "reset"])
@pytest.mark.parametrize("kept", [True, False])
@on_uvloop
async def test_closed_with_the_request(kept: bool, by: str) -> None:
    """However soon the replica ends the connection after that."""
    async with connected() as (connection, peer):
        if kept:
            await once(connection, peer)
        asked = asyncio.ensure_future(exchange(connection))
        await peer.read()
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        peer.reset() if by == "reset" else peer.sock.close()
        assert await asked is Outcome.LOST


@on_uvloop
async def test_closed_with_a_part_of_the_request() -> None:
    async with connected() as (connection, peer):
        await once(connection, peer)
        asked = asyncio.ensure_future(exchange(connection, [b"x" * 1_000_000] * 8))
        await peer.read(300_000)
        peer.reset()
        assert await asked is Outcome.LOST


@on_uvloop
async def test_closed_with_nothing_but_the_end_of_the_request_before() -> None:
    """A replica that answers before it has read all acknowledges the rest of that request, not this one."""
    async with connected() as (connection, peer):
        first = asyncio.ensure_future(exchange(connection))
        await asyncio.sleep(0)  # it is sent
        peer.sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert await first is Outcome.ANSWERED
        await peer.read()
        peer.sock.close()
        assert await exchange(connection) is Outcome.REFUSED


@on_uvloop
async def test_what_is_acknowledged_is_counted() -> None:
    async with connected() as (connection, peer):
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        assert acknowledged(sock) == 1, "the handshake"
        await once(connection, peer)
        await until(lambda: acknowledged(sock) == 1 + len(HEAD) + 6)


class Silent:
    """The socket of a kernel that acknowledged nothing, or that is too old to say."""

    def __init__(self, size: int) -> None:
        self._size = size

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes:
        return bytes(min(size, self._size))


@pytest.mark.parametrize(
    ("size", "error", "is_sure"),
    [
        (232, None, True),
        (232, ConnectionResetError(), True),
        (232, BrokenPipeError(), True),
        (232, TimeoutError(), False),
        (232, OSError("no route"), False),
        (104, None, False),
    ],
)
def test_only_what_the_other_side_ended_says_something(size: int, error: Exception | None, is_sure: bool) -> None:
    assert never_arrived(Silent(size), 1, error) is is_sure
