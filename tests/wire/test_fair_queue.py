"""Many clients for few places, on real sockets: a connection waits for one turn; hopeless requests are refused."""

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Answer, Client, chat, request
from tests.support.until import until
from tests.wire.running import House, on_uvloop, serving

HOG, ONE = "127.0.0.1", "127.0.0.2"


def named(name: str, **headers: str) -> bytes:
    return request(body=chat(), headers=(("X-Request-Id", name), *headers.items()))


async def waiting(house: House, count: int, data: bytes = b"", source: str = HOG) -> list[Client]:
    """That many clients with a request each, all of which wait."""
    depth = house.balancer.service.admission.queue_depth
    clients = []
    for number in range(count):
        client = await house.client(source=source)
        await client.send(data or named(f"{source} {number}".replace(" ", "-")))
        await until(lambda due=depth + number + 1: house.balancer.service.admission.queue_depth == due)  # type: ignore[misc]
        clients.append(client)
    return clients


async def held(house: House, **headers: str) -> Client:
    """A client that occupies the only place until it leaves."""
    holder = await house.client()
    body = chat(stream=True, tokens=100_000)
    await holder.send(request(body=body, headers=(("X-Request-Id", "holder"), *headers.items())))
    await until(lambda: house.balancer.service.fleet.generating == 1)
    return holder


def served(replica: LabReplica) -> list[str]:
    """The ids of the requests that it got, in order, without the holder's."""
    return [seen.id for seen in replica.seen.requests if seen.id != "holder"]


@on_uvloop
async def test_one_connection_is_served_after_a_turn_of_two_hundred() -> None:
    async with LabReplica(token_interval=0.01) as a, serving(a, max_in_flight=1) as house:
        holder = await held(house)
        hogs = await waiting(house, 200)
        (one,) = await waiting(house, 1, named("one"), ONE)
        holder.leave()
        assert (await one.answer()).status == 200
        assert served(a).index("one") <= 1
        for hog in hogs:
            assert (await hog.answer()).status == 200
        assert served(a)[2:] == [f"{HOG}-{number}" for number in range(1, 200)], "in his own line by arrival"


@on_uvloop
async def test_one_client_beside_a_busy_one() -> None:
    """One connection that repeats its request waits for one turn each time.

    Meanwhile two hundred connections of another client also repeat theirs as soon as they are answered.
    """
    async with LabReplica(head_delay=0.005) as a, serving(a, max_in_flight=2) as house:
        is_over = False

        async def ask_on(client: Client) -> None:
            while not is_over:
                await client.send(named("hog"))
                assert (await client.answer()).status == 200

        hogs = [asyncio.create_task(ask_on(await house.client())) for _ in range(200)]
        await until(lambda: house.balancer.service.admission.queue_depth > 150)
        one = await house.client(source=ONE)
        for number in range(10):
            before = len(served(a))
            await one.send(named(f"one-{number}"))
            assert (await one.answer()).status == 200
            assert served(a).index(f"one-{number}") - before < 20, "of two hundred that waited before it"
        is_over = True
        await asyncio.gather(*hogs)


@pytest.mark.parametrize("told_apart_by", ["address", "key", "the proxy's word"])
@on_uvloop
async def test_a_client_that_fills_the_queue_keeps_nobody_out(told_apart_by: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    hogs: dict[str, str] = {}
    ones: dict[str, str] = {}
    source = HOG
    if told_apart_by == "address":
        source = ONE
    elif told_apart_by == "key":
        config["api_keys"] = tmp_path / "keys"
        lines = (f"{name}:{sha256(f'secret-{name}'.encode()).hexdigest()}" for name in ("hog", "one"))
        config["api_keys"].write_text("\n".join(lines))
        hogs, ones = ({"Authorization": f"Bearer secret-{name}"} for name in ("hog", "one"))
    else:
        settings["trusted_proxies"] = ("127.0.0.1",)
        hogs, ones = ({"X-Forwarded-For": f"192.0.2.9, {address}"} for address in ("198.51.100.1", "203.0.113.2"))
    async with (
        LabReplica(token_interval=0.01) as a,
        serving(a, max_in_flight=1, queue_size=10, config=config, **settings) as house,
    ):
        holder = await held(house, **hogs)
        clients = await waiting(house, 10, named("hog", **hogs))
        others = [await house.client(source=source) for _ in range(5)]
        for number, other in enumerate(others):
            await other.send(named("one", **ones))
            answer = await clients.pop().answer()
            assert (answer.status, answer.error["code"]) == (429, "queue_full"), "whoever of the many came last"
            assert int(answer.header("retry-after") or 0) >= 1
            assert house.balancer.service.admission.queue_depth == 10, number
        sixth = await house.client(source=source)
        await sixth.send(named("one", **ones))
        assert (await sixth.answer()).error["code"] == "queue_full", "half of it is his share"
        holder.leave()
        for client in (*clients, *others):
            assert (await client.answer()).status == 200
        assert served(a) == ["hog", "one"] * 5


@on_uvloop
async def test_steady_overload() -> None:
    """Under steady overload, a request that cannot be served in time is refused when it comes."""
    async with LabReplica(head_delay=0.1) as a, serving(a, max_in_flight=1, queue_timeout=2) as house:
        loop = asyncio.get_running_loop()
        told: list[tuple[Answer, float]] = []
        deadline = loop.time() + 12

        async def ask_on(client: Client) -> None:
            while loop.time() < deadline:
                began = loop.time()
                await client.send(named("hog"))
                answer = await client.answer()
                told.append((answer, loop.time() - began))
                if answer.status != 200:
                    await asyncio.sleep(0.5)  # so that others have a chance

        await asyncio.gather(*[ask_on(await house.client()) for _ in range(60)])
        refused = [(answer.error["code"], seconds) for answer, seconds in told[120:] if answer.status == 429]
        at_once = [seconds for code, seconds in refused if code == "queue_full"]
        assert len(at_once) > 100
        assert sorted(at_once)[len(at_once) // 2] < 0.5, "told at once"
        assert len(at_once) > 0.9 * len(refused), "and hardly anybody only after he had waited"
        waits = [int(answer.header("retry-after") or 0) for answer, _ in told[120:] if answer.status == 429]
        assert {1, 2, 3} & set(waits)
        assert max(waits) <= 6, "as long as the queue is, and a half more"
        assert len(set(waits)) > 1, "not all at the same time"
