"""Many bodies at once that are expensive to parse for routing: other requests are answered in between."""

import asyncio
from pathlib import Path

import pytest

from balancer.routing.body import MAX_NANOSECONDS, MAX_PARSED, nanoseconds
from tests.lab.spawn import spawn_replica
from tests.support.client import request
from tests.wire.process import BalancerProcess, running
from tests.wire.running import on_uvloop

POLICY = ("--policy", "prefix_aware")
HELD_UP = 0.3  # seconds; thirty bodies together take a second or more


def filled(unit: bytes, size: int) -> bytes:
    head, tail = b'{"messages":[', b'{"role":"user","content":"."}]}'
    return head + (unit + b",") * ((size - len(head) - len(tail)) // (len(unit) + 1)) + tail


def just_read(unit: bytes) -> bytes:
    """The largest body of such units, roughly, that is still parsed."""
    size = MAX_PARSED
    while nanoseconds(raw := filled(unit, size)) > MAX_NANOSECONDS:
        size = size * 9 // 10
    return raw


def worked(balancer: BalancerProcess) -> float:
    """Seconds of CPU time of its event loop, which excludes other programs on this machine."""
    return int(Path(f"/proc/{balancer.process.pid}/schedstat").read_text().split()[0]) / 1e9


async def longest_wait(balancer: BalancerProcess, over: asyncio.Future[object]) -> float:
    """The maximum CPU time between a request of another client and its answer, repeated until `over`."""
    client = await balancer.client()
    longest = 0.0
    while not over.done():
        began = worked(balancer)
        await client.send(request("GET", "/health"))
        assert (await client.answer("GET")).status == 200
        longest = max(longest, worked(balancer) - began)
        await asyncio.sleep(0.002)
    return longest


async def thirty_at_once(balancer: BalancerProcess, body: bytes) -> float:
    """How long thirty such bodies hold up another client at most, in seconds of the balancer's CPU time."""
    clients = [await balancer.client() for _ in range(30)]

    async def ask(number: int) -> int:
        await clients[number].send(request(body=body))
        return (await clients[number].answer()).status

    asking = asyncio.gather(*(ask(number) for number in range(30)))
    waited = await longest_wait(balancer, asking)
    assert set(await asking) == {400}
    return waited


async def best_of(times: int, balancer: BalancerProcess, body: bytes) -> float:
    """The minimum of these waits: the other client is in this process, which may itself wait for a CPU."""
    waited = await thirty_at_once(balancer, body)
    while waited >= HELD_UP and (times := times - 1):
        waited = min(waited, await thirty_at_once(balancer, body))
    return waited


@pytest.mark.parametrize(
    "body",
    [
        filled(b"[]", MAX_PARSED),
        filled(b'{"content":"a"}', MAX_PARSED),
        just_read(b'{"content":"a"}'),
        just_read(b"[" * 100 + b"]" * 100),
    ],
    ids=["arrays", "messages", "messages that are read", "nested arrays that are read"],
)
@on_uvloop
async def test_thirty_at_once_hold_up_nobody_for_long(body: bytes) -> None:
    """Together the bodies take a second or more; others wait for only one or two of them."""
    async with spawn_replica(status=400) as replica, running(replica.url, arguments=POLICY) as balancer:
        assert await best_of(3, balancer, body) < HELD_UP


@on_uvloop
async def test_thirty_first_comments_at_once() -> None:
    """Thirty requests that wait for their first comment together hold up nobody for long.

    With any policy, the balancer finds out only then whether they want a stream.
    """
    body = just_read(b'{"content":"a"}')
    async with (
        spawn_replica(status=400, head_delay=3) as replica,
        running(replica.url, keep_alive_comments=0.5) as balancer,
    ):
        assert await best_of(3, balancer, body) < HELD_UP
