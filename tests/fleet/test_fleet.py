from collections.abc import Iterable

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State, Status
from balancer.errors import ConfigError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission
from balancer.routing.policies import RoundRobin
from balancer.spec.settings import ReadinessProbe, Settings
from tests.support.fleets import Clock, busy, claim, claimed, fail, fleet_of, listed, make_ready


def names(members: Iterable[Member]) -> list[str]:
    return [member.name for member in members]


def statuses(fleet: Fleet) -> list[str]:
    return [member.status(fleet.clock()).value for member in fleet.members.values()]


class Comings:
    """Who joined and who left, in the order in which the fleet told it."""

    def __init__(self, fleet: Fleet) -> None:
        self.told: list[tuple[str, Member]] = []
        fleet.when_joined.append(lambda member: self.told.append(("joined", member)))
        fleet.when_left.append(lambda member: self.told.append(("left", member)))

    def take(self) -> list[tuple[str, Member]]:
        told, self.told = self.told, []
        return told


# Who is in it


def test_the_same_list_again_changes_nothing() -> None:
    fleet = fleet_of(3, Clock())
    comings, before = Comings(fleet), list(fleet.members.values())
    fleet.reconcile([listed(number) for number in (1, 2, 3)])
    assert list(fleet.members.values()) == before
    assert comings.take() == []


def test_who_is_missing_left_and_who_is_new_joined() -> None:
    fleet = fleet_of(3, Clock())
    comings = Comings(fleet)
    first, second, third = fleet.members.values()
    fleet.reconcile([listed(3), listed(4)])
    assert names(fleet.members.values()) == ["r3", "r4"]
    assert comings.take() == [("left", first), ("left", second), ("joined", fleet.members[4])]
    assert fleet.available() == [third]


def test_a_member_that_left_and_came_back_is_new() -> None:
    clock = Clock()
    fleet = fleet_of(2, clock)
    old = fleet.members[1]
    fail(fleet, old)
    fleet.drain(old)
    fleet.reconcile([listed(2)])
    clock.move(5)
    fleet.reconcile([listed(1), listed(2)])
    new = fleet.members[1]
    assert new is not old
    assert (new.draining, new.ejected_until, new.has_passed, new.failures_total) == (False, 0.0, False, 0)
    assert new.since == clock.now
    assert statuses(fleet) == ["STARTING", "READY"]


@pytest.mark.parametrize(
    "changed", [listed(1, endpoint="http://127.0.0.1:9000"), listed(1, name="other")], ids=["address", "name"]
)
def test_same_id_at_another_address(changed: ReplicaListing) -> None:
    """Another address or name under the same id is another member."""
    fleet = fleet_of(2, Clock())
    comings, old = Comings(fleet), fleet.members[1]
    fleet.reconcile([changed, listed(2)])
    assert comings.take() == [("left", old), ("joined", fleet.members[1])]
    assert fleet.members[1] is not old
    assert statuses(fleet) == ["STARTING", "READY"]


def test_news_of_a_member_keeps_its_facts() -> None:
    clock = Clock()
    fleet = fleet_of(2, clock)
    member = fleet.members[1]
    fleet.reconcile([listed(1, version=2, resources="1x L4", launched_seconds=40.0), listed(2)])
    assert fleet.members[1] is member
    assert (member.listing.version, member.listing.resources) == (2, "1x L4")
    assert clock.now - member.launched_at == 40.0
    assert member.status(clock.now) is Status.READY


def test_replicas_listed_without_ids_get_their_own_and_keep_them() -> None:
    fleet = fleet_of(0, Clock())
    fleet.reconcile([listed(number, id=None) for number in (1, 2, 3)])
    assert {member.name: number for number, member in fleet.members.items()} == {"r1": 1, "r2": 2, "r3": 3}
    fleet.reconcile([listed(number, id=None) for number in (4, 3, 1)])
    assert {member.name: number for number, member in fleet.members.items()} == {"r4": 4, "r3": 3, "r1": 1}
    fleet.reconcile([listed(number, id=None) for number in (2, 3)])
    assert {member.name: number for number, member in fleet.members.items()} == {"r2": 5, "r3": 3}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_given_ids_come_before_made_up_ones(order: tuple[int, int]) -> None:
    fleet = fleet_of(0, Clock())
    fleet.reconcile([listed(7, id=None)])
    both = [listed(7, id=None), listed(8, id=1)]
    fleet.reconcile([both[place] for place in order])
    assert {member.name for member in fleet.members.values()} == {"r7", "r8"}
    assert fleet.members[1].name == "r8"


def test_a_number_that_gave_way_is_given_to_nobody_else() -> None:
    fleet = fleet_of(0, Clock())
    fleet.reconcile([listed(7, id=None)])
    member = fleet.members[1]
    fleet.reconcile([listed(7, id=None), listed(8, id=1), listed(9, id=None)])
    assert {member.name for member in fleet.members.values()} == {"r7", "r8", "r9"}
    assert fleet.has(member)
    fleet.reconcile([listed(7, id=5), listed(9, id=None)])
    fleet.reconcile([listed(number, id=None) for number in (1, 2, 3, 4, 7, 9)])
    assert len(fleet.members) == 6, "nor is one that was given"


@pytest.mark.parametrize(
    ("listing", "what"),
    [([listed(1), listed(1, id=2)], "name"), ([listed(1), listed(2, id=1)], "id")],
)
def test_a_list_that_contradicts_itself_is_refused_whole(listing: list[ReplicaListing], what: str) -> None:
    fleet = fleet_of(3, Clock())
    comings, before = Comings(fleet), dict(fleet.members)
    with pytest.raises(ConfigError, match=f"two replicas have the same {what}"):
        fleet.reconcile(listing)
    assert fleet.members == before
    assert comings.take() == []


def test_a_first_list_that_is_refused_tells_nothing() -> None:
    """Requests go on waiting for a list that holds."""
    fleet = Fleet(Settings(), ReadinessProbe(), Clock())
    with pytest.raises(ConfigError):
        fleet.reconcile([listed(1), listed(1, id=2)])
    assert not fleet.is_told
    fleet.reconcile([])
    assert fleet.is_told


def test_restart_at_the_same_address() -> None:
    """A restart behind the same address is a new member without a past."""
    clock = Clock()
    fleet = fleet_of(2, clock)
    comings, old = Comings(fleet), fleet.members[1]
    fail(fleet, old)
    clock.move(3)
    fleet.restarted(old)
    new = fleet.members[1]
    assert comings.take() == [("left", old), ("joined", new)]
    assert (new.id, new.name, new.url) == (old.id, old.name, old.url)
    assert (new.ejected_until, new.failures_total, new.since) == (0.0, 0, clock.now)
    assert statuses(fleet) == ["STARTING", "READY"]
    fleet.restarted(old)
    assert fleet.members[1] is new


def test_in_flight_at_a_member_that_left() -> None:
    """Requests in flight at a member that left are counted until they end."""
    fleet = fleet_of(1, Clock())
    place = claimed(fleet)
    fleet.restarted(place.member)
    assert (fleet.in_flight, fleet.members[1].in_flight) == (1, 0)
    with place:
        pass
    assert (fleet.in_flight, place.member.in_flight, place.member.generating) == (0, 0, 0)


# What the engine says of it


def test_replica_placed_elsewhere() -> None:
    """A replica that is placed and then runs elsewhere is new, with its whole initial delay."""
    clock = Clock()
    fleet = fleet_of(0, clock, readiness=ReadinessProbe(initial_delay_seconds=100))
    fleet.reconcile([listed(1, state=State.PROVISIONING, endpoint="http://127.0.0.1:9")])
    assert fleet.is_starting()
    clock.move(90)
    fleet.reconcile([listed(1)])
    clock.move(90)
    assert statuses(fleet) == ["STARTING"]
    clock.move(11)
    assert statuses(fleet) == ["FAILED_INITIAL_DELAY"]


def test_replica_placed_there() -> None:
    """A replica that is placed and then runs there has its whole initial delay."""
    clock = Clock()
    fleet = fleet_of(0, clock, readiness=ReadinessProbe(initial_delay_seconds=100))
    fleet.reconcile([listed(1, state=State.PROVISIONING)])
    member = fleet.members[1]
    clock.move(5000)
    assert statuses(fleet) == ["PROVISIONING"]
    fleet.reconcile([listed(1)])
    assert fleet.members[1] is member
    assert statuses(fleet) == ["STARTING"]


@pytest.mark.parametrize("between", [State.PROVISIONING, State.FAILED, State.SHUTTING_DOWN])
def test_replica_that_ended_and_runs_again(between: State) -> None:
    """A replica that ended and runs again at the same address is new."""
    fleet = fleet_of(1, Clock())
    old = fleet.members[1]
    fleet.drain(old)
    fleet.reconcile([listed(1, state=between)])
    assert fleet.available() == []
    fleet.reconcile([listed(1)])
    assert fleet.members[1] is not old
    assert not fleet.members[1].draining
    assert statuses(fleet) == ["STARTING"]


def test_replica_that_is_being_stopped() -> None:
    """A replica that its engine is stopping keeps its requests in flight."""
    fleet = fleet_of(1, Clock())
    with claimed(fleet) as member:
        fleet.reconcile([listed(1, state=State.SHUTTING_DOWN)])
        assert fleet.members[1] is member
        assert statuses(fleet) == ["DRAINING"]
        assert claim(fleet) is None
    assert statuses(fleet) == ["SHUTTING_DOWN"]


@pytest.mark.parametrize(
    ("state", "is_starting"),
    [(State.PROVISIONING, True), (State.RUNNING, True), (State.FAILED, False), (State.SHUTTING_DOWN, False)],
)
def test_a_replica_is_on_its_way_while_it_is_placed_or_loads(state: State, is_starting: bool) -> None:
    fleet = fleet_of(0, Clock())
    fleet.reconcile([listed(1, state=state)])
    assert fleet.is_starting() is is_starting


def test_nothing_is_on_its_way() -> None:
    """No replica is on its way once all have been ready or have failed to become so."""
    clock = Clock()
    fleet = fleet_of(2, clock, readiness=ReadinessProbe(initial_delay_seconds=100))
    fleet.refused(fleet.members[1])
    assert not fleet.is_starting()
    fleet.reconcile([listed(1), listed(2), listed(3)])
    assert fleet.is_starting()
    clock.move(101)
    assert not fleet.is_starting()


# Claims


def test_a_claim_takes_a_place_and_gives_it_back() -> None:
    clock = Clock()
    fleet = fleet_of(1, clock)
    room: list[int] = []
    fleet.when_room.append(lambda: room.append(fleet.in_flight))
    with claimed(fleet) as member:
        assert (member.in_flight, member.generating, fleet.in_flight) == (1, 1, 1)
        assert member.busy_since == clock.now
        assert room == []
    assert (member.in_flight, member.generating, fleet.in_flight) == (0, 0, 0)
    assert member.requests_total == 1
    assert room == [0]


def test_a_claim_is_given_back_when_the_request_fails() -> None:
    fleet = fleet_of(1, Clock())
    with pytest.raises(RuntimeError), claimed(fleet):
        raise RuntimeError
    assert fleet.in_flight == fleet.members[1].in_flight == 0


def test_max_pending() -> None:
    """A member with max_pending unbegun requests gets no more until it begins one or reports room."""
    fleet = fleet_of(1, Clock(), max_pending=2)
    looked: list[int] = []
    fleet.when_room.append(lambda: looked.append(fleet.members[1].pending))
    first, second = claimed(fleet), claimed(fleet)
    assert claim(fleet) is None
    assert claim(fleet, generating=False) is not None
    first.begun()
    first.begun()
    assert looked == [1], "whoever waits may look again, once"
    third = claimed(fleet)
    assert claim(fleet) is None
    fleet.note_queue(fleet.members[1], 0)
    fourth = claimed(fleet)
    assert fleet.members[1].pending == 1
    for place in (first, second, third, fourth):
        place.__exit__(None, None, None)
    assert (fleet.members[1].pending, fleet.members[1].generating) == (0, 0)


def test_without_that_setting_nothing_is_counted() -> None:
    fleet = fleet_of(1, Clock())
    with claimed(fleet):
        assert fleet.members[1].pending == 0


def test_only_generating_requests_count_against_the_limit() -> None:
    fleet = fleet_of(1, Clock(), max_in_flight=2)
    places = [claimed(fleet), claimed(fleet)]
    assert claim(fleet) is None
    other = claimed(fleet, generating=False)
    with places.pop():
        pass
    with other:
        assert claim(fleet) is not None


def test_beside_another_balancer_it_gives_its_share_of_places() -> None:
    fleet = fleet_of(1, Clock(), max_in_flight=4)
    fleet.take_share(0.5)
    places = [claimed(fleet), claimed(fleet)]
    assert claim(fleet) is None
    fleet.take_share(1)  # the other one is gone
    places += [claimed(fleet), claimed(fleet)]
    assert claim(fleet) is None
    fleet.reconcile([listed(1), listed(2)])
    assert [member.limit for member in fleet.members.values()] == [4, 4]


def test_a_full_member_is_passed_over_and_still_available() -> None:
    fleet = fleet_of(2, Clock(), max_in_flight=1)
    assert names([claimed(fleet).member, claimed(fleet).member]) == ["r1", "r2"]
    assert claim(fleet) is None
    assert fleet.has_other([])
    assert len(fleet.available()) == 2


def test_a_member_that_was_tried_is_not_given_again() -> None:
    fleet = fleet_of(2, Clock())
    first, second = fleet.members.values()
    assert claimed(fleet, first).member is second
    assert claim(fleet, first, second) is None
    assert fleet.has_other([first])
    assert not fleet.has_other([first, second])


def test_busy_member_is_full() -> None:
    """A busy member is full for generating requests until its time is over."""
    clock = Clock()
    fleet = fleet_of(1, clock)
    member = fleet.members[1]
    busy(fleet, member, 2)
    assert claim(fleet) is None
    assert member.status(clock.now) is Status.READY
    with claimed(fleet, generating=False):
        clock.move(1.9)
        assert claim(fleet) is None
        clock.move(0.1)
        assert claimed(fleet).member is member


def test_one_request_makes_no_member_full() -> None:
    """What a single request is told again and again makes no member full."""
    fleet = fleet_of(1)
    member = fleet.members[1]
    for _ in range(5):
        fleet.busy(member, 60, 7)
        with claimed(fleet):
            pass


@pytest.mark.parametrize(
    ("generating", "is_well", "is_full"),
    [(True, True, False), (True, False, True), (False, True, True)],
    ids=["it generates for another", "it answers another with an error", "it tells another its models"],
)
def test_who_takes_another_request_in_between_is_not_full(generating: bool, is_well: bool, is_full: bool) -> None:
    """The requests may be such as no replica takes, one a second among a hundred that are served."""
    fleet = fleet_of(1)
    member = fleet.members[1]
    fleet.busy(member, 60, 1)
    with claimed(fleet, generating=generating) as served:
        assert served is member
    place = claimed(fleet, generating=generating)
    place.begun(is_well)
    place.__exit__(None, None, None)
    fleet.busy(member, 60, 2)
    assert (claim(fleet) is None) is is_full


def test_earlier_requests_prove_no_room() -> None:
    """A request that began before a member said it was full does not prove that it has room."""
    fleet = fleet_of(1)
    member = fleet.members[1]
    place = claimed(fleet)
    fleet.busy(member, 60, 1)
    place.begun()
    fleet.busy(member, 60, 2)
    assert claim(fleet) is None
    place.__exit__(None, None, None)


# What happens to them


def test_drained_member() -> None:
    """A drained member finishes its requests and gets no new ones."""
    fleet = fleet_of(2, Clock())
    with claimed(fleet) as member:
        fleet.drain(member)
        assert statuses(fleet) == ["DRAINING", "READY"]
        assert claimed(fleet).member is fleet.members[2]
    assert statuses(fleet) == ["SHUTTING_DOWN", "READY"]


def test_passing_probes_never_undo_a_drain_and_undrain_does() -> None:
    fleet = fleet_of(1, Clock())
    member = fleet.members[1]
    fleet.drain(member)
    fleet.refused(member)
    make_ready(fleet, member)
    assert fleet.available() == []
    fleet.undrain(member)
    assert fleet.available() == [member]


def test_a_drain_outlives_a_restart_of_the_replica() -> None:
    fleet = fleet_of(1, Clock())
    fleet.drain(fleet.members[1])
    fleet.restarted(fleet.members[1])
    make_ready(fleet, fleet.members[1])
    assert fleet.available() == []
    fleet.undrain(fleet.members[1])
    assert names(fleet.available()) == ["r1"]


def test_refused_connection() -> None:
    """A refused connection makes a member unavailable at once and causes a probe."""
    fleet = fleet_of(2, Clock())
    probed: list[Member] = []
    fleet.when_refused.append(probed.append)
    member = fleet.members[1]
    fleet.refused(member)
    assert names(fleet.available()) == ["r2"]
    assert probed == [member]
    assert member.failures_total == 1
    assert member.ejected_until == 0.0


def test_waiting_requests_are_told_when_a_member_becomes_ready() -> None:
    fleet = fleet_of(1, Clock(), ready=False)
    told: list[list[str]] = []
    fleet.when_room.append(lambda: told.append(names(fleet.available())))
    make_ready(fleet, fleet.members[1])
    assert told[-1] == ["r1"]


def test_the_service_is_ready_since_the_first_member_was() -> None:
    clock = Clock()
    fleet = fleet_of(2, clock, ready=False)
    assert fleet.ready_since is None
    clock.move(5)
    make_ready(fleet, fleet.members[2])
    clock.move(5)
    make_ready(fleet, fleet.members[1])
    assert fleet.ready_since == clock.now - 5


# Ejection


def test_failures_eject() -> None:
    """Failures eject a member for a while, and it comes back by itself."""
    clock = Clock()
    fleet = fleet_of(2, clock)
    member = fleet.members[1]
    fail(fleet, member, 4)
    assert len(fleet.available()) == 2
    fail(fleet, member, 1)
    assert statuses(fleet) == ["EJECTED", "READY"]
    assert names(fleet.available()) == ["r2"]
    clock.move(9.9)
    assert names(fleet.available()) == ["r2"]
    clock.move(0.1)
    assert names(fleet.available()) == ["r1", "r2"]


def test_a_second_ejection_lasts_longer_and_five_minutes_at_most() -> None:
    clock = Clock()
    fleet = fleet_of(2, clock)
    member = fleet.members[1]
    spans = []
    for _ in range(40):
        fail(fleet, member)
        spans.append(member.ejected_until - clock.now)
        clock.now = member.ejected_until
    assert spans[:3] == [10, 20, 30]
    assert spans[-2:] == [300, 300]


@pytest.mark.parametrize(("size", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_at_most_half_of_the_members_are_ejected(size: int, most: int) -> None:
    fleet = fleet_of(size, Clock())
    for member in fleet.members.values():
        fail(fleet, member)
    assert statuses(fleet).count("EJECTED") == most
    assert len(fleet.available()) == size - most


def test_the_last_available_member_is_never_ejected() -> None:
    fleet = fleet_of(4, Clock())
    for number in (1, 2):
        fleet.refused(fleet.members[number])
    fleet.drain(fleet.members[3])
    fail(fleet, fleet.members[4], 50)
    assert statuses(fleet) == ["NOT_READY", "NOT_READY", "SHUTTING_DOWN", "READY"]


def test_delayed_ejection() -> None:
    """A member whose ejection had to wait is ejected by its next failure."""
    fleet = fleet_of(2, Clock())
    first, second = fleet.members.values()
    fleet.refused(second)
    fail(fleet, first, 7)
    assert names(fleet.available()) == ["r1"]
    make_ready(fleet, second)
    fail(fleet, first, 1)
    assert names(fleet.available()) == ["r2"]


def test_panic_uses_the_ejected_member_that_is_back_first() -> None:
    clock = Clock()
    fleet = fleet_of(4, clock)
    fail(fleet, fleet.members[1])
    clock.move(1)
    fail(fleet, fleet.members[2])
    fleet.refused(fleet.members[3])
    fleet.drain(fleet.members[4])
    assert statuses(fleet) == ["EJECTED", "EJECTED", "NOT_READY", "SHUTTING_DOWN"]
    assert names(fleet.available()) == ["r1"]
    fleet.refused(fleet.members[1])
    assert names(fleet.available()) == ["r2"]
    fleet.refused(fleet.members[2])
    assert fleet.available() == []


def test_panic_ends_when_another_member_is_ready() -> None:
    fleet = fleet_of(2, Clock())
    first, second = fleet.members.values()
    fail(fleet, first)
    fleet.refused(second)
    assert fleet.available() == [first]
    make_ready(fleet, second)
    assert fleet.available() == [second]


def test_failures_while_ejected() -> None:
    """Failures while a member is ejected do not count towards its next ejection."""
    clock = Clock()
    fleet = fleet_of(2, clock)
    member = fleet.members[1]
    fail(fleet, member)
    fail(fleet, member, 30)  # requests that were in flight already, or panic's
    clock.move(10)
    fail(fleet, member, 4)
    assert statuses(fleet) == ["READY", "READY"]
    assert member.failures_total == 39


def test_failures_of_a_member_that_left_eject_nobody() -> None:
    fleet = fleet_of(2, Clock())
    old = fleet.members[1]
    fleet.restarted(old)
    make_ready(fleet, fleet.members[1])
    fail(fleet, old)
    assert statuses(fleet) == ["READY", "READY"]
    assert old.ejected_until == 0.0


def test_a_fleet_shows_its_members() -> None:
    fleet = fleet_of(2, Clock())
    fleet.drain(fleet.members[2])
    with claimed(fleet):
        assert repr(fleet) == "<Fleet, 1 in flight: 1 r1 READY 1/256, 2 r2 SHUTTING_DOWN 0/256>"
    assert repr(fleet_of(0)) == "<Fleet, 0 in flight: no members>"
    admission = Admission(fleet, RoundRobin())
    assert repr(admission).startswith("<Admission by round_robin: 0 generating and 0 other requests waiting; <Fleet")
