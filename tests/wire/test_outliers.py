"""A replica that fails while another is healthy is ejected within ten seconds; a fault of all ejects none."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from balancer.spec.settings import PolicyName
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.wire.running import House, each, on_uvloop, serving

POLICIES = ["round_robin", "least_load", "prefix_aware"]
FAULTS: dict[str, dict[str, Any]] = {
    "each stream breaks": {"cut": "after_tokens", "cut_after": 1},
    "each stream breaks before its first event": {"cut": "after_head"},
    "each answer is a 500": {"status": 500},
}
CLIENTS = 8


def ejections(house: House) -> list[int]:
    return [house.member(name).outlier.ejections_total for name in "ab"]


async def ask_until(house: House, claim: Callable[[], object], seconds: float) -> None:
    """Eight clients stream one answer after the other until `claim` holds, for at most `seconds`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    async def ask_on(number: int) -> None:
        while not claim() and loop.time() < deadline:
            await house.ask(request(body=chat(stream=True, tokens=3, user=str(number))))

    await asyncio.gather(*(ask_on(number) for number in range(CLIENTS)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", **each(FAULTS))
@on_uvloop
async def test_a_replica_that_fails_what_another_ends_well_is_ejected(
    fault: dict[str, Any], policy: PolicyName
) -> None:
    knobs = {"token_interval": 0.02}
    async with (
        LabReplica(**knobs, **fault) as a,
        LabReplica(**knobs) as b,
        serving(a, b, config={"policy": policy}) as house,
    ):
        await ask_until(house, lambda: any(ejections(house)), 10)
        assert ejections(house) == [1, 0]
        house.balancer.tallies.count()
        assert "by lot" in {record.reason for record in house.balancer.tallies.recent}
        assert [member.name for member in house.balancer.service.fleet.available()] == ["b"]


@pytest.mark.parametrize("fault", **each(FAULTS))
@on_uvloop
async def test_what_happens_at_all_replicas_ejects_none(fault: dict[str, Any]) -> None:
    async with LabReplica(**fault) as a, LabReplica(**fault) as b, serving(a, b) as house:
        await ask_until(house, lambda: any(ejections(house)), 3)
        assert ejections(house) == [0, 0]
        failures = sum(house.member(name).failures_total for name in "ab")
        assert failures == len(a.seen.requests) + len(b.seen.requests) > 20


@pytest.mark.parametrize("fault", **each(FAULTS))
@on_uvloop
async def test_one_replica_alone_is_never_ejected(fault: dict[str, Any]) -> None:
    async with LabReplica(**fault) as a, serving(a) as house:
        for _ in range(30):
            await house.ask(request(body=chat(stream=True)))
        assert house.member("a").outlier.ejections_total == 0
        assert house.member("a").failures_total == 30


@on_uvloop
async def test_client_that_leaves_blames_nobody() -> None:
    """A client that leaves during its streams counts against no replica."""
    async with LabReplica(tokens=100, token_interval=0.02) as a, LabReplica() as b, serving(a, b) as house:
        for _ in range(20):
            client = await house.client()
            await client.send(request(body=chat(stream=True, tokens=100)))
            await client.more()
            client.leave()
        await house.at_rest()
        assert [house.member(name).failures_total for name in "ab"] == [0, 0]
        assert ejections(house) == [0, 0]
