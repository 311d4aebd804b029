"""Fleets that are probed for real: over real sockets, on the loop's own clock, at short intervals."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import Status
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.fleet.prober import Prober
from balancer.spec.settings import ReadinessProbe
from tests.lab.replica import LabReplica
from tests.support.fleets import fleet_of
from tests.support.until import until

INTERVAL = 0.05
TIMEOUT = 0.25
# Seconds to wait for anything: how long a busy machine takes is not what is tried.
PATIENCE = 60.0


@contextlib.asynccontextmanager
async def watched(
    *replicas: LabReplica | str,
    readiness: dict[str, Any] | None = None,
    api_key: str | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> AsyncIterator[Fleet]:
    """A fleet of these replicas (or addresses) under a prober. `readiness` and other keywords change the defaults."""
    ours = {"ready_interval": INTERVAL, "ready_timeout": TIMEOUT} | settings
    theirs = {"endpoint_probe_interval_seconds": INTERVAL, "timeout_seconds": TIMEOUT} | (readiness or {})
    fleet = fleet_of(0, asyncio.get_running_loop().time, readiness=ReadinessProbe(**theirs), **ours)
    prober = Prober(fleet, api_key, tls, seed=1)
    urls = [replica if isinstance(replica, str) else replica.url for replica in replicas]
    fleet.reconcile([ReplicaListing(f"r{number}", url, id=number) for number, url in enumerate(urls, 1)])
    try:
        yield fleet
    finally:
        await prober.stop()


async def until_ready(fleet: Fleet, count: int | None = None) -> None:
    wanted = len(fleet.members) if count is None else count
    await until(lambda: statuses(fleet).count("READY") == wanted, lambda: statuses(fleet), PATIENCE)


async def until_status(fleet: Fleet, number: int, status: Status) -> Member:
    """The member of that number, once it has that status."""
    await until(lambda: fleet.members[number].status(fleet.clock()) is status, lambda: statuses(fleet), PATIENCE)
    return fleet.members[number]


def statuses(fleet: Fleet) -> list[str]:
    return [member.status(fleet.clock()).value for member in fleet.members.values()]


async def probes(fleet: Fleet, number: int, count: int) -> None:
    """Wait for that many more verdicts of our own question to a member."""
    member = fleet.members[number]
    question = member.ready
    target = question.passes_total + question.failures_total + count
    async with asyncio.timeout(PATIENCE):
        while question.passes_total + question.failures_total < target:  # noqa: ASYNC110 - nobody is told of each
            await asyncio.sleep(INTERVAL / 5)
