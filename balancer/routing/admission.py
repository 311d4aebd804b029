"""A place now, a bounded wait in a fair queue, or a clear no."""

import asyncio
import math
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from balancer import errors
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.routing.expected_wait import ExpectedWait
from balancer.routing.one_at_a_time import OneAtATime
from balancer.routing.policies import Choice, Policy
from balancer.routing.prompt import Prompt
from balancer.routing.ranked_queue import RankedQueue
from balancer.routing.shares import Shares

MOMENT = 2.0  # seconds that any request waits for a replica that is about to be ready, as when one takes over
# A request that would wait longer than this part of queue_timeout is refused at once: the estimate is not exact, and
# a refusal after a wait is worse.
IN_TIME = 0.8
AGAIN = 0.1  # seconds before a request that all members failed to take is offered to them again; then twice as long
UNKNOWN_WAIT = 5.0  # seconds: Retry-After where the wait cannot be estimated
LONGEST_WAIT = 300.0  # seconds: the maximum Retry-After, before jitter
JITTER = 0.5  # up to this part of the wait is added to Retry-After, so that clients do not return together


@dataclass(slots=True, init=False, eq=False)
class Waiter:
    """A request that wants a place; `tried` are the members that it has been to.

    `is_waited_for`: it may wait `start_wait` for a starting replica; otherwise it waits at most `MOMENT`.
    `key` says whose request it is; keys take turns in the queue. `arrived_at` is a loop time in seconds. `only`: no
    other replica than this one can answer it.
    """

    prompt: Prompt
    is_generating: bool
    tried: list[Any]  # members; in a relay of several, what it knows of them
    is_waited_for: bool
    key: Hashable
    arrived_at: float
    waited: float  # seconds, so far
    held_until: float  # every member was full: do not offer it again before this loop time
    rounds: int  # how often every member was full
    number: int  # of its first claim refused as full: tells it from other requests that members refused
    only: ReplicaAddress | None
    full_for: float | None  # seconds: the shortest time for which a member said it is full, in this round

    def __init__(
        self,
        prompt: Prompt,
        is_generating: bool,
        tried: list[Any] | None = None,
        is_waited_for: bool = True,
        key: Hashable = b"",
        arrived_at: float = 0.0,
    ) -> None:
        self.prompt = prompt
        self.is_generating = is_generating
        self.tried = [] if tried is None else tried
        self.is_waited_for = is_waited_for
        self.key = key
        self.arrived_at = arrived_at
        self.waited = 0.0
        self.held_until = 0.0
        self.rounds = 0
        self.number = 0
        self.only = None
        self.full_for = None


@dataclass(slots=True, eq=False)
class _Queued:
    waiter: Waiter
    place: "asyncio.Future[Claim[Choice]]"
    since: float
    until: float


Waiters = RankedQueue[_Queued]


class Admission:
    """Gives places at members: keys take turns, and the requests of a key go in the order of their arrival.

    It tries again whenever the fleet has room. `weight` gives a key's part of the places while others wait; by default
    all keys are equal.
    """

    def __init__(self, fleet: Fleet, policy: Policy, weight: Callable[[Hashable], float] = lambda _: 1.0) -> None:
        self.fleet = fleet
        self.policy = policy
        # Generating requests that arrived, and how many of them were refused because every replica was full.
        self.arrived_total = 0
        self.turned_away_total = 0
        self._weight = weight
        self._queue = Waiters()  # generating requests
        self._plain = Waiters()  # others: they need a replica, but no room there
        self._tied: dict[_Queued, None] = {}  # both, where only one replica can answer them
        self._is_tied_first = False
        self._shares = Shares()
        self._wait = ExpectedWait(fleet.clock())
        self._reading = OneAtATime()
        self._expired_at = fleet.clock()
        self.when_waiting: list[Callable[[], None]] = []  # called when a request has to wait
        # In how many seconds members that share their GPUs will have their turn; 0: unknown.
        self.turn_in: Callable[[], float] = lambda: 0.0
        fleet.when_room.append(self.assign)
        fleet.when_left.append(lambda member: self.policy.forget(member))
        fleet.when_dozed.append(lambda member: self.policy.forget(member))

    def __repr__(self) -> str:
        waiting = f"{self._queue.size} generating and {self._plain.size} other requests waiting"
        return f"<Admission by {self.policy.name}: {waiting}; {self.fleet!r}>"

    @property
    def queue_depth(self) -> int:
        return self._queue.size + self._plain.size + len(self._tied)

    @property
    def generating_queued(self) -> int:
        return self._queue.size + len(self._tied)

    def oldest(self) -> float:
        """When the oldest request that waits arrived, as a loop time in seconds; inf if none waits."""
        waiting = (queued.waiter.arrived_at for queued in (*self._plain, *self._queue, *self._tied))
        return min(waiting, default=math.inf)

    def queued_of(self, key: Hashable) -> int:
        """How many generating requests of that key wait for their first place."""
        return self._queue.depth(key)

    def expected_wait(self) -> float:
        """Estimated seconds that a generating request of a new key would wait for a place; 0 if unknown."""
        return self._likely_wait(object()) if self._queue.size else 0.0

    def _likely_wait(self, key: Hashable, share: float = 1.0) -> float:
        return self._wait.likely(self._queue.position(key, share), self._places) or 0.0

    @property
    def _places(self) -> int:
        """How many requests the members take at once: while others wait, as many as they have in flight."""
        most = self.fleet.settings.max_pending
        if most is not None:  # a place is free again once its answer has begun
            return max(1, most * len(self.fleet.available()))
        return max(1, self.fleet.generating)

    def retry_turn(self) -> int:
        """Retry-After, in whole seconds, for a model that has not got its turn."""
        return _spread(self.turn_in())

    def must_read(self, prompt: Prompt) -> bool:
        """Must the prompt be read before a place is asked for? True if the policy uses it and it is heavy."""
        return self.policy.reads_prompts and prompt.is_heavy

    async def read(self, prompt: Prompt, key: Hashable = b"") -> None:
        """Reads a heavy prompt when it is its key's turn.

        One prompt at a time, and the event loop runs in between: otherwise prompts that arrive together would block
        it until all of them are read.
        """
        async with self._reading.of(key):
            prompt.read()
            await asyncio.sleep(0)

    def claim_now(self, waiter: Waiter) -> Claim[Choice] | None:
        """A place at once, or None where the request would have to wait."""
        if waiter.only is not None:
            return None if self._tied else self._claim(waiter)
        if waiter.is_generating and (self._queue.size or waiter.held_until):
            return None
        return self._claim(waiter)

    async def claim(self, waiter: Waiter) -> Claim[Choice]:
        """A place, after a wait if need be. Raises ServeError if there is none, or the wait is, or would be, too long.

        Requests that have been at a member already go ahead of all others, in order of arrival.
        """
        if waiter.only is not None:
            return await self._claim_at(waiter, waiter.only)
        patience = self._patience(waiter)
        queue = self._queue if waiter.is_generating else self._plain
        now = self.fleet.clock()
        place: asyncio.Future[Claim[Choice]] = asyncio.get_running_loop().create_future()
        queued = _Queued(waiter, place, now, now + patience - waiter.waited)
        if waiter.tried or waiter.rounds:
            self._make_room(queue, None, 1.0)
            queue.push_again(queued, waiter.arrived_at)
        else:
            share = self._shares.of(waiter.key, self._weight(waiter.key))
            if waiter.is_generating:
                self._refuse_in_vain(waiter.key, share)
            self._make_room(queue, waiter.key, share)
            queue.push(queued, waiter.key, share)
        try:
            return await self._awaited(queued)
        finally:
            queue.remove(queued)  # no effect if it got a place: it has left the queue already

    async def _awaited(self, queued: _Queued) -> Claim[Choice]:
        """The place of a request that has just begun to wait, once it is given."""
        place = queued.place
        self.assign()  # requests already waiting may need a member that this one can do without
        for hook in self.when_waiting:
            hook()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.exception():
                place.result().__exit__(None, None, None)  # the place was given while the client was leaving
            raise
        finally:
            queued.waiter.waited += self.fleet.clock() - queued.since

    def may_wait_on(self, waiter: Waiter, seconds: float) -> bool:
        """Every member has refused the request as full, for that many seconds: may it wait, and be offered again?

        Each time it waits twice as long, so that a request which no replica accepts does not keep them all busy.
        """
        settings = self.fleet.settings
        wait = seconds * 2**waiter.rounds
        if not (waiter.is_generating and settings.queue_size) or waiter.waited + wait >= settings.queue_timeout:
            return False
        self._offer_again(waiter, wait)
        return True

    def may_wait_for_return(self, waiter: Waiter) -> bool:
        """No member took the request: may it wait until one that was ready is so again?"""
        wait = AGAIN * 2**waiter.rounds
        if waiter.waited + wait >= self._return_wait(waiter):
            return False
        self._offer_again(waiter, wait)
        return True

    def _offer_again(self, waiter: Waiter, wait: float) -> None:
        waiter.tried.clear()
        waiter.full_for = None
        waiter.rounds += 1
        waiter.held_until = self.fleet.clock() + wait

    def _return_wait(self, waiter: Waiter) -> float:
        """How long, in seconds, it may wait for a member that was ready to be so again; 0: there is none.

        Once all have been gone for that long, nobody waits for them any more.
        """
        settings = self.fleet.settings
        if not settings.queue_size or not self.fleet.may_return():
            return 0.0
        longest = min(settings.queue_timeout, settings.start_wait)
        if not (waiter.is_generating and waiter.is_waited_for):
            longest = min(MOMENT, longest)
        return max(0.0, longest - self.fleet.gone_for())

    def assign(self) -> None:
        """Gives places to the requests whose turn it is."""
        if self._plain.size or self._queue.size or self._tied:  # rarely so: this is called after every request
            self._is_tied_first = not self._is_tied_first
            if self._is_tied_first:  # by turns, so that neither keeps the others waiting
                self._give_tied()
            self._give(self._plain)
            self._give(self._queue)
            self._give_tied()

    def expire(self) -> None:
        """Refuses requests that have waited too long or have nothing to wait for. Call it a few times a second."""
        self.assign()
        now = self.fleet.clock()
        since, self._expired_at = self._expired_at, now
        if self._queue.size and not self.fleet.available() and self.fleet.can_wake():
            self._stand_still(now - since)
        self._wait.passed(now, self._places if self._queue.size and self.fleet.available() else 0)
        for queued in (*self._plain, *self._queue):
            if not queued.place.done() and (refusal := self._refusal(queued, now)):
                queued.place.set_exception(refusal)
        for queued in self._tied:
            only = queued.waiter.only
            if only is not None and not queued.place.done() and (refusal := self._refusal_at(queued, only, now)):
                queued.place.set_exception(refusal)

    def _stand_still(self, seconds: float) -> None:
        """While no member is awake, the time that a request may wait for room does not pass, within `start_wait`."""
        longest = self.fleet.settings.start_wait
        for queued in self._queue:
            queued.until = max(queued.until, min(queued.until + seconds, queued.since + longest))

    def _give(self, queue: Waiters) -> None:
        now = self.fleet.clock()
        for again in queue.again():
            # Each excludes the members it has tried, so the next may get a place where this one does not.
            if not again.place.done() and again.waiter.held_until <= now and (claim := self._claim(again.waiter)):
                again.waiter.held_until = 0.0
                self._given(queue, again, claim)
        while queued := queue.first():
            if queued.place.done():
                queue.remove(queued)  # its client has left
            elif claim := self._claim(queued.waiter):
                if queue is self._queue:
                    claim.when_over = partial(self._over, queued.waiter.key, now)
                self._given(queue, queued, claim)
            else:
                break

    def _given(self, queue: Waiters, queued: _Queued, claim: Claim[Choice]) -> None:
        queue.take(queued)
        queued.place.set_result(claim)
        if queue is self._queue:
            self._wait.given()

    def _over(self, key: Hashable, since: float) -> None:
        self._shares.note(key, self.fleet.clock() - since)

    def _claim(self, waiter: Waiter) -> Claim[Choice] | None:
        return self.fleet.claim(
            lambda members: self.policy.choose(members, waiter.prompt), waiter.is_generating, waiter.tried, waiter.only
        )

    # Requests that only one replica can answer

    async def _claim_at(self, waiter: Waiter, only: ReplicaAddress) -> Claim[Choice]:
        """A place at that replica, in the order of arrival. Raises ServeError if it takes too long, or it is leaving.

        They wait beside the queue: at its head, one whose replica is full would hold all others up.
        """
        settings, now = self.fleet.settings, self.fleet.clock()
        if self.queue_depth >= settings.queue_size:
            raise errors.queue_full(settings.queue_size, _spread(0.0))
        place: asyncio.Future[Claim[Choice]] = asyncio.get_running_loop().create_future()
        queued = _Queued(waiter, place, now, now + settings.queue_timeout)
        self._tied[queued] = None
        if (refusal := self._refusal_at(queued, only, now)) is not None:
            del self._tied[queued]
            raise refusal
        try:
            return await self._awaited(queued)
        finally:
            self._tied.pop(queued, None)

    def _give_tied(self) -> None:
        full = set()
        for queued in list(self._tied):
            at = queued.waiter.only, queued.waiter.is_generating
            if queued.place.done() or at in full:
                continue
            if claim := self._claim(queued.waiter):
                del self._tied[queued]
                queued.place.set_result(claim)
            else:
                full.add(at)  # the others there need not ask

    def _refusal_at(self, queued: _Queued, only: ReplicaAddress, now: float) -> errors.ServeError | None:
        member = next((m for m in self.fleet.members.values() if m.address is only), None)
        if member is None or member.is_leaving or member in queued.waiter.tried:
            return errors.keeper_gone(only.name)
        if now < queued.until:
            return None
        return errors.queue_timeout(self.fleet.settings.queue_timeout, _spread(0.0))

    # Refusals

    def _patience(self, waiter: Waiter) -> float:
        """How long it may wait, in seconds. Raises ServeError if there is nothing to wait for."""
        settings = self.fleet.settings
        if self.fleet.has_other(waiter.tried):
            return settings.queue_timeout
        if self.fleet.can_wake(waiter.tried):
            if (why := self.fleet.why_away()) or not settings.start_wait:
                raise errors.not_awake(self.retry_turn(), why)
            return settings.start_wait
        if not self.fleet.is_starting(waiter.is_generating) or not settings.start_wait:
            if wait := self._return_wait(waiter):
                return wait + waiter.waited
            raise self._no_replica()
        return settings.start_wait if waiter.is_waited_for else min(MOMENT, settings.start_wait)

    def _refuse_in_vain(self, key: Hashable, share: float) -> None:
        """Raises ServeError if the wait for a place at the present replicas would be too long."""
        if not self._queue.size or not self.fleet.available():
            return
        timeout, position = self.fleet.settings.queue_timeout, self._queue.position(key, share)
        if self._wait.least(position, self._places) > IN_TIME * timeout:
            wait = self._wait.likely(position, self._places) or timeout
            raise errors.wait_too_long(wait, timeout, _spread(wait))

    def _make_room(self, queue: Waiters, key: Hashable | None, share: float) -> None:
        """If the queue is full, refuses the longest line's last request. Raises ServeError if that is this key's."""
        size = self.fleet.settings.queue_size
        if queue.size < size:
            return
        if not size or (last := queue.give_way(key, share)) is None:
            raise errors.queue_full(size, _spread(self._likely_wait(key, share)))
        if not last.place.done():
            last.place.set_exception(errors.queue_full(size, _spread(self._likely_wait(last.waiter.key))))

    def _refusal(self, queued: _Queued, now: float) -> errors.ServeError | None:
        settings = self.fleet.settings
        if self.fleet.has_other(queued.waiter.tried):
            if now < queued.until:
                return None
            wait = self._likely_wait(queued.waiter.key)
            return errors.queue_timeout(settings.queue_timeout, _spread(wait))
        if self.fleet.can_wake(queued.waiter.tried):
            why = self.fleet.why_away()
            return errors.not_awake(self.retry_turn(), why) if why or now >= queued.until else None
        may_come = self.fleet.is_starting(queued.waiter.is_generating) or self._return_wait(queued.waiter)
        return None if may_come and now < queued.until else self._no_replica()

    def _no_replica(self) -> errors.ServeError:
        soon, progress = self.fleet.ready_in(), self.fleet.progress()
        return errors.no_replica(_spread(soon), progress) if soon else errors.no_replica(progress=progress)


def _spread(wait: float) -> int:
    """Retry-After in whole seconds: the expected wait (0: unknown) and some jitter."""
    return max(1, round(min(wait or UNKNOWN_WAIT, LONGEST_WAIT) * random.uniform(1, 1 + JITTER)))
