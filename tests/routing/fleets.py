"""Members for routing tests: ready, with the load and the KV pool that a test wants; no sockets, an own clock."""

from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Listed, Member
from balancer.spec.settings import ReadinessProbe, Settings


def fleet_of(count: int, capacity_tokens: int | None = 10_000, limit: int = 256, **settings: object) -> Fleet:
    """A fleet of `count` READY members whose clock stands at 100 s."""
    fleet = Fleet(Settings.from_mapping(settings), ReadinessProbe(), lambda: 100.0)
    fleet.reconcile([Listed(f"r{n}", f"http://127.0.0.1:{9000 + n}") for n in range(1, count + 1)])
    for member in fleet.members.values():
        make_ready(fleet, member)
        member.capacity_tokens = capacity_tokens
        member.limit = limit
    return fleet


def make_ready(fleet: Fleet, member: Member) -> None:
    """As the prober would after both questions passed."""
    member.ready.passed(fleet.clock())
    member.service.passed(fleet.clock())
    member.has_passed = True
    fleet.changed()
