"""Requests that wait for a place, while the fleet changes under them."""

import asyncio
from collections.abc import Callable

import pytest

from balancer.contract.words import State
from balancer.errors import ServeError
from balancer.fleet.fleet import Fleet
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import RoundRobin
from balancer.routing.prompt import Prompt
from balancer.spec.settings import ReadinessProbe, Settings
from tests.support.fleets import Clock, busy, claimed, fail, fleet_of, listed, make_ready


class Queue:
    """An admission whose one waiting request is asked about."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.admission = Admission(fleet, RoundRobin())
        self.waiting: asyncio.Task[str] | None = None

    async def ask(self) -> None:
        """Has one more request wait."""
        self.waiting = asyncio.ensure_future(self._wait())
        await asyncio.sleep(0)
        assert self.admission.queue_depth == 1

    async def _wait(self) -> str:
        waiter = Waiter(Prompt("/v1/completions", [b"{}"]), is_generating=True)
        assert self.admission.claim_now(waiter) is None
        with await self.admission.claim(waiter) as member:
            return member.name

    async def said(self) -> str | None:
        """The name of the member that it got, or the code of its refusal; None while it waits."""
        assert self.waiting is not None
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if not self.waiting.done():
            return None
        assert self.admission.queue_depth == 0
        error = self.waiting.exception()
        if error is None:
            return self.waiting.result()
        assert isinstance(error, ServeError)
        return error.code


Change = Callable[[Fleet], object]


def third_joins(fleet: Fleet) -> None:
    fleet.reconcile([listed(1), listed(2), listed(3)])
    make_ready(fleet, fleet.members[3])


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (third_joins, "r3"),
        (lambda fleet: fleet.undrain(fleet.members[2]), "r2"),
    ],
    ids=["a member joins and becomes ready", "a drain is taken back"],
)
def test_a_waiting_request_goes_where_room_appears_at_once(change: Change, got: str) -> None:
    async def play() -> None:
        fleet = fleet_of(2, Clock(), max_in_flight=1)
        fleet.drain(fleet.members[2])
        with claimed(fleet):
            queue = Queue(fleet)
            await queue.ask()
            assert await queue.said() is None
            change(fleet)
            assert await queue.said() == got
        assert fleet.in_flight == 0

    asyncio.run(play())


def test_place_that_is_given_back() -> None:
    """A waiting request goes to a member that has finished another one."""

    async def play() -> None:
        fleet = fleet_of(1, Clock(), max_in_flight=1)
        queue = Queue(fleet)
        with claimed(fleet):
            await queue.ask()
            assert await queue.said() is None
        assert await queue.said() == "r1"

    asyncio.run(play())


def test_waiting_for_one_member_alone() -> None:
    """A request that waits for one particular member keeps nobody from a free one.

    It was told by the other that it is busy, and that is over.
    """

    async def play() -> None:
        clock = Clock()
        fleet = fleet_of(2, clock, max_in_flight=1)
        admission = Admission(fleet, RoundRobin())
        prompt = Prompt("/v1/completions", [b"{}"])
        with claimed(fleet) as full:
            other = next(member for member in fleet.members.values() if member is not full)
            tried = asyncio.ensure_future(admission.claim(Waiter(prompt, True, [other])))
            await asyncio.sleep(0)
            assert admission.queue_depth == 1
            waiter = Waiter(prompt, True)
            place = admission.claim_now(waiter) or await asyncio.wait_for(admission.claim(waiter), 5)
            assert place.member is other
            assert not tried.done()
            place.__exit__(None, None, None)
        (await tried).__exit__(None, None, None)
        assert fleet.in_flight == admission.queue_depth == 0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("arrange", "seconds"),
    [
        (lambda fleet: [fleet.drain(fleet.members[2]), busy(fleet, fleet.members[1], 3)], 3.0),
        (lambda fleet: [fail(fleet, fleet.members[1]), busy(fleet, fleet.members[2], 60)], 10.0),
    ],
    ids=["a busy member's time is over", "an ejection ends"],
)
def test_a_waiting_request_is_woken_when_a_time_is_over(arrange: Change, seconds: float) -> None:
    async def play() -> None:
        clock = Clock()
        fleet = fleet_of(2, clock)
        arrange(fleet)
        queue = Queue(fleet)
        await queue.ask()
        clock.move(seconds - 0.1)
        queue.admission.expire()
        assert await queue.said() is None
        clock.move(0.1)
        queue.admission.expire()
        assert await queue.said() == "r1"

    asyncio.run(play())


def test_a_waiting_request_is_refused_when_nobody_is_left() -> None:
    async def play() -> None:
        clock = Clock()
        fleet = fleet_of(2, clock, max_in_flight=1)
        with claimed(fleet), claimed(fleet):
            queue = Queue(fleet)
            await queue.ask()
            fleet.reconcile([listed(2)])
            queue.admission.expire()
            assert await queue.said() is None  # one is still there, though full
            fleet.refused(fleet.members[2])
            queue.admission.expire()
            assert await queue.said() is None  # it may come back
            clock.move(fleet.settings.queue_timeout + 1)
            queue.admission.expire()
            assert await queue.said() == "no_replica_ready"

    asyncio.run(play())


def test_waiting_while_a_replica_starts() -> None:
    """A waiting request goes on waiting while a replica is on its way."""

    async def play() -> None:
        fleet = fleet_of(1, Clock(), max_in_flight=1)
        with claimed(fleet):
            queue = Queue(fleet)
            await queue.ask()
            fleet.reconcile([listed(2, state=State.PROVISIONING)])
            queue.admission.expire()
            assert await queue.said() is None
            fleet.reconcile([listed(2)])
            make_ready(fleet, fleet.members[2])
            assert await queue.said() == "r2"

    asyncio.run(play())


def test_who_waits_in_vain_is_told_how_far_the_start_is() -> None:
    """By how long the last start took, if one has been seen from before it was ready."""

    async def play() -> None:
        clock = Clock()
        fleet = fleet_of(1, clock, ready=False, start_wait=30.0)
        first = fleet.members[1]
        fleet.note_probe(first, first.ready.surely_failed(clock(), "it loads"))
        clock.move(20)
        assert (fleet.progress(), fleet.ready_in()) == ("one has been loading for 20 s", 0)
        clock.move(40)
        make_ready(fleet, first)
        assert fleet.progress() == ""
        fleet.reconcile([listed(2)])
        queue = Queue(fleet)
        await queue.ask()
        clock.move(31)
        queue.admission.expire()
        assert await queue.said() == "no_replica_ready"
        assert queue.waiting is not None
        error = queue.waiting.exception()
        assert isinstance(error, ServeError)
        assert "No replica is ready: one has been loading for 31 s, and the last one took 60 s." in error.message
        assert 29 <= (error.retry_after or 0) <= 60
        clock.move(30)
        assert fleet.ready_in() == 0

    asyncio.run(play())


def test_one_that_was_ready_when_seen_tells_nothing_of_starts() -> None:
    assert fleet_of(1, Clock()).start_took is None


def test_waiting_through_a_restart() -> None:
    """A waiting request survives the restart of the only replica."""

    async def play() -> None:
        fleet = fleet_of(1, Clock(), max_in_flight=1)
        with claimed(fleet):
            queue = Queue(fleet)
            await queue.ask()
            fleet.restarted(fleet.members[1])
            queue.admission.expire()
            assert await queue.said() is None
            make_ready(fleet, fleet.members[1])
            assert await queue.said() == "r1"
        assert fleet.in_flight == 0

    asyncio.run(play())


def test_without_a_replica_the_refusal_says_how_to_get_one() -> None:
    fleet = fleet_of(1, Clock())
    fleet.reconcile([])
    assert "start one (`groundserve scale`" in fleet.progress()
    fleet.is_asleep = True
    assert "a request to a model starts one" in fleet.progress()


def test_a_new_balancer_refuses_nobody_before_it_is_listed() -> None:
    async def play() -> None:
        clock = Clock()
        fleet = Fleet(Settings(), ReadinessProbe(), clock)
        queue = Queue(fleet)
        await queue.ask()
        clock.move(4)
        queue.admission.expire()
        assert await queue.said() is None
        fleet.reconcile([listed(1)])
        make_ready(fleet, fleet.members[1])
        assert await queue.said() == "r1"

    asyncio.run(play())


@pytest.mark.parametrize("is_listed", [True, False], ids=["there are none", "nobody says"])
def test_who_waits_for_a_list_waits_no_longer_than_for_one(is_listed: bool) -> None:
    async def play() -> None:
        clock = Clock()
        fleet = Fleet(Settings(), ReadinessProbe(), clock)
        queue = Queue(fleet)
        await queue.ask()
        if is_listed:
            fleet.reconcile([])
        else:
            clock.move(5)
        queue.admission.expire()
        assert await queue.said() == "no_replica_ready"

    asyncio.run(play())
