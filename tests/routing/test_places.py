"""What the places say of a replica that broke something off: did it die, or does it live?"""

from balancer.routing.admission import Admission
from balancer.routing.places import STALE, Places
from balancer.routing.policies import RoundRobin
from tests.support.fleets import Clock, fleet_of


def test_only_what_a_replica_did_later_is_a_sign_of_life() -> None:
    """After a pause of this process time has passed, but nobody has looked whether the replica lives."""
    clock = Clock()
    fleet = fleet_of(1, clock)
    places = Places(fleet, Admission(fleet, RoundRobin()))
    (member,) = fleet.members.values()
    died = clock.now
    assert not places.lives(member.address, died)
    clock.now += 60
    assert not places.lives(member.address, died)
    member.passed_at = died  # a probe that it answered just before
    assert not places.lives(member.address, died)
    member.passed_at = died + 0.01
    assert places.lives(member.address, died)
    member.passed_at, member.last_byte_at = 0.0, died + STALE + 0.01
    assert places.lives(member.address, died)
    fleet.reconcile([])
    assert not places.lives(member.address, died)
