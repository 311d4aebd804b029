"""max_buffered_bytes is one for all relays: whoever fills it at one of them keeps nobody out of the others."""

import asyncio

from tests.lab.replica import LabReplica
from tests.support.client import Answer, Client, request
from tests.wire.running import on_uvloop
from tests.workers.running import Workers, relay_of, workers

MIB = 1 << 20
PATH = "/v1/images/edits"
OF_HOG, OF_OTHER = "127.0.0.3", "127.0.0.2"


async def at_each(at: Workers, source: str) -> dict[str, Client]:
    """A client at each relay, from this address."""
    clients: dict[str, Client] = {}
    while len(clients) < 2:
        client = await Client.open(at.balancer.url, 0, source)
        at.balancer.clients.append(client)
        await client.send(request("GET", "/health"))
        clients.setdefault(relay_of(await client.answer("GET")), client)
    return clients


@on_uvloop
async def test_who_fills_one_relay_keeps_nobody_out_of_another() -> None:
    """The first that finds no room is refused; the full relay then frees what is beyond its equal part."""
    async with LabReplica() as a, workers(a.url, max_body_bytes=MIB, max_buffered_bytes=8 * MIB) as at:
        full = min(await at_each(at, OF_HOG))
        unfinished = request("POST", PATH, headers=(("Content-Length", str(MIB)),)) + b"x" * (MIB - 1_000)
        hogs = [(await at_each(at, OF_HOG))[full] for _ in range(9)]
        for hog in hogs:
            await hog.send(unfinished)
        await asyncio.sleep(0.6)

        async def answer_elsewhere() -> Answer:
            clients = await at_each(at, OF_OTHER)
            (other,) = (client for relay, client in clients.items() if relay != full)
            await other.send(request("POST", PATH, b"y" * (MIB - 1_000)))
            return await other.answer()

        first = await answer_elsewhere()
        assert (first.status, first.error["code"]) == (503, "buffers_full")
        await asyncio.sleep(0.6)
        assert [(await answer_elsewhere()).status for _ in range(3)] == [200] * 3
        await asyncio.sleep(0.6)
        metrics = (await at.admin.get("/metrics")).text.splitlines()
        held = sum(float(line.split()[-1]) for line in metrics if line.startswith("groundserve_buffered_bytes "))
        assert 3 * MIB < held <= 4.5 * MIB, "what is within the equal part stays"
