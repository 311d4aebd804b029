"""Who gets the next place, who is told no and when, with a clock that is moved by hand."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import pytest

from balancer import errors
from balancer.contract.words import State
from balancer.errors import ServeError
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice, RoundRobin
from balancer.routing.prompt import Prompt
from tests.support.fleets import Clock, claimed, fleet_of, listed, make_ready

Got = Claim[Choice] | ServeError


class Door:
    """An admission, and those who came to it by name."""

    def __init__(
        self, members: int = 1, limit: int = 1, weight: Callable[[Hashable], float] | None = None, **more: Any
    ):
        self.clock = Clock()
        self.fleet: Fleet = fleet_of(members, self.clock, max_in_flight=limit, **more)
        self.admission = Admission(self.fleet, RoundRobin(), weight) if weight else Admission(self.fleet, RoundRobin())
        self.got: dict[str, Got] = {}  # in the order in which they got it
        self.waiters: dict[str, Waiter] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.left: set[str] = set()

    async def come(self, name: str, *, generating: bool = True, again: Waiter | None = None) -> Waiter:
        """A request of the key that the name begins with."""
        waiter = again or Waiter(Prompt("/generate", []), generating, [], generating, name.split()[0], self.clock.now)
        self.waiters[name] = waiter
        self.tasks[name] = asyncio.ensure_future(self._claim(name, waiter))
        await self.settled()
        return waiter

    async def _claim(self, name: str, waiter: Waiter) -> None:
        try:
            self.got[name] = self.admission.claim_now(waiter) or await self.admission.claim(waiter)
        except ServeError as error:
            self.got[name] = error

    async def settled(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def leave(self, name: str, after: float = 0.0) -> None:
        """It has its answer."""
        self.clock.move(after)
        claim = self.got[name]
        assert isinstance(claim, Claim)
        assert name in self.there
        claim.__exit__(None, None, None)
        self.left.add(name)
        await self.settled()

    @property
    def there(self) -> list[str]:
        """Who has a place, in the order in which they got it."""
        return [name for name, got in self.got.items() if isinstance(got, Claim) and name not in self.left]

    async def served(self, count: int, takes: float = 0.0) -> list[str]:
        """The next ones that get the one place, each of which leaves again."""
        names = []
        for _ in range(count):
            (name,) = self.there
            await self.leave(name, takes)
            names += self.there
        return names

    async def passes(self, seconds: float) -> None:
        """As the sweep goes over it."""
        for _ in range(int(seconds * 4)):
            self.clock.move(0.25)
            self.admission.expire()
        await self.settled()

    def code(self, name: str) -> str | None:
        """How it was refused, if it was."""
        got = self.got.get(name)
        return got.code if isinstance(got, ServeError) else None


def play(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def played() -> None:
        asyncio.run(test())

    played.__name__ = test.__name__
    played.__doc__ = test.__doc__
    return played


# Whose turn it is


@play
async def test_each_key_has_its_turn_and_in_a_key_who_came_first() -> None:
    door = Door()
    await door.come("hog 0")
    for number in range(1, 5):
        await door.come(f"hog {number}")
    for name in ("one 1", "two 1", "one 2"):
        await door.come(name)
    assert await door.served(7) == ["hog 1", "one 1", "two 1", "hog 2", "one 2", "hog 3", "hog 4"]
    await door.leave("hog 4")
    assert door.fleet.in_flight == door.admission.queue_depth == 0


@play
async def test_one_key_alone_has_all_places() -> None:
    """A single key may have all places, and nobody waits while one is free."""
    door = Door(members=3, limit=2)
    for number in range(10):
        await door.come(f"hog {number}")
    assert len(door.got) == 6
    await door.come("one 1")
    await door.leave("hog 0")
    await door.leave("hog 1")
    assert list(door.got)[6:] == ["hog 6", "one 1"]
    while door.there:
        await door.leave(door.there[0])
    assert len(door.left) == 11
    assert door.fleet.in_flight == door.admission.queue_depth == 0


@play
async def test_a_weight_is_a_part_of_the_places() -> None:
    door = Door(weight=lambda key: 3.0 if key == "heavy" else 1.0)
    await door.come("light 0")
    for number in range(1, 13):
        await door.come(f"heavy {number}")
        await door.come(f"light {number}")
    names = await door.served(12)
    assert sum(name.startswith("heavy") for name in names) == 9


@play
async def test_whose_requests_take_long_has_fewer_turns() -> None:
    door = Door(queue_timeout=10_000)
    await door.come("long 0")
    for number in range(1, 100):
        await door.come(f"long {number}")
        await door.come(f"short {number}")
    for _ in range(80):
        (name,) = door.there
        await door.leave(name, after=6.0 if name.startswith("long") else 2.0)
    for name in [name for name in door.tasks if name not in door.got]:
        door.tasks[name].cancel()
    await door.settled()
    await door.leave(door.there[0])
    # All have left: who waits keeps the share that he came with until then.
    await door.come("other 0")
    for number in range(200, 240):
        await door.come(f"long {number}")
        await door.come(f"short {number}")
    names = await door.served(40)
    short = sum(name.startswith("short") for name in names)
    assert 25 <= short <= 33, "three times as many"


@play
async def test_requests_that_had_a_place_go_first() -> None:
    """Requests that were at a member already go ahead of all that were not, in the order in which they came."""
    door = Door(members=2)
    first = await door.come("hog 0")
    door.clock.move(1)
    second = await door.come("hog 1")
    for number in range(2, 5):
        await door.come(f"hog {number}")
    one, two = (place.member for place in door.got.values() if isinstance(place, Claim))
    first.tried.append(two)  # the other way round they came to nothing
    second.tried.append(two)
    door.fleet.drain(two)
    await door.leave("hog 1")
    await door.come("hog 1 again", again=second)
    with_place = door.got["hog 0"]
    assert isinstance(with_place, Claim)
    assert with_place.member is one
    await door.come("hog 0 again", again=first)
    await door.leave("hog 0")
    assert door.there[-1] == "hog 0 again", "it came before the other"
    await door.leave("hog 0 again")
    assert door.there[-1] == "hog 1 again"
    await door.leave("hog 1 again")
    assert door.there[-1] == "hog 2"


@play
async def test_the_time_that_it_waited_before_counts() -> None:
    door = Door(members=2, queue_timeout=10)
    held = [claimed(door.fleet), claimed(door.fleet)]
    waiter = await door.come("one 1")
    await door.passes(6)
    held[0].__exit__(None, None, None)
    await door.settled()
    got = door.got["one 1"]
    assert isinstance(got, Claim)
    waiter.tried.append(got.member)
    got.__exit__(None, None, None)
    await door.come("one 1 again", again=waiter)
    await door.passes(3.5)
    assert door.code("one 1 again") is None
    await door.passes(1)
    assert door.code("one 1 again") == "queue_timeout"


# When the queue is full


@play
async def test_a_full_queue_belongs_to_nobody_more_than_to_others() -> None:
    door = Door(queue_size=4)
    for number in range(5):
        await door.come(f"hog {number}")
    await door.come("hog 5")
    assert door.code("hog 5") == "queue_full"
    for name, gave_way in (("one 1", "hog 4"), ("two 1", "hog 3"), ("three 1", "hog 2")):
        await door.come(name)
        assert door.code(gave_way) == "queue_full", "the last one of who has most"
        assert name not in door.got
    await door.come("four 1")
    assert door.code("four 1") == "queue_full", "all have as much"
    assert door.admission.queue_depth == 4
    assert await door.served(4) == ["hog 1", "one 1", "two 1", "three 1"]


@play
async def test_who_comes_again_finds_a_place_in_a_full_queue() -> None:
    door = Door(members=2, queue_size=2)
    waiter = await door.come("one 1")
    held = claimed(door.fleet)
    await door.come("hog 1")
    await door.come("hog 2")
    got = door.got["one 1"]
    assert isinstance(got, Claim)
    waiter.tried.append(got.member)
    door.fleet.drain(got.member)
    await door.leave("one 1")
    await door.come("one 1 again", again=waiter)
    assert door.code("hog 2") == "queue_full"
    held.__exit__(None, None, None)
    await door.settled()
    assert isinstance(door.got["one 1 again"], Claim)


@play
async def test_asking_and_generating_are_separate() -> None:
    """Requests that only ask and requests that generate take no places from each other."""
    door = Door(members=1, queue_size=2)
    door.fleet.reconcile([listed(1, state=State.PROVISIONING)])
    for number in (1, 2, 3):
        await door.come(f"one {number}")
        await door.come(f"two {number}", generating=False)
    assert [door.code(name) for name in ("one 3", "two 3")] == ["queue_full"] * 2
    assert door.admission.queue_depth == 4
    await door.passes(2)
    assert door.code("two 1") == "no_replica_ready"
    door.fleet.reconcile([listed(1)])
    make_ready(door.fleet, door.fleet.members[1])
    await door.settled()
    assert isinstance(door.got["one 1"], Claim)


# When it would be in vain


async def overloaded(door: Door, seconds: float, every: float) -> None:
    """One place, whose requests take a second each, and so many that come."""
    due = 0.0
    number = 0
    for tick in range(int(seconds * 4)):
        due += 0.25
        while due >= every:
            due -= every
            number += 1
            await door.come(f"hog {tick}.{number}")
        await door.passes(0.25)
        if tick % 4 == 3:
            await door.leave(door.there[0])


@play
async def test_hopeless_wait_is_refused_at_once() -> None:
    """A request that would wait in vain is refused when it comes, with the time to come again."""
    random.seed(1)
    door = Door(queue_timeout=20)
    began: dict[str, float] = {}
    come = door.come

    async def noted(name: str, **more: Any) -> Waiter:
        began[name] = door.clock.now
        waiter = await come(name, **more)
        refused = door.got.get(name)
        if isinstance(refused, ServeError):
            assert refused.code == "queue_full"
            assert 16 <= (refused.retry_after or 0) <= 40, "as long as the queue is, and up to a half more"
        return waiter

    door.come = noted  # type: ignore[method-assign]
    await overloaded(door, 200, 0.5)
    codes = [door.code(name) for name in door.got]
    assert codes.count("queue_timeout") <= 2, "hardly anybody waits in vain"
    assert codes.count("queue_full") > 150
    served = [waiter.waited for name, waiter in door.waiters.items() if isinstance(door.got.get(name), Claim)]
    assert len(served) >= 195, "and no second is lost"
    assert max(served) <= 20
    await door.come("one 1")
    assert door.code("one 1") is None, "it is long for those who made it so"
    for _ in range(2):
        await door.leave(door.there[0])
    assert isinstance(door.got["one 1"], Claim)
    for task in door.tasks.values():
        task.cancel()


@play
async def test_no_refusal_without_knowledge() -> None:
    """Nobody is refused before anything is known, or because all requests began together."""
    door = Door(limit=50, queue_timeout=20)
    for number in range(110):
        await door.come(f"hog {number}")
    await door.passes(9)
    for number in range(110, 130):
        await door.come(f"hog {number}")
    await door.passes(1)
    for number in range(50):
        await door.leave(f"hog {number}")
    await door.passes(9)
    assert not any(isinstance(got, ServeError) for got in door.got.values())
    assert len(door.got) == 100
    for task in door.tasks.values():
        task.cancel()


@play
async def test_max_pending() -> None:
    """With max_pending a place is free again once the answer has begun, however many answers are in flight."""
    door = Door(limit=256, max_pending=1, queue_timeout=20)
    answering: list[str] = []
    for second in range(60):
        for number in range(2):
            await door.come(f"hog {second}.{number}")
        (name,) = (name for name in door.there if name not in answering)
        claim = door.got[name]
        assert isinstance(claim, Claim)
        claim.begun()
        answering.append(name)
        await door.passes(1)
    assert door.fleet.generating > 50
    assert door.code("hog 59.1") == "queue_full"
    while len(door.there) > 5:
        await door.leave(door.there[0])
    assert 12 <= door.admission.queue_depth <= 20
    assert 1.5 < door.admission.expected_wait() < 3, "behind one other, and each takes a second"
    await door.come("one 1")
    assert door.code("one 1") is None
    for task in door.tasks.values():
        task.cancel()


@play
async def test_no_refusal_while_a_replica_starts() -> None:
    """While a replica starts, nobody is refused because of the expected wait."""
    door = Door(queue_timeout=20)
    await overloaded(door, 100, 0.5)
    for number in range(3):
        await door.come(f"hog last {number}")
    assert door.code("hog last 2") == "queue_full"
    door.fleet.reconcile([listed(2)])
    await door.passes(1)
    for number in range(100):
        await door.come(f"hog new {number}")
        assert door.code(f"hog new {number}") is None
    for task in door.tasks.values():
        task.cancel()


# Told by all that they are full


@play
async def test_retry_after_is_waited_for() -> None:
    """A request that a replica refused is held back for as long as the replica says, and holds back nobody else."""
    door = Door(limit=2)
    waiter = await door.come("one 1")
    await door.leave("one 1")
    assert door.admission.may_wait_on(waiter, 3)
    await door.come("one 1 again", again=waiter)
    await door.come("two 1")
    assert isinstance(door.got["two 1"], Claim)
    await door.passes(2.75)
    assert "one 1 again" not in door.got
    await door.passes(0.25)
    assert isinstance(door.got["one 1 again"], Claim)


@pytest.mark.parametrize(
    ("generating", "settings", "after", "may"),
    [
        (True, {}, 3.0, True),
        (True, {"queue_timeout": 3.0}, 3.0, False),
        (True, {"queue_size": 0}, 3.0, False),
        (False, {}, 3.0, False),
    ],
    ids=["it may", "it would be too late", "nobody may wait", "it only asks"],
)
def test_whether_it_may_wait(generating: bool, settings: dict[str, float], after: float, may: bool) -> None:
    door = Door(**settings)
    waiter = Waiter(Prompt("/generate", []), generating)
    waiter.tried.append(door.fleet.members[1])
    assert door.admission.may_wait_on(waiter, after) is may
    assert bool(waiter.tried) is not may


def test_waits_double() -> None:
    """A request that is refused again waits twice as long each time, until it may wait no longer."""
    door = Door(queue_timeout=60)
    waiter = Waiter(Prompt("/generate", []), True)
    waits = []
    while door.admission.may_wait_on(waiter, 2):
        waits.append(waiter.held_until - door.clock.now)
        waiter.waited += waits[-1]
        door.clock.move(waits[-1])
    assert waits == [2, 4, 8, 16]


def test_messages_say_how_long_it_would_be() -> None:
    error = errors.wait_too_long(83.4, 60, 90)
    assert (error.status, error.code, error.retry_after) == (429, "queue_full", 90)
    assert "about 83 s" in error.message
