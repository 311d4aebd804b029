"""Trouble on our own side counts against no replica: a stalled event loop, a failing name server."""

import asyncio
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from balancer.contract.listing import ReplicaListing
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.until import until
from tests.wire.process import running
from tests.wire.running import House, on_uvloop, serving

POST = request(body=chat())


async def rows(url: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(trust_env=False) as client:
        found: list[dict[str, Any]] = (await client.get(f"{url}/status")).json()["replicas"]
        return found


@on_uvloop
async def test_a_balancer_that_was_stopped_for_a_while_blames_nobody() -> None:
    """When it continues, all its timers are due, and everything that arrived meanwhile waits in its sockets."""
    # Shorter than the stop, and longer than anything that a busy machine delays: the replicas run in this process.
    patience = dict.fromkeys(("connect_timeout", "ready_timeout", "first_byte_timeout", "idle_timeout"), 3)
    patience |= {"upstream_keep_alive": 0.01, "ready_interval": 0.05}
    async with LabReplica() as a, LabReplica() as b, running(a.url, b.url, **patience) as balancer:
        a.set(head_delay=0.4)
        b.set(first_token_delay=0.4, token_interval=0.2)
        clients = [await balancer.client() for _ in range(8)]
        for number, client in enumerate(clients):
            await client.send(request(body=chat(stream=number % 2 == 0, tokens=4)))
        await a.seen.until(lambda seen: len(seen.requests) == 4)
        balancer.signal(signal.SIGSTOP)
        await asyncio.sleep(4)
        balancer.signal(signal.SIGCONT)
        answers = [await client.answer() for client in clients]
        assert [(answer.status, answer.is_whole) for answer in answers] == [(200, True)] * 8
        assert [row["failures_total"] for row in await rows(balancer.admin_url)] == [0, 0]


@on_uvloop
async def test_one_heavy_callback_makes_no_connect_time_out() -> None:
    async with LabReplica() as a, serving(a, connect_timeout=0.2) as house:
        client = await house.client()
        await client.send(POST)
        asyncio.get_running_loop().call_later(0.0005, time.sleep, 0.6)
        assert (await client.answer()).status == 200
        assert house.member("a").failures_total == 0


@on_uvloop
async def test_a_death_is_noticed_after_a_pause_of_this_process() -> None:
    """The only replica dies and is started anew: its request waits for that, even if the balancer pauses just then."""
    async with LabReplica(first_token_delay=0.3) as a, serving(a, ready_interval=0.05) as house:
        client = await house.client()
        await client.send(POST)
        await a.seen.until(lambda seen: len(seen.requests) == 1)
        a.fall()
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.6)
        await asyncio.sleep(1)
        await a.start()
        assert (await client.answer()).status == 200
        await a.stop()


class NameServer:
    """Resolves the replicas' name until it fails."""

    def __init__(self) -> None:
        self.has_trouble = False
        self.delay = 0.0

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        await asyncio.sleep(self.delay)
        if self.has_trouble:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return ["127.0.0.1"]


@pytest.mark.parametrize("trouble", ["fails", "slow"])
@on_uvloop
async def test_a_name_server_in_trouble_takes_no_replica_out(trouble: str) -> None:
    names = NameServer()
    async with LabReplica() as a, LabReplica() as b:
        listed = tuple(
            ReplicaListing(name, f"http://gpu.test:{replica.port}") for name, replica in (("a", a), ("b", b))
        )
        settings = {"connect_timeout": 0.3, "upstream_keep_alive": 0.01, "ready_interval": 0.1}
        async with serving(a, b, config={"replicas": listed}, look_up=names, **settings) as house:
            names.has_trouble, names.delay = trouble == "fails", 3.0 if trouble == "slow" else 0.0
            for _ in range(4):
                await asyncio.sleep(0.6)
                assert (await house.ask(POST)).status == 200
            for replica in (a, b):
                replica.drop_connections()  # so that the probes need new connections
            await asyncio.sleep(0.3)
            assert (await house.ask(POST)).status == 200
            await all_ready(house)


async def all_ready(house: House) -> None:
    await until(lambda: len(house.balancer.service.fleet.available()) == 2)
    assert [house.member(name).failures_total for name in "ab"] == [0, 0]
