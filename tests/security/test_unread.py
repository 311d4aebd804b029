"""Clients that send and never read: they take little memory, and are cut after send_timeout, whatever they send on."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.replica import LabReplica
from tests.security.certificates import Authority
from tests.support.client import Client, request
from tests.support.until import until
from tests.wire.fuzz import WITH_UNREAD, fuzz, unread
from tests.wire.process import running
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

MIB = 1 << 20
KEY = "sk-0123456789"
GOOD = (("Authorization", f"Bearer {KEY}"),)

ANSWERED = {
    "404": request("GET", "/x", headers=GOOD),
    "401": request("GET", "/v1/models"),
    "health": request("GET", "/health"),
    "relayed": request("GET", "/v1/models/lab", headers=GOOD),
}


async def push(client: Client, data: bytes, most: int) -> int:
    """Sends that again and again until nothing more is taken for a second, or `most` bytes are; how many were."""
    loop, sent, stuck_since = asyncio.get_running_loop(), 0, 0.0
    batch = data * (1 + (64 << 10) // len(data))
    while sent < most:
        try:
            sent += client.sock.send(batch[sent % len(data) :])
            stuck_since = 0.0
        except BlockingIOError:
            stuck_since = stuck_since or loop.time()
            if loop.time() - stuck_since > 1:
                break
        await asyncio.sleep(0.001)
    return sent


@pytest.mark.parametrize("one", **each(ANSWERED))
@on_uvloop
async def test_what_is_never_read_takes_no_memory(one: bytes, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY + "\n")
    async with LabReplica() as lab, running(lab.url, arguments=("--api-keys", str(tmp_path / "keys"))) as balancer:
        warm = await balancer.client()
        for _ in range(2):
            warming = asyncio.ensure_future(warm.send(one * 2000))
            for _ in range(2000):
                await warm.answer()
            await warming
        before = balancer.memory
        client = await balancer.client(receive_buffer=4096)
        sent = await push(client, one, 64 * MIB)
        assert MIB // 2 < sent < 32 * MIB, "what kernels hold on the way, and no more"
        assert balancer.memory - before < 12 * MIB
        await warm.send(request("GET", "/health"))
        assert (await warm.answer("GET")).status == 200


SENDING_ON: dict[str, tuple[bytes, int, float]] = {
    # one request, how many at once, and the pause between two of the next ones
    "many at once, then silence": (ANSWERED["404"], 30_000, 100.0),
    "many at once, then a few": (ANSWERED["404"], 30_000, 0.1),
    "large answers, slowly": (request("GET", "/" + "x" * 60_000), 1, 0.01),
    "half a request, and the rest bit by bit": (ANSWERED["404"], 30_000, -0.05),
}


@pytest.mark.parametrize("row", **each(SENDING_ON))
@on_uvloop
async def test_client_that_never_reads_is_cut(row: tuple[bytes, int, float]) -> None:
    """A client that never reads is cut after send_timeout, whatever it sends meanwhile."""
    one, count, pause = row
    async with LabReplica() as lab, serving(lab, send_timeout=1.0) as house:
        client = await house.client(receive_buffer=4096)
        sending = asyncio.ensure_future(_drip(client, one, count, pause))
        await until(lambda: any(c._is_blocked for c in house.balancer.doors.connections), "held back", 20)
        began = time.monotonic()
        await until(lambda: not house.balancer.doors.connections, "cut", 5)
        assert 0.5 < time.monotonic() - began < 3
        sending.cancel()


async def _drip(client: Client, one: bytes, count: int, pause: float) -> None:
    with contextlib.suppress(ConnectionError):
        await client.send(one * count)
        while True:
            await asyncio.sleep(abs(pause))
            if pause > 0:
                await client.send(one)
            else:
                for position in range(len(one)):
                    await client.send(one[position : position + 1])
                    await asyncio.sleep(-pause)


@pytest.mark.parametrize("pause", [100.0, 0.01], ids=["then silence", "then a few"])
@on_uvloop
async def test_through_tls_it_is_the_same(pause: float, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("localhost", "DNS:localhost", "IP:127.0.0.1")
    config: dict[str, Any] = {"tls_cert": pair.cert, "tls_key": pair.key}
    async with LabReplica() as lab, serving(lab, config=config, send_timeout=1.0) as house:
        doors = house.balancer.doors
        is_over = asyncio.Event()
        sending = asyncio.ensure_future(asyncio.to_thread(_push_through_tls, house.url, authority, pause, is_over))
        await until(lambda: any(c._is_blocked for c in doors.connections), "held back", 20)
        (connection,) = doors.connections
        began, most = time.monotonic(), 0
        while doors.connections:
            most = max(most, connection._transport.get_write_buffer_size() + len(connection._queue) * 200)
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < 4
        assert most < MIB // 2
        is_over.set()
        await sending


def _push_through_tls(url: str, authority: Authority, pause: float, is_over: asyncio.Event) -> None:
    host, port = url.removeprefix("https://").split(":")
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect((host, int(port)))
    context = ssl.create_default_context(cafile=authority.pair.cert)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as secure, contextlib.suppress(OSError):
        secure.settimeout(0.1)
        count, until_then = 0, time.monotonic() + 10
        while not is_over.is_set() and time.monotonic() < until_then:
            with contextlib.suppress(TimeoutError):
                if count < 30_000 or pause < 1:
                    secure.sendall(ANSWERED["404"] * (500 if count < 30_000 else 1))
            count += 500
            if count > 30_000:
                time.sleep(min(pause, 0.1))


@on_uvloop
async def test_whatever_is_said_over_and_over_by_who_never_reads() -> None:
    """`make fuzz` goes on with other requests."""
    async with LabReplica() as lab, serving(lab, **WITH_UNREAD) as house:
        await fuzz(house, unread, [0])


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, send_timeout=1.0) as house:
        yield house


@pytest.mark.parametrize("one", [ANSWERED["404"], request("GET", "/v1/models/lab")], ids=["refused", "relayed"])
@in_house
async def test_who_reads_after_a_while_gets_every_answer_in_order(house: House, one: bytes) -> None:
    client = await house.client(receive_buffer=4096)
    count = 8000
    numbered = [one[:-2] + b"X-Request-Id: n%d\r\n\r\n" % number for number in range(count)]
    sending = asyncio.ensure_future(client.send(b"".join(numbered)))
    await asyncio.sleep(0.5)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    for number in range(count):
        assert (await client.answer("GET")).header("x-request-id") == f"n{number}"
    await sending
