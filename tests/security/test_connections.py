"""Many connections, slow ones and huge requests of one client: others are served all the while."""

import asyncio
import time

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Client, Ended, chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop, serving


@on_uvloop
async def test_one_address_has_no_more_connections_than_it_may() -> None:
    async with LabReplica() as lab, serving(lab, max_connections_per_client=5) as house:
        held = [await house.client() for _ in range(5)]
        await until(lambda: len(house.balancer.doors.connections) == 5)
        one_too_many = await house.client()
        answer = await one_too_many.answer()
        assert answer.status == 429
        assert answer.error["code"] == "too_many_connections"
        assert answer.header("retry-after") == "1"
        assert answer.is_last
        one_too_many.leave()
        for client in held:  # those that came before are served
            await client.send(request(body=chat()))
            assert (await client.answer()).status == 200
        held[0].leave()
        await until(lambda: len(house.balancer.doors.connections) == 4)
        assert (await house.ask(request(body=chat()))).status == 200


@on_uvloop
async def test_another_address_and_a_trusted_proxy_are_not_held_to_it() -> None:
    async with LabReplica() as lab, serving(lab, max_connections_per_client=2, trusted_proxies=("127.0.0.9",)) as house:
        doors = house.balancer.doors

        for _ in range(2):
            await house.client()
        await until(lambda: len(doors.connections) == 2)
        host, port = house.url.removeprefix("http://").split(":")
        for address, count, allowed in (("127.0.0.2", 2, True), ("127.0.0.9", 6, True), ("127.0.0.2", 1, False)):
            for _ in range(count):
                reader, writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
                writer.write(request(body=chat()))
                status = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
                assert (b" 200 " in status) is allowed, address
                house.clients.append(_Closing(writer))  # type: ignore[arg-type]


class _Closing:
    """A stream that the house closes with its other clients."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def leave(self) -> None:
        self._writer.close()


@on_uvloop
async def test_nothing_is_remembered_of_an_address_that_left() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for _ in range(20):
            await house.ask(request(body=chat()))
        await until(lambda: not house.balancer.doors.connections)
        assert house.balancer.doors.origins == {}


@on_uvloop
async def test_a_hundred_slow_heads_delay_nobody_and_end() -> None:
    async with LabReplica() as lab, serving(lab, head_timeout=1) as house:
        slow = [await house.client() for _ in range(100)]
        for client in slow:
            await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        began = time.monotonic()
        for _ in range(20):
            assert (await house.ask(request(body=chat()))).status == 200
        assert time.monotonic() - began < 2
        for client in slow:
            assert (await client.answer()).status == 408


@on_uvloop
async def test_slow_bodies_hold_no_place_at_a_replica() -> None:
    async with LabReplica() as lab, serving(lab, max_in_flight=1, body_timeout=1) as house:
        body = chat()
        slow = [await house.client() for _ in range(50)]
        for client in slow:
            await client.send(request(headers=(("Content-Length", "1000000"),)) + body)
        await until(lambda: house.balancer.doors.buffered >= 50 * len(body))
        assert (await house.ask(request(body=body))).status == 200
        assert house.member("a").in_flight == 0
        for client in slow:
            assert (await client.answer()).status == 408
        assert house.balancer.doors.buffered == 0


@on_uvloop
async def test_many_large_bodies_at_once_stay_within_the_limit_of_all() -> None:
    limit, size = 8 << 20, 1 << 20
    async with LabReplica(hang="before_head") as lab, serving(lab, max_buffered_bytes=limit) as house:
        doors, most = house.balancer.doors, 0
        clients = [await house.client() for _ in range(12)]
        asked = [asyncio.ensure_future(_push(client, size)) for client in clients]
        while sum(task.done() for task in asked) + len(lab.seen.requests) < len(asked):
            most = max(most, doors.buffered)
            await asyncio.sleep(0.001)
        assert 4 << 20 < most <= limit + (1 << 18), "one read may be on its way"
        assert [task.result() for task in asked if task.done()] == [503] * (12 - len(lab.seen.requests))
        assert 5 <= len(lab.seen.requests) <= 8
        for task in asked:
            task.cancel()


async def _push(client: Client, size: int) -> int:
    """Sends a body of that many bytes; the answer's status, 503 where the connection was cut before it came."""
    try:
        await client.send(request(headers=(("Content-Length", str(size)),)) + b"x" * size)
        return (await client.answer()).status
    except (ConnectionError, Ended):
        return 503


@pytest.mark.parametrize("count", [200])
@on_uvloop
async def test_a_wave_of_connections_that_say_nothing_is_let_go(count: int) -> None:
    async with LabReplica() as lab, serving(lab, keep_alive_timeout=2) as house:
        for _ in range(count):
            await house.client()
        await until(lambda: len(house.balancer.doors.connections) == count)
        assert (await house.ask(request(body=chat()))).status == 200
        await until(lambda: not house.balancer.doors.connections)
