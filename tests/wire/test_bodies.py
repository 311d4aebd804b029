"""Request bodies: relayed byte for byte in either framing, refused by size, and 100-continue."""

import asyncio
import hashlib
import random
import sys
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Client, chat, chunks, request
from tests.support.until import until
from tests.wire.running import House, in_house, kept, on_uvloop, serving

MIB = 1 << 20
CHUNKED = (("Transfer-Encoding", "chunked"),)
POST = request(body=chat())


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as house:
        yield house


def upload(size: int, path: str = "/v1/images/edits", *headers: tuple[str, str]) -> bytes:
    return request("POST", path, headers=(("Content-Length", str(size)), *headers))


@pytest.mark.parametrize("size", [0, 1, 65_536, MIB])
@pytest.mark.parametrize("framing", ["length", "one chunk", "many chunks", "tiny chunks"])
@in_house
async def test_a_body_arrives_byte_for_byte(house: House, framing: str, size: int) -> None:
    if framing == "tiny chunks":
        size //= 64
    body = random.Random(size).randbytes(size)
    piece = {"one chunk": size or 1, "many chunks": 1000, "tiny chunks": 1}.get(framing, 1)
    if framing == "length":
        data = request("PUT", "/v1/models/x", body)
    else:
        data = request("PUT", "/v1/models/x", headers=CHUNKED)
        data += chunks(*(body[start : start + piece] for start in range(0, size, piece)))
    answer = await house.ask(data)
    assert (answer.status, answer.body) == (200, body)
    seen = house.replicas[0].seen.last
    assert seen.body_sha256 == hashlib.sha256(body).hexdigest()
    assert seen.headers_named("content-length") == [str(size)]
    assert seen.headers_named("transfer-encoding") == [], "whole before it is sent, so its length is known"


@in_house
async def test_extensions_and_trailers_of_a_chunked_body_are_dropped(house: House) -> None:
    body = b'5;name="v;x"\r\nhello\r\n0;last\r\nX-Trailer: 1\r\nHost: evil\r\n\r\n'
    client = await house.client()
    await client.send(request(path="/v1/images/edits", headers=CHUNKED) + body + POST)
    assert (await client.answer()).body == b"hello"
    assert (await client.answer()).status == 200
    first = house.replicas[0].seen.requests[0]
    assert first.header("x-trailer") is None
    assert first.headers_named("host") == [house.replicas[0].url.removeprefix("http://")]


@in_house
async def test_a_request_without_a_body_gets_no_length(house: House) -> None:
    assert (await house.ask(request("GET", "/v1/models/lab"), "GET")).status == 200
    assert house.replicas[0].seen.last.header("content-length") is None
    assert (await house.ask(request("DELETE", "/v1/models/x"))).status == 200
    assert (await house.ask(request("GET", "/v1/models/x", b"a body"), "GET")).body == b"a body"


@on_uvloop
async def test_bodies_of_64_mib_pass() -> None:
    body = random.Random(64).randbytes(MIB) * 64
    async with LabReplica() as a, serving(a) as house:
        for data in (upload(len(body)) + body, request(path="/v1/images/edits", headers=CHUNKED) + chunks(body)):
            client = await house.client()
            sending = asyncio.ensure_future(client.send(data))
            status, headers = await client.head()
            assert (status, dict(headers)["Content-Length"]) == (200, str(len(body)))
            digest, size = hashlib.sha256(client.received), len(client.received)
            while size < len(body):
                client.received = b""
                digest.update(await client.more())
                size += len(client.received)
            assert digest.digest() == hashlib.sha256(body).digest()
            assert a.seen.last.body_sha256 == digest.hexdigest()
            await sending
            client.leave()


# Too large


@in_house
async def test_a_length_over_the_limit_is_413_before_the_body_comes(house: House) -> None:
    client = await house.client()
    await client.send(upload(MIB + 1))
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.is_last) == (413, "body_too_large", True)
    assert str(MIB) in answer.error["message"]
    assert house.replicas[0].seen.requests == []


@in_house
async def test_chunks_over_the_limit(house: House) -> None:
    """Chunks over the limit get a 413, which a client that is still sending can read."""
    client = await house.client()
    await client.send(
        request(path="/v1/images/edits", headers=CHUNKED)
        + b"".join(b"10000\r\n" + b"x" * 65536 + b"\r\n" for _ in range(32))
    )
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.is_last) == (413, "body_too_large", True)
    assert await client.is_ended()
    assert house.replicas[0].seen.requests == []
    assert house.balancer.doors.buffered == 0


@in_house
async def test_bodies_over_the_common_limit(house: House) -> None:
    """Bodies that together exceed the limit get a 503 with Retry-After."""
    holders = [await house.client() for _ in range(8)]
    for client in holders:
        await client.send(upload(MIB) + b"x" * (MIB - 1))
    await until(lambda: house.balancer.doors.buffered == 8 * (MIB - 1))
    answer = await house.ask(request(path="/v1/images/edits", body=b"x" * MIB))
    assert (answer.status, answer.error["code"], answer.is_last) == (503, "buffers_full", True)
    assert answer.header("retry-after") == "1"
    for client in holders:
        client.leave("reset")
    await until(lambda: house.balancer.doors.buffered == 0)
    assert (await house.ask(POST)).status == 200


@in_house
async def test_body_in_tiny_chunks(house: House) -> None:
    """A body in tiny chunks takes little more memory than its size.

    Nor are millions of pieces written to the connection to the replica, which uvloop would close.
    """
    client = await house.client()
    count = MIB // 4
    await client.send(request(path="/v1/images/edits", headers=CHUNKED) + b"2\r\nxx\r\n" * count)
    await until(lambda: house.balancer.doors.buffered == 2 * count)
    (connection,) = house.balancer.doors.connections
    assert connection._reading is not None
    assert sum(map(sys.getsizeof, connection._reading.body)) < 2.1 * count
    await client.send(b"0\r\n\r\n")
    assert (await client.answer()).body == b"xx" * count


ENDLESS = {
    "a trailer": b"0\r\nX-Trailer: " + b"x" * 200_000,
    "many trailers": b"0\r\n" + b"X-Trailer: 1\r\n" * 20_000,
    "a chunk's extension": b"5;" + b"x" * 200_000,
    "zeros of a chunk's size": b"0" * 200_000,
}


@pytest.mark.parametrize("endless", ENDLESS.values(), ids=ENDLESS)
@in_house
async def test_what_is_neither_head_nor_body_has_an_end(house: House, endless: bytes) -> None:
    client = await house.client()
    await client.send(request(path="/v1/images/edits", headers=CHUNKED) + b"5\r\nhello\r\n" + endless)
    answer = await client.answer()
    assert answer.status in (400, 431)
    assert answer.is_last
    assert house.replicas[0].seen.requests == []


@pytest.mark.parametrize("goes_on", [False, True], ids=["once answered", "while the stream may go on elsewhere"])
@on_uvloop
async def test_a_body_is_held_until_it_is_not_needed(goes_on: bool) -> None:
    """A stream may take minutes; its body, with images, is needed only if another replica may continue it."""
    async with LabReplica(head_delay=0.2, token_interval=0.01) as a, serving(a, continue_broken=goes_on) as house:
        client = await house.client()
        await client.send(request(body=chat(tokens=100_000, stream=True, images="x" * (MIB - 1000))))
        await a.seen.until(lambda seen: seen.generations_started == 1)
        assert house.balancer.doors.buffered > MIB - 1000, "it might have to be sent to another"
        await client.until(b"t00")
        assert (house.balancer.doors.buffered > MIB - 1000) is goes_on
        assert (house.balancer.doors.buffered == 0) is not goes_on
        client.leave()
        assert (await house.logged(1))[0]["bytes_in"] > MIB - 1000
        await until(lambda: house.balancer.doors.buffered == 0)


# Expect: 100-continue

EXPECT = ("Expect", "100-continue")


async def is_silent(client: Client) -> bool:
    """Did nothing arrive in the time in which an answer would have?"""
    try:
        async with asyncio.timeout(0.1):
            await client.more()
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("headers", [("Content-Length", "5"), ("Transfer-Encoding", "chunked")], ids=lambda h: h[0])
@in_house
async def test_a_client_that_waits_to_be_asked_is_asked(house: House, headers: tuple[str, str]) -> None:
    client = await house.client()
    await client.send(request(path="/v1/images/edits", headers=(headers, EXPECT)))
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(b"hello" if headers[1] == "5" else chunks(b"hello"))
    answer = await client.answer()
    assert (answer.status, answer.body, answer.interim) == (200, b"hello", ())
    assert house.replicas[0].seen.last.header("expect") is None, "answered here"


@pytest.mark.parametrize(("data", "status"), [
    (upload(MIB + 1, "/v1/images/edits", EXPECT), 413), (upload(5, "/flush_cache", EXPECT), 404),
    (request("TRACE", "/v1/images/edits", headers=(("Content-Length", "5"), EXPECT)), 405),
])  # fmt: skip
@in_house
async def test_a_client_that_waits_is_refused_without_its_body(house: House, data: bytes, status: int) -> None:
    client = await house.client()
    await client.send(data)
    answer = await client.answer()
    assert (answer.status, answer.interim, answer.is_last) == (status, (), True)
    assert await client.is_ended()


@in_house
async def test_a_client_that_waits_in_a_pipeline_is_asked_in_its_turn(house: House) -> None:
    a = house.replicas[0]
    a.next(1, head_delay=0.2)
    client = await house.client()
    await client.send(POST + upload(5, "/v1/images/edits", EXPECT))
    first = await client.answer()
    assert (first.status, first.interim) == (200, ())
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(b"hello" + POST)
    assert (await client.answer()).body == b"hello"
    assert (await client.answer()).status == 200


@in_house
async def test_a_client_that_does_not_wait_to_be_asked_is_served(house: House) -> None:
    client = await house.client()
    await client.send(POST + upload(5, "/v1/images/edits", EXPECT) + b"hello" + POST)
    assert [(await client.answer()).status for _ in range(3)] == [200, 200, 200]


@in_house
async def test_an_http_1_0_client_is_not_asked(house: House) -> None:
    client = await house.client()
    await client.send(request(path="/v1/images/edits", headers=(("Content-Length", "5"), EXPECT), version="1.0"))
    assert await is_silent(client)
    await client.send(b"hello")
    assert (await client.answer()).body == b"hello"


@in_house
async def test_another_expectation_is_no_reason_to_refuse(house: House) -> None:
    client = await house.client()
    await client.send(request("POST", "/v1/images/edits", b"hello", (("Expect", "a miracle"),)))
    answer = await client.answer()
    assert (answer.body, answer.interim) == (b"hello", ())
