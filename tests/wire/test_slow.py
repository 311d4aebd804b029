"""Heads that are too large, and clients that are too slow to send, to read, or to leave."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Ended, chat, request
from tests.support.until import until
from tests.wire.running import House, in_house, kept, on_uvloop, serving

POST = request(body=chat())
LIMIT = 64 << 10


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, head_timeout=0.3, body_timeout=0.3) as house:
        yield house


def of_size(size: int, kind: str) -> bytes:
    """A head with about that many bytes that count towards the limit."""
    if kind == "one field":
        return request("GET", "/v1/models/lab", headers=(("A", "x" * (size - 60)),))
    if kind == "the target":
        return request("GET", "/v1/models/lab?" + "x" * (size - 60))
    return request("GET", "/v1/models/lab", headers=(("A", "b"),) * ((size - 60) // 6))


@pytest.mark.parametrize("piece", [1 << 20, 1000])
@pytest.mark.parametrize("kind", ["one field", "many fields", "the target"])
@in_house
async def test_a_head_over_64_kib_is_431_and_one_below_passes(house: House, kind: str, piece: int) -> None:
    for size, status in ((LIMIT - 2000, 200), (LIMIT + 2000, 431)):
        client = await house.client()
        data = of_size(size, kind)
        for start in range(0, len(data), piece):
            await client.send(data[start : start + piece])
        answer = await client.answer("GET")
        assert (answer.status, answer.is_last) == (status, status == 431)
        if status == 431:
            assert answer.error["code"] == "head_too_large"
            assert await client.is_ended()


@in_house
async def test_a_head_without_end_is_431_long_before_its_end(house: House) -> None:
    client = await house.client()
    sent = 0
    try:
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: wire.test\r\nA: ")
        while sent < 8 << 20:
            await client.send(b"x" * 65536)
            sent += 65536
    except ConnectionError:
        pass
    client.received = b""
    assert sent <= 8 << 20
    assert house.replicas[0].seen.requests == []
    assert (await house.logged(1))[0]["status"] == 431


@pytest.mark.parametrize(
    "sent", [b"P", POST[:30], POST[: POST.index(b"\r\n\r\n") + 3]], ids=["a byte", "a part", "nearly all"]
)
@in_house
async def test_a_head_that_is_not_whole_in_time_is_408(house: House, sent: bytes) -> None:
    client = await house.client()
    await client.send(sent)
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.is_last) == (408, "request_timeout", True)
    assert "head" in answer.error["message"]
    assert await client.is_ended()
    assert (await house.logged(1))[0]["status"] == 408


@in_house
async def test_a_head_that_drips_is_408_all_the_same(house: House) -> None:
    client = await house.client()
    began = asyncio.get_running_loop().time()

    async def drip() -> None:
        for position in range(len(POST)):
            await client.send(POST[position : position + 1])
            await asyncio.sleep(0.05)

    dripping = asyncio.ensure_future(drip())
    assert (await client.answer()).status == 408
    assert asyncio.get_running_loop().time() - began < 1.5
    dripping.cancel()


@pytest.mark.parametrize("headers", [("Content-Length", "100"), ("Transfer-Encoding", "chunked")], ids=lambda h: h[0])
@in_house
async def test_a_body_that_falls_silent_is_408(house: House, headers: tuple[str, str]) -> None:
    client = await house.client()
    await client.send(request(headers=(headers,)) + b"5\r\nhello\r\n")
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.is_last) == (408, "request_timeout", True)
    assert "body" in answer.error["message"]
    assert house.replicas[0].seen.requests == []


@in_house
async def test_a_slow_body_that_keeps_coming_is_waited_for(house: House) -> None:
    body = chat()
    client = await house.client()
    await client.send(request(headers=(("Content-Length", str(len(body))),)))
    for start in range(0, len(body), 8):
        await asyncio.sleep(0.12)
        await client.send(body[start : start + 8])
    assert (await client.answer()).status == 200


@in_house
async def test_a_slow_head_behind_a_long_answer_is_408_after_it(house: House) -> None:
    house.replicas[0].next(1, head_delay=0.8)
    client = await house.client()
    await client.send(POST + POST[:30])
    assert (await client.answer()).status == 200
    assert (await client.answer()).status == 408


@on_uvloop
async def test_a_client_that_takes_nothing_is_cut_after_send_timeout() -> None:
    async with LabReplica(body_mib=64) as a, serving(a, send_timeout=0.6) as house:
        client = await house.client(receive_buffer=4096)
        await client.send(POST)
        await until(lambda: any(upstream.is_paused for upstream in house.balancer.destination.pool.busy), "held back")
        began = asyncio.get_running_loop().time()
        await house.at_rest()
        assert 0.3 < asyncio.get_running_loop().time() - began < 2
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")
        assert (await house.logged(1))[0]["status"] == 499
        assert house.member("a").failures_total == 0


@on_uvloop
async def test_slow_but_steady_client() -> None:
    """A slow client that reads a little now and then is not cut."""
    async with LabReplica(body_mib=16) as a, serving(a, send_timeout=0.4) as house:
        client = await house.client(receive_buffer=65536)
        await client.send(POST)
        loop = asyncio.get_running_loop()
        began, size = loop.time(), 0
        while loop.time() - began < 1.3:
            assert await client.more()
            size += len(client.received)
            client.received = b""
            await asyncio.sleep(0.02)
        assert house.balancer.destination.pool.busy, "held back all the time"
        while size < 16 << 20:
            assert await client.more()
            size += len(client.received)
            client.received = b""


@pytest.mark.parametrize("fields", [(), (("Connection", "close"),)], ids=["kept", "closing"])
@on_uvloop
async def test_a_client_that_leaves_its_answer_lying_is_cut_too(fields: tuple[tuple[str, str], ...]) -> None:
    """The answer is finished, and too short to pause its upstream: the connection must still be closed in time."""
    async with LabReplica() as a, serving(a, send_timeout=0.3, keep_alive_timeout=0.2) as house:
        a.next(1, body_mib=64.0)
        probing = await house.client(receive_buffer=4096)
        await probing.send(POST)
        await until(lambda: any(upstream.is_paused for upstream in house.balancer.destination.pool.busy), "held back")
        probing.leave("reset")
        taken = (await house.logged(1))[0]["bytes_out"] - (200 << 10)
        a.next(1, body_mib=taken / (1 << 20))
        client = await house.client(receive_buffer=4096)
        await client.send(request(body=chat(), headers=fields))
        await house.at_rest()
        await until(lambda: not house.balancer.doors.connections, "cut", 3)


@in_house
async def test_who_is_refused_has_two_seconds_to_read_why(house: House) -> None:
    client = await house.client()
    await client.send(b"nonsense\r\n\r\n")
    began = asyncio.get_running_loop().time()
    with pytest.raises((ConnectionError, Ended)):  # noqa: PT012 - it sends until it is cut
        while True:
            await client.send(b"x" * 1000)
            await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() - began < 4
    assert asyncio.get_running_loop().time() - began > 1.5


@pytest.mark.parametrize("is_sent", [True, False], ids=["sent then", "not even then"])
@in_house
async def test_body_after_100_continue(house: House, is_sent: bool) -> None:
    """The time for a body that waits for 100 Continue starts with that answer.

    Behind a slow answer 100 Continue comes late, which is not the client's fault.
    """
    house.replicas[0].next(1, head_delay=1.0)
    body = chat()
    client = await house.client()
    expecting = (("Expect", "100-continue"), ("Content-Length", str(len(body))))
    await client.send(POST + request(headers=expecting))
    assert (await client.answer()).status == 200
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    if is_sent:
        await client.send(body)
    assert (await client.answer()).status == (200 if is_sent else 408)
