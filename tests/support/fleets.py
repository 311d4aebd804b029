"""Fleets in any state, without probes or sockets, and with a clock that is moved by hand."""

from collections.abc import Callable
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.spec.settings import ReadinessProbe, Settings


class Clock:
    """The loop's time, moved by hand; seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


class Chosen:
    """A policy's choice, without a policy."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.computing = 0
        self.told: list[str] = []

    def begun(self) -> None:
        self.told.append("begun")

    def over(self) -> None:
        self.told.append("over")


def listed(number: int, **more: Any) -> ReplicaListing:
    return ReplicaListing(
        **{"name": f"r{number}", "endpoint": f"http://127.0.0.1:{8000 + number}", "id": number} | more
    )


def fleet_of(
    size: int,
    clock: Callable[[], float] | None = None,
    *,
    ready: bool = True,
    readiness: ReadinessProbe | None = None,
    capacity_tokens: int | None = 10_000,
    **settings: Any,
) -> Fleet:
    """A fleet with members r1, r2, ... up to `size`, all READY unless `ready` is False; other keywords are settings.

    `capacity_tokens` is the KV pool of each. Without a `clock`, time stands still.
    """
    fleet = Fleet(Settings(**settings), readiness or ReadinessProbe(), clock or Clock())
    fleet.reconcile([listed(number) for number in range(1, size + 1)])
    for member in fleet.members.values():
        member.capacity_tokens = capacity_tokens
        if ready:
            make_ready(fleet, member)
    return fleet


def make_ready(fleet: Fleet, member: Member) -> None:
    """Make a member READY, as two passing probes do."""
    fleet.note_probe(member, member.ready.passed(fleet.clock()))
    fleet.note_probe(member, member.service.passed(fleet.clock()))


def claim(fleet: Fleet, *tried: Member, generating: bool = True) -> Claim[Chosen] | None:
    """A place at the first member that has room."""
    return fleet.claim(lambda members: Chosen(members[0]), generating, tried)


def claimed(fleet: Fleet, *tried: Member, generating: bool = True) -> Claim[Chosen]:
    place = claim(fleet, *tried, generating=generating)
    assert place is not None
    return place


def fail(fleet: Fleet, member: Member, times: int = 5) -> None:
    for _ in range(times):
        fleet.failed(member)


def busy(fleet: Fleet, member: Member, seconds: float) -> None:
    """The member tells two requests, with the numbers 1 and 2, that it is full."""
    for request in (1, 2):
        fleet.busy(member, seconds, request)
