import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.fleet.discovery import GRACE, INTERVAL, LISTING_STANDS, DnsDiscovery, resolve
from balancer.fleet.fleet import Fleet
from tests.support.fleets import Clock, claimed, fleet_of, make_ready

PORT = 8000


class Names:
    """A name server's answers: addresses, or the error that asking ends in."""

    def __init__(self, *addresses: str) -> None:
        self.answer: Sequence[str] | OSError = addresses
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append((name, port))
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


NXDOMAIN: Sequence[str] = ()
BROKEN = [NXDOMAIN, TimeoutError(), OSError("temporary failure in name resolution")]


def discovering(clock: Clock, *addresses: str) -> tuple[Fleet, Names, DnsDiscovery]:
    """A fleet at these addresses, looked up once, all READY."""
    fleet, names = fleet_of(0, clock), Names(*addresses)
    discovery = DnsDiscovery(f"dns://replica:{PORT}", fleet, names)
    asyncio.run(discovery.look_up())
    for member in fleet.members.values():
        make_ready(fleet, member)
    return fleet, names, discovery


def places(fleet: Fleet) -> list[str]:
    return [member.name for member in fleet.members.values()]


def test_members_are_named_by_their_address() -> None:
    fleet, names, _ = discovering(Clock(), "10.0.0.1", "10.0.0.2", "fd00::5")
    assert names.asked == [("replica", PORT)]
    assert {member.name: member.url for member in fleet.members.values()} == {
        "10.0.0.1:8000": "http://10.0.0.1:8000",
        "10.0.0.2:8000": "http://10.0.0.2:8000",
        "[fd00::5]:8000": "http://[fd00::5]:8000",
    }
    assert fleet.members[3].host == "fd00::5"
    assert len(fleet.available()) == 3


def test_answers_that_shrink_and_grow_are_followed_at_once() -> None:
    fleet, names, discovery = discovering(Clock(), "10.0.0.1", "10.0.0.2")
    kept, gone = fleet.members.values()
    names.answer = ["10.0.0.3", "10.0.0.1"]
    asyncio.run(discovery.look_up())
    assert places(fleet) == ["10.0.0.3:8000", "10.0.0.1:8000"]
    assert kept in fleet.members.values()
    assert not fleet.has(gone)
    assert fleet.available() == [kept]


def test_what_is_in_flight_at_an_address_that_left_goes_on() -> None:
    fleet, names, discovery = discovering(Clock(), "10.0.0.1", "10.0.0.2")
    with claimed(fleet) as member:
        names.answer = ["10.0.0.2"]
        asyncio.run(discovery.look_up())
        assert (fleet.has(member), fleet.in_flight) == (False, 1)
    assert fleet.in_flight == 0


@pytest.mark.parametrize("answer", BROKEN, ids=["no such name", "time-out", "failure"])
def test_a_failing_name_server_keeps_the_last_answer_for_a_while(answer: Sequence[str] | OSError) -> None:
    clock = Clock()
    fleet, names, discovery = discovering(clock, "10.0.0.1", "10.0.0.2")
    members = list(fleet.members.values())
    fleet.refused(members[1])
    names.answer = answer
    clock.move(GRACE)
    asyncio.run(discovery.look_up())
    assert list(fleet.members.values()) == members


@pytest.mark.parametrize("answer", BROKEN, ids=["no such name", "time-out", "failure"])
def test_unanswered_members_go(answer: Sequence[str] | OSError) -> None:
    """After GRACE without a DNS answer, members that have been out of service for as long are removed."""
    clock = Clock()
    fleet, names, discovery = discovering(clock, "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
    ready, dead, hiccup, draining = fleet.members.values()
    names.answer = answer
    fleet.refused(dead)
    fleet.drain(draining)
    clock.move(GRACE)
    fleet.refused(hiccup)
    clock.move(1)
    asyncio.run(discovery.look_up())
    assert list(fleet.members.values()) == [ready, hiccup, draining]


def test_the_while_begins_anew_with_each_answer() -> None:
    clock = Clock()
    fleet, names, discovery = discovering(clock, "10.0.0.1")
    fleet.refused(fleet.members[1])
    for _ in range(3):
        names.answer = NXDOMAIN
        clock.move(GRACE)
        asyncio.run(discovery.look_up())
        assert places(fleet) == ["10.0.0.1:8000"]
        names.answer = ["10.0.0.1"]
        asyncio.run(discovery.look_up())


def test_an_outage_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    fleet, names, discovery = discovering(Clock(), "10.0.0.1")
    with caplog.at_level(logging.WARNING, "groundserve"):
        names.answer = TimeoutError()
        for _ in range(3):
            asyncio.run(discovery.look_up())
        names.answer = ["10.0.0.1"]
        for _ in range(3):
            asyncio.run(discovery.look_up())
    assert [record.getMessage() for record in caplog.records] == [
        "DNS does not say where replica is (no answer in time); the replicas known so far are kept",
        "DNS knows replica again: 1 addresses",
    ]
    assert places(fleet) == ["10.0.0.1:8000"]


def test_it_asks_again_each_second_until_it_is_stopped() -> None:
    async def play() -> None:
        loop = asyncio.get_running_loop()
        names, fleet = Names("10.0.0.1"), fleet_of(0, Clock())
        discovery = DnsDiscovery("dns://tasks.replica:80", fleet, names)
        began = loop.time()
        discovery.start()
        async with asyncio.timeout(10):
            while len(names.asked) < 2:  # noqa: ASYNC110 - the same answer again is told to nobody
                await asyncio.sleep(0.01)
        assert INTERVAL * 0.9 < loop.time() - began < INTERVAL + 2
        await discovery.stop()
        assert places(fleet) == ["10.0.0.1:80"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(play())


# An engine that tells its list


def of_engine(number: int, address: str, **more: Any) -> ReplicaListing:
    return ReplicaListing(
        f"{address}:{PORT}", f"http://{address}:{PORT}", id=number, version=2, infra="compose", **more
    )


def test_engines_list_comes_before_dns() -> None:
    """An engine's list is used while the engine sends it; afterwards DNS takes over."""
    clock = Clock()
    fleet, _names, discovery = discovering(clock, "10.0.0.1", "10.0.0.2")
    kept = fleet.members[1]
    discovery.reconcile([of_engine(7, "10.0.0.1")])
    assert list(fleet.members) == [7]
    assert fleet.members[7] is kept, "found by DNS and numbered by the engine: the same, with all that is known of it"
    assert kept.id == 7
    assert fleet.available() == [kept]
    clock.move(LISTING_STANDS - 1)
    asyncio.run(discovery.look_up())
    assert list(fleet.members) == [7]
    clock.move(1)
    asyncio.run(discovery.look_up())
    assert places(fleet) == ["10.0.0.1:8000", "10.0.0.2:8000"]
    assert fleet.members[7] is kept
    assert kept.listing.version == 2, "what the engine said last is remembered"


def test_an_engine_that_is_gone_starts_nothing_any_more() -> None:
    """So nobody waits for what it was about to start."""
    clock = Clock()
    fleet, names, discovery = discovering(clock, "10.0.0.1")
    gone: list[float] = []
    discovery.when_controller_gone.append(lambda: gone.append(clock()))
    names.answer = NXDOMAIN
    discovery.reconcile([ReplicaListing("replica-8", "", id=8, state=State.PROVISIONING)])
    fleet.is_asleep = True
    clock.move(LISTING_STANDS - 1)
    asyncio.run(discovery.look_up())
    assert fleet.is_asleep
    assert gone == []
    clock.move(1)
    asyncio.run(discovery.look_up())
    assert not fleet.is_asleep
    assert gone == [clock()]
    clock.move(GRACE + 1)
    asyncio.run(discovery.look_up())
    assert gone == [clock() - GRACE - 1], "said once"
    assert not fleet.is_starting()


def test_what_an_engine_numbers_otherwise_is_another_replica() -> None:
    fleet, _names, discovery = discovering(Clock(), "10.0.0.1")
    discovery.reconcile([of_engine(7, "10.0.0.1")])
    first = fleet.members[7]
    discovery.reconcile([of_engine(8, "10.0.0.1")])
    assert list(fleet.members) == [8]
    assert fleet.members[8] is not first, "Docker gave the address to another container"


def test_stopped_replica_that_dns_still_names() -> None:
    """A replica that the engine stopped starts as a new member if DNS still names it."""
    clock = Clock()
    fleet, _names, discovery = discovering(clock, "10.0.0.1")
    discovery.reconcile([of_engine(7, "10.0.0.1", state=State.SHUTTING_DOWN)])
    assert fleet.available() == []
    clock.move(LISTING_STANDS)
    asyncio.run(discovery.look_up())
    assert [member.status(clock()).value for member in fleet.members.values()] == ["STARTING"]


@pytest.mark.parametrize(
    "source",
    [
        *("replica:8000", "dns://replica", "dns://replica:0", "dns://replica:65536", "dns://:80", "dns://a..b:80"),
        *("dns://replica:80/x", "http://replica:80", f"dns://{'a' * 64}:80", "dns://h\xf6st:80"),
    ],
)
def test_a_source_that_cannot_be_asked_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(ConfigError, match=r"write dns://NAME:PORT$"):
        DnsDiscovery(source, fleet_of(0, Clock()))


@pytest.mark.parametrize("source", ["dns://tasks.replica:80", "dns://my_app-replica.ns.svc.cluster.local.:8000"])
def test_names_of_compose_swarm_and_kubernetes_are_taken(source: str) -> None:
    names = Names("10.0.0.1")
    asyncio.run(DnsDiscovery(source, fleet_of(0, Clock()), names).look_up())
    assert names.asked == [(source.removeprefix("dns://").rpartition(":")[0], int(source.rpartition(":")[2]))]


def test_own_resolver() -> None:
    """The machine's own resolver returns each address once."""
    assert asyncio.run(resolve("localhost", PORT)) in (["127.0.0.1"], ["127.0.0.1", "::1"], ["::1"])
    assert asyncio.run(resolve("127.0.0.7", PORT)) == ["127.0.0.7"]
