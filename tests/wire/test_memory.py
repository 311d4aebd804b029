"""The memory that open connections and slow clients cost, measured on a separate process."""

import asyncio
import resource
from collections.abc import Iterator

import pytest

from tests.lab.replica import LabReplica
from tests.support.client import Client, chat, request
from tests.wire.process import BalancerProcess, running
from tests.wire.running import on_uvloop

MIB = 1 << 20
EACH = 40 << 10


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    """Raises the limit: the lab and the clients are in this process and use three sockets per stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def settled(balancer: BalancerProcess) -> int:
    """Its memory, once it has stopped growing."""
    last = 0
    while (now := balancer.memory) > last:
        last = now
        await asyncio.sleep(0.3)
    return last


@on_uvloop
async def test_unread_answer_of_256_mib() -> None:
    """A client that reads nothing of 256 MiB costs less than 8 MiB, and the replica is held back."""
    async with LabReplica(body_mib=256) as a, running(a.url) as balancer:
        small = request("GET", "/v1/models/lab")
        a.next(1, body_mib=0.0)
        warm = await balancer.client()
        await warm.send(small)
        await warm.answer("GET")
        before = balancer.memory
        client = await balancer.client(receive_buffer=4096)
        await client.send(request(body=chat()))
        await a.seen.until(lambda seen: seen.last.bytes_sent > MIB)
        after = await settled(balancer)
        held_back_at = a.seen.last.bytes_sent
        assert held_back_at < 32 * MIB, "what the kernel's buffers take on the way, and no more"
        assert after - before < 8 * MIB
        await asyncio.sleep(0.5)
        assert a.seen.last.bytes_sent == held_back_at, "still held back"
        client.leave()
        await a.seen.until(lambda seen: seen.last.outcome == "client_left")


@on_uvloop
async def test_4000_idle_streams() -> None:
    """4,000 idle streams cost less than 40 KiB each, and their memory is given back.

    Fewer if this machine's hard limit on descriptors is lower.
    """
    streams = min(4000, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500) // 300 * 100)
    assert streams >= 1000, "too few descriptors to measure anything: raise the hard limit (ulimit -Hn)"
    # More connections than streams: those that asked whether it is ready linger.
    limits = {"max_connections_per_client": streams + 110, "max_in_flight": streams + 100, "idle_timeout": 600}
    async with LabReplica(hang="after_tokens", hang_after=1) as a, running(a.url, **limits) as balancer:
        stream = request(body=chat(stream=True))

        async def opened() -> Client:
            client = await balancer.client()
            await client.send(stream)
            await client.until(b"t00")
            return client

        async def opened_many(count: int) -> None:
            for _ in range(0, count, 100):
                await asyncio.gather(*(opened() for _ in range(100)))

        await opened_many(100)
        before, descriptors = await settled(balancer), balancer.descriptors
        await opened_many(streams)
        after = await settled(balancer)
        assert abs(balancer.descriptors - descriptors - 2 * streams) < 10
        assert (after - before) / streams < EACH, f"{(after - before) / streams / 1024:.1f} KiB each"
        for client in balancer.clients:
            client.leave()
        balancer.clients.clear()
        await a.seen.until(lambda seen: seen.generations_aborted == streams + 100, 20)
        await opened_many(streams // 4)
        assert await settled(balancer) < after + 4 * MIB, "what the first ones left is used again"
        assert balancer.descriptors < descriptors + streams // 2 + 10
        assert balancer.complained == b""
