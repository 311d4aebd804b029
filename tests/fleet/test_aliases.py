"""One replica at two addresses is one member: one row, one limit, one drain."""

import asyncio

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.fleet import aliases
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member, Verdict
from tests.fleet.test_discovery import discovering
from tests.fleet.watched import watched
from tests.lab.replica import LabReplica
from tests.support.fleets import Clock, claim, claimed, fleet_of, make_ready
from tests.support.until import until

SURE = "7 52.01"  # a seed, and the time that the start took


def passes(fleet: Fleet, member: Member, identity: str | None) -> None:
    member.identity = identity
    make_ready(fleet, member)


def found(clock: Clock, *addresses: str) -> tuple[Fleet, dict[str, Member]]:
    """A fleet at these addresses, none of which has answered yet."""
    fleet, names, discovery = discovering(clock)
    names.answer = addresses
    asyncio.run(discovery.look_up())
    return fleet, {member.host: member for member in fleet.members.values()}


def rows(fleet: Fleet) -> list[tuple[str, str]]:
    return [(member.host, member.status(fleet.clock()).value) for member in fleet.shown()]


def test_the_family_that_never_answers_is_no_replica_that_starts() -> None:
    fleet, members = found(Clock(), "10.0.0.1", "fd00::1")
    assert rows(fleet) == [("10.0.0.1", "STARTING")]
    passes(fleet, members["10.0.0.1"], "7")
    assert rows(fleet) == [("10.0.0.1", "READY")]
    assert not fleet.is_starting()
    fleet.refused(members["10.0.0.1"])
    assert rows(fleet) == [("10.0.0.1", "NOT_READY")]
    assert not fleet.is_starting(), "who asks is refused at once"


def test_replicas_that_listen_by_ipv6_alone_are_shown_so() -> None:
    fleet, members = found(Clock(), "10.0.0.1", "fd00::1")
    passes(fleet, members["fd00::1"], "7")
    assert rows(fleet) == [("fd00::1", "READY")]
    assert fleet.available() == [members["fd00::1"]]


@pytest.mark.parametrize("identity", ["7", SURE, None])
@pytest.mark.parametrize("order", [("10.0.0.1", "fd00::1"), ("fd00::1", "10.0.0.1")])
def test_both_families_that_answer_are_one_replica(identity: str | None, order: tuple[str, str]) -> None:
    clock = Clock()
    fleet, members = found(clock, "10.0.0.1", "fd00::1")
    fleet.settings.max_in_flight = 2
    for address in order:
        passes(fleet, members[address], identity)
        assert len(rows(fleet)) == len(fleet.available()) == 1
    first = members["10.0.0.1"]
    first.limit = 2
    assert fleet.available() == [first]
    places = [claimed(fleet), claimed(fleet)]
    assert claim(fleet) is None
    for place in places:
        place.__exit__(None, None, None)
    fleet.drain(first)
    assert fleet.available() == []
    fleet.undrain(first)
    assert fleet.available() == [first]


def test_replicas_of_both_families_are_each_their_own() -> None:
    fleet, members = found(Clock(), "10.0.0.1", "10.0.0.2", "fd00::9")
    for number, member in enumerate(members.values()):
        passes(fleet, member, str(number))
    assert len(rows(fleet)) == len(fleet.available()) == 3


def test_second_address_takes_over() -> None:
    """A replica's other address is used once the first no longer answers."""
    fleet, members = found(Clock(), "10.0.0.1", "fd00::1")
    for member in members.values():
        passes(fleet, member, "7")
    fleet.refused(members["10.0.0.1"])
    assert fleet.available() == [members["fd00::1"]]


def test_a_seed_that_was_given_to_all_makes_no_aliases() -> None:
    fleet, members = found(Clock(), "10.0.0.1", "10.0.0.2")
    for member in members.values():
        passes(fleet, member, "42")
    assert len(rows(fleet)) == len(fleet.available()) == 2
    listed = fleet_of(3, Clock(), ready=False)
    for member in listed.members.values():
        passes(listed, member, "42")
    assert len(listed.available()) == 3


def test_replica_listed_twice() -> None:
    """A replica that is listed twice is shown twice and used once."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica, f"http://localhost:{replica.port}") as fleet:
            await until(lambda: all(member.has_passed for member in fleet.members.values()))
            assert [member.name for member in fleet.available()] == ["r1"]
            assert fleet.members[2].alias_of == "r1"
            assert [member.name for member in fleet.shown()] == ["r1", "r2"]
            fleet.reconcile([ReplicaListing("r2", f"http://localhost:{replica.port}", id=2)])
            assert [member.name for member in fleet.available()] == ["r2"]

    asyncio.run(play())


@pytest.mark.parametrize("identity", ["7", SURE])
def test_a_thousand_replicas_with_one_identity(identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not compared each with each."""
    fleet, members = found(Clock(), *(f"10.0.{n // 250}.{n % 250}" for n in range(1000)))
    for member in members.values():
        member.identity = identity
        member.ready.verdict = member.service.verdict = Verdict.PASSING
    compared = 0
    stock = aliases._is_same

    def count(first: Member, other: Member) -> bool:
        nonlocal compared
        compared += 1
        return stock(first, other)

    monkeypatch.setattr(aliases, "_is_same", count)
    aliases.sort_out(fleet.members.values())
    assert compared < 10_000
    assert len(fleet.shown()) == (1000 if identity == "7" else 1)
