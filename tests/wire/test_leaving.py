"""A client that leaves, in each phase: the replica learns of it within 100 ms, and no replica is blamed."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.running import House, deaf, in_house, kept, on_uvloop, serving

POST = request(body=chat())
STREAM = request(body=chat(stream=True, tokens=1000))
HOW = pytest.mark.parametrize("how", ["close", "reset", "half"])


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


async def leaves_no_trace(house: House, began: float) -> None:
    """The replica saw its client leave within 100 ms of `began`; one line says 499; the member has no failure."""
    await house.replicas[0].seen.until(lambda seen: seen.last.outcome == "client_left")
    assert asyncio.get_running_loop().time() - began < 0.1
    await house.at_rest()
    line = (await house.logged(1))[0]
    assert (line["status"], line["member"], line.get("error")) == (499, "a", None)
    assert (house.member("a").failures_total, house.member("a").full_until) == (0, 0)


@HOW
@in_house
async def test_during_prefill(house: House, how: str) -> None:
    a = house.replicas[0]
    a.set(head_delay=60)
    client = await house.client()
    await client.send(POST)
    await a.seen.until(lambda seen: seen.generations_started == 1)
    began = asyncio.get_running_loop().time()
    client.leave(how)
    await leaves_no_trace(house, began)
    await a.seen.until(lambda seen: seen.generations_aborted == 1)


@HOW
@in_house
async def test_during_a_stream(house: House, how: str) -> None:
    a = house.replicas[0]
    a.set(token_interval=0.01)
    client = await house.client()
    await client.send(STREAM)
    await client.until(b"t03")
    began = asyncio.get_running_loop().time()
    client.leave(how)
    await leaves_no_trace(house, began)
    await a.seen.until(lambda seen: seen.generations_aborted == 1)
    assert a.seen.last.tokens_sent < 50


@HOW
@in_house
async def test_while_it_took_nothing_of_a_large_answer(house: House, how: str) -> None:
    """The bytes that it never read must not keep us from noticing that it has left."""
    house.replicas[0].set(body_mib=64)
    client = await house.client(receive_buffer=4096)
    await client.send(POST)
    await until(lambda: any(upstream.is_paused for upstream in house.balancer.destination.pool.busy), "held back")
    began = asyncio.get_running_loop().time()
    client.leave(how)
    await leaves_no_trace(house, began)


@HOW
@in_house
async def test_in_the_queue(house: House, how: str) -> None:
    a, member = house.replicas[0], house.member("a")
    a.set(head_delay=0.2)
    first, second = await house.client(), await house.client()
    usual, member.limit = member.limit, 1
    try:
        await first.send(POST)
        await a.seen.until(lambda seen: seen.generations_started == 1)
        await second.send(POST)
        await until(lambda: house.balancer.service.admission.queue_depth == 1)
        began = asyncio.get_running_loop().time()
        second.leave(how)
        await until(lambda: house.balancer.service.admission.queue_depth == 0)
        assert asyncio.get_running_loop().time() - began < 0.1
        assert (await first.answer()).status == 200
    finally:
        member.limit = usual
    left, answered = await house.logged(2)
    assert (left["status"], left.get("member"), left["attempts"]) == (499, None, 0)
    assert answered["status"] == 200
    assert a.seen.generations_started == 1


@on_uvloop
async def test_during_connect() -> None:
    async with LabReplica() as a, serving(a, ready_interval=60) as house:
        with deaf(a):
            client = await house.client()
            await client.send(POST)
            await until(lambda: house.member("a").in_flight == 1)
            began = asyncio.get_running_loop().time()
            client.leave()
            await house.at_rest()
            assert asyncio.get_running_loop().time() - began < 0.1
        assert (await house.logged(1))[0]["status"] == 499
        assert house.member("a").failures_total == 0


@HOW
@in_house
async def test_between_pipelined_requests(house: House, how: str) -> None:
    a = house.replicas[0]
    a.set(token_interval=0.01)
    client = await house.client()
    await client.send(POST + STREAM + POST + POST)
    await client.answer()
    await client.until(b"t03")
    began = asyncio.get_running_loop().time()
    client.leave(how)
    await a.seen.until(lambda seen: seen.last.outcome == "client_left")
    assert asyncio.get_running_loop().time() - began < 0.1
    await house.at_rest()
    assert [line["status"] for line in house.log()] == [200, 499]
    assert a.seen.generations_started == 2, "what was read ahead is not served"


@HOW
@pytest.mark.parametrize("sent", [b"P", POST[:20], POST[:-5], request(body=b"x" * 100_000)[:-5]])
@in_house
async def test_amid_its_own_request(house: House, sent: bytes, how: str) -> None:
    a = house.replicas[0]
    client = await house.client()
    await client.send(sent)
    await until(lambda: house.balancer.doors.connections)
    client.leave(how)
    await until(lambda: not house.balancer.doors.connections)
    assert a.seen.requests == []
    assert house.balancer.doors.buffered == 0


@on_uvloop
async def test_many_that_leave_at_once_leave_nothing_behind() -> None:
    async with LabReplica(head_delay=0.02, token_interval=0.01) as a, serving(a, max_in_flight=20) as house:
        clients = [await house.client() for _ in range(100)]
        for client in clients:
            await client.send(STREAM)
        await a.seen.until(lambda seen: seen.generations_started == 20)
        for client in clients:
            client.leave("reset")
        await house.at_rest()
        assert {line["status"] for line in await house.logged(100)} == {499}
        await a.seen.until(lambda seen: seen.generations_aborted == seen.generations_started)
        assert a.seen.generations_started < 100


@on_uvloop
async def test_bytes_that_come_in_the_very_moment_of_its_leaving() -> None:
    """After its connection has ended and before its request has, the replica's bytes are dropped."""
    async with LabReplica(token_interval=0.01) as a, serving(a) as house:
        client = await house.client()
        await client.send(STREAM)
        await client.until(b"t03")
        (connection,) = house.balancer.doors.connections
        (upstream,) = house.balancer.destination.pool.busy
        connection.eof_received()
        await asyncio.sleep(0)  # the connection is lost, and its request about to be cancelled
        upstream.data_received(b"a\r\ndata: {}\n\n\r\n")
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")
        await house.at_rest()
