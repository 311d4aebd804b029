"""Connections to replicas that are named: a name server's troubles are no replica's."""

import asyncio
import socket
from collections.abc import Sequence
from typing import cast

import pytest
import uvloop

from balancer.contract.listing import ReplicaListing
from balancer.fleet.dial import FRESH, PATIENCE, Dialer, Unresolved
from balancer.fleet.ejection import Outlier
from balancer.fleet.member import Member
from balancer.spec.settings import ReadinessProbe
from tests.lab.replica import LabReplica

SERVFAIL = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class NameServer:
    """Answers each question after `delay` seconds, by an error where there is one."""

    def __init__(self, *addresses: str, delay: float = 0.0) -> None:
        self.addresses: Sequence[str] = addresses
        self.delay = delay
        self.error: OSError | None = None
        self.asked = 0

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked += 1
        await asyncio.sleep(self.delay)
        if self.error:
            raise self.error
        return self.addresses


def named(port: int) -> Member:
    return Member(1, ReplicaListing("r1", f"http://gpu1.test:{port}"), 0.0, Outlier(10, 300), ReadinessProbe())


async def dialled(dialer: Dialer, member: Member, seconds: float = 0.5) -> str:
    """The address that took a connection."""
    addresses = await dialer.addresses(member)
    protocol = await dialer.connect(member, addresses, Kept, None, seconds)
    peer: str = protocol.transport.get_extra_info("peername")[0]
    protocol.transport.abort()
    return peer


class Kept(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


def test_a_name_servers_time_is_not_the_connections() -> None:
    async def play() -> None:
        async with LabReplica() as replica:
            names = NameServer("127.0.0.1", delay=1.0)
            assert await dialled(Dialer(names), named(replica.port), seconds=0.5) == "127.0.0.1"

    uvloop.run(play())


@pytest.mark.parametrize("trouble", ["error", "no address", "slow"])
def test_last_addresses_are_kept(trouble: str) -> None:
    """The last known addresses stay in use while the name server has no answer."""

    async def play() -> None:
        async with LabReplica() as replica:
            names, member = NameServer("127.0.0.1"), named(replica.port)
            dialer, loop = Dialer(names), asyncio.get_running_loop()
            await dialled(dialer, member)
            match trouble:
                case "error":
                    names.error = SERVFAIL
                case "no address":
                    names.addresses = ()
                case _:
                    names.delay = 3.0
            for _ in range(2):
                await asyncio.sleep(FRESH + 0.05)
                began = loop.time()
                assert await dialled(dialer, member) == "127.0.0.1"
                assert loop.time() - began < PATIENCE + 0.4
            assert names.asked == (2 if trouble == "slow" else 3), "one question at a time"
            await dialer.close()

    uvloop.run(play())


def test_another_address_is_taken_up_within_a_second_or_so() -> None:
    async def play() -> None:
        async with LabReplica() as replica:
            names, member = NameServer("127.0.0.9"), named(replica.port)
            dialer = Dialer(names)
            with pytest.raises(ConnectionRefusedError):
                await dialled(dialer, member)
            names.addresses = ["127.0.0.1"]
            await asyncio.sleep(FRESH + 0.05)
            assert await dialled(dialer, member) == "127.0.0.1"

    uvloop.run(play())


def test_good_address_comes_first() -> None:
    """All addresses are tried, and the one that works is tried first from then on."""

    async def play() -> None:
        async with LabReplica() as replica:
            dialer, member = Dialer(NameServer("127.0.0.8", "127.0.0.9", "127.0.0.1")), named(replica.port)
            assert await dialled(dialer, member) == "127.0.0.1"
            assert list(await dialer.addresses(member)) == ["127.0.0.1", "127.0.0.8", "127.0.0.9"]

    uvloop.run(play())


@pytest.mark.parametrize(("answer", "why"), [(SERVFAIL, "Temporary failure"), (None, "no such name")])
def test_a_name_that_was_never_resolved_is_unresolved(answer: OSError | None, why: str) -> None:
    async def play() -> None:
        names = NameServer()
        names.error = answer
        with pytest.raises(Unresolved, match=f"gpu1.test is not known: .*{why}"):
            await Dialer(names).addresses(named(1))

    uvloop.run(play())


def test_an_address_is_no_name() -> None:
    async def play() -> None:
        names = NameServer()
        for url in ("http://127.0.0.1:1", "http://[::1]:1"):
            member = Member(1, ReplicaListing("r1", url), 0.0, Outlier(10, 300), ReadinessProbe())
            assert list(await Dialer(names).addresses(member)) == [member.host]
        assert names.asked == 0

    uvloop.run(play())
