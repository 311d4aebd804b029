"""Who is ejected when requests go wrong, under each policy: the member at fault, and nobody for a client's mistakes."""

import heapq
import random
from collections.abc import Callable, Iterator
from itertools import count

import orjson
import pytest

from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import PrefixAware
from balancer.routing.prompt import Prompt
from tests.support.fleets import Clock, claimed, fleet_of

POLICIES = [RoundRobin, LeastLoad, PrefixAware]
GOOD_SECONDS, BAD_SECONDS = 0.5, 0.02
CLIENTS = 20

# Does the request end badly at this member?
Fails = Callable[[bool, Member], bool]


@pytest.fixture(autouse=True)
def fixed_chances() -> None:
    """The same draws in each run: a trial goes by four standard deviations, so about one run in a thousand is wrong."""
    random.seed(11)


def prompt(text: str) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return Prompt("/v1/chat/completions", [orjson.dumps({"stream": True, "messages": messages})])


BAD_PROMPT = prompt("What is on this picture? " * 200)


def drive(fleet: Fleet, policy: Policy, clock: Clock, bad: Iterator[bool], fails: Fails, seconds: float) -> None:
    """Twenty clients, each with a request at a time, of which `bad` says one after the other what they are like.

    All bad ones have one prompt, as a client's that tries the same picture again and again.
    """
    admission, numbers, until = Admission(fleet, policy), count(), clock.now + seconds
    going: list[tuple[float, int, Claim[Choice], bool]] = []

    def begin() -> None:
        is_bad, number = next(bad), next(numbers)
        place = admission.claim_now(Waiter(BAD_PROMPT if is_bad else prompt(f"{number} " * 300), True))
        assert place is not None
        is_failure = fails(is_bad, place.member)
        takes = BAD_SECONDS if is_failure else GOOD_SECONDS * random.uniform(0.8, 1.2)
        heapq.heappush(going, (clock.now + takes, number, place, is_failure))

    for _ in range(CLIENTS):
        begin()
    while clock.now < until and not any(member.ejected_until for member in fleet.members.values()):
        clock.now, _, place, is_failure = heapq.heappop(going)
        fleet.answered(place, not is_failure)
        place.__exit__(None, None, None)
        begin()
    for _, _, place, _ in going:
        place.__exit__(None, None, None)


def ejected(fleet: Fleet) -> list[str]:
    return [member.name for member in fleet.members.values() if member.ejected_until]


def by_chance(share: float) -> Iterator[bool]:
    return iter(lambda: random.random() < share, None)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_failing_member_is_out_in_ten_seconds(size: int, policy: type[Policy]) -> None:
    """A member that fails everything is ejected within ten seconds."""
    clock = Clock()
    fleet = fleet_of(size, clock)
    drive(fleet, policy(), clock, by_chance(0), lambda _, member: member.name == "r1", 10)
    assert ejected(fleet) == ["r1"]


@pytest.mark.parametrize("policy", POLICIES)
def test_failing_member_among_bad_requests(policy: type[Policy]) -> None:
    """It is ejected as quickly if clients make mistakes as well, and if it was healthy for long before."""
    clock = Clock()
    fleet = fleet_of(3, clock)
    drive(fleet, policy(), clock, by_chance(0.2), lambda is_bad, _: is_bad, 60)
    assert ejected(fleet) == []
    drive(fleet, policy(), clock, by_chance(0.2), lambda is_bad, member: is_bad or member.name == "r2", 70)
    assert ejected(fleet) == ["r2"]


@pytest.mark.parametrize("policy", POLICIES)
def test_most_members_may_be_at_fault(policy: type[Policy]) -> None:
    clock = Clock()
    fleet = fleet_of(4, clock)
    drive(fleet, policy(), clock, by_chance(0), lambda _, member: member.name != "r4", 10)
    assert len(ejected(fleet)) == 1
    assert "r4" not in ejected(fleet)


MISTAKES: dict[str, Callable[[], Iterator[bool]]] = {
    "two in five": lambda: by_chance(0.4),
    "all": lambda: by_chance(1),
    "five in a row now and then": lambda: (number % 50 < 5 for number in count()),
    "each second one, in step with the turns": lambda: (number % 2 == 0 for number in count()),
}


@pytest.mark.parametrize("mistakes", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_clients_mistakes_eject_nobody(
    size: int, policy: type[Policy], mistakes: Callable[[], Iterator[bool]]
) -> None:
    clock = Clock()
    fleet = fleet_of(size, clock)
    drive(fleet, policy(), clock, mistakes(), lambda is_bad, _: is_bad, 60)
    assert ejected(fleet) == []


def test_one_member_alone_is_never_ejected() -> None:
    clock = Clock()
    fleet = fleet_of(1, clock)
    drive(fleet, RoundRobin(), clock, by_chance(0), lambda *_: True, 20)
    assert ejected(fleet) == []
    assert fleet.members[1].failures_total > 20


def test_failed_requests_count_as_load_for_a_second() -> None:
    clock = Clock()
    fleet = fleet_of(2, clock)
    failing, other = fleet.members.values()
    for _ in range(3):
        place = claimed(fleet, other)
        fleet.answered(place, is_well=False)
        place.__exit__(None, None, None)
    assert (failing.in_flight, failing.load, other.load) == (0, 3, 0)
    admission = Admission(fleet, LeastLoad())
    places = [admission.claim_now(Waiter(prompt("Hello"), True)) for _ in range(3)]
    assert [place and place.member for place in places] == [other] * 3
    clock.move(1)
    assert claimed(fleet).member is failing
    assert failing.load == 1
