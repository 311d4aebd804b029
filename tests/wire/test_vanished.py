"""Hosts that vanish: the socket options for them, on real sockets of both sides, with and without TLS."""

import asyncio
import contextlib
import ctypes
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.relay.vanished import UNACKNOWLEDGED, expect_life, has_vanished
from tests.lab.replica import LabReplica
from tests.security.certificates import Authority
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop, serving
from tests.wire.test_continued import flowing

OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
)  # fmt: skip


SO_ATTACH_FILTER = 26  # of asm-generic/socket.h


def options(connection: Any) -> list[int]:
    sock = connection._transport.get_extra_info("socket")
    return [sock.getsockopt(*option) for option in OPTIONS]


@pytest.mark.parametrize(("send_timeout", "unacknowledged"), [(5.0, 30_000), (300.0, 300_000)])
@on_uvloop
async def test_both_sides_ask_whether_the_other_host_is_there(send_timeout: float, unacknowledged: int) -> None:
    async with LabReplica(hang="after_tokens") as a, serving(a, send_timeout=send_timeout) as house:
        client = await house.client()
        await client.send(request(body=chat(stream=True)))
        await client.until(b"t00")
        (downstream,) = house.balancer.doors.connections
        (upstream,) = house.balancer.destination.pool.busy
        assert options(downstream) == [1, 15, 5, 3, unacknowledged]
        assert options(upstream) == [1, 3, 1, 3, 30_000]


@on_uvloop
async def test_through_tls_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("localhost", "DNS:localhost", "IP:127.0.0.1")
    trusting = ssl.create_default_context(cafile=authority.pair.cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    async with LabReplica(hang="after_tokens") as a, through_tls(a, context) as url:
        config: dict[str, Any] = {"tls_cert": pair.cert, "tls_key": pair.key, "replica_ca": authority.pair.cert}
        async with serving(config={**config, "replicas": (ReplicaListing("a", url),)}, ready=1) as house:
            port = int(house.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
            writer.write(request(body=chat(stream=True)))
            await reader.readuntil(b"t00")
            (downstream,) = house.balancer.doors.connections
            (upstream,) = house.balancer.destination.pool.busy
            assert options(downstream) == [1, 15, 5, 3, 300_000]
            assert options(upstream) == [1, 3, 1, 3, 30_000]
            writer.transport.abort()
            await house.at_rest()


@contextlib.asynccontextmanager
async def through_tls(replica: LabReplica, context: ssl.SSLContext) -> Any:
    """A TLS proxy in front of the replica; yields its URL."""
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(replica.host, replica.port)
        for pair in ((reader, other_writer), (other_reader, writer)):
            task = asyncio.ensure_future(pump(*pair))
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    server = await asyncio.start_server(met, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await until(lambda: not pumps, "all passed on")


def cut_off(replica: LabReplica, upstream: Any) -> None:
    """The replica's kernel takes no packet any more on its end of a connection, as if its host had lost power."""
    port = upstream._transport.get_extra_info("sockname")[1]
    ends = [connection.transport.get_extra_info("socket") for connection in replica._connections]
    (end,) = (sock for sock in ends if sock.getpeername()[1] == port)
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # a packet filter: keep 0 bytes
    end.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(code)))


@on_uvloop
async def test_a_stream_leaves_a_host_that_is_gone() -> None:
    """Within ten seconds, and long before the kernel says so; one whose replica thinks for as long stays there."""
    async with LabReplica(hang="after_tokens") as a, LabReplica() as b, serving(a, b, ready_timeout=60) as house:
        fleet = house.balancer.service.fleet
        fleet.drain(house.member("b"))
        for _ in range(2):
            client = await house.client()
            await client.send(request(body=chat(stream=True, messages=[{"role": "user", "content": "hi"}])))
            await flowing(house, len(house.clients))
        thinking, lost = sorted(house.balancer.destination.pool.busy, key=lambda connection: connection.sent_at)
        fleet.undrain(house.member("b"))
        cut_off(a, lost)
        began = asyncio.get_running_loop().time()
        assert (await client.answer()).is_whole
        assert 8 < asyncio.get_running_loop().time() - began < 12
        assert list(house.balancer.destination.pool.busy) == [thinking]
        assert lost.lost_host
        a.fall()


def test_a_host_that_is_slow_to_read_is_there() -> None:
    with socket.socket() as listener, socket.socket() as slow:
        expect_life(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert [accepted.getsockopt(*option) for option in OPTIONS] == [1, 15, 5, 3, round(UNACKNOWLEDGED * 1000)]
            accepted.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted.send(b"x" * 65536)
            assert not has_vanished(accepted)
