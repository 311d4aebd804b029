"""A place now, a bounded wait in one queue, or a clear no."""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field

from balancer import errors
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.policies import Choice, Policy
from balancer.routing.prompt import Prompt

MOMENT = 2.0  # seconds that anything waits for a replica that is about to be ready, as where one takes over


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that wants a place; `tried` are the members that it has been to.

    `is_waited_for`: it may wait as long as `start_wait` for a replica that starts; else it waits a moment at most.
    """

    prompt: Prompt
    is_generating: bool
    tried: list[Member] = field(default_factory=list)
    is_waited_for: bool = True


@dataclass(slots=True, eq=False)
class _Queued:
    waiter: Waiter
    place: "asyncio.Future[Claim[Choice]]"
    until: float


class Admission:
    """Gives places at members, in the order of arrival. It looks again whenever the fleet made room."""

    def __init__(self, fleet: Fleet, policy: Policy) -> None:
        self.fleet = fleet
        self.policy = policy
        # Generating requests that came through the door, and those of them that were refused because all was full.
        self.arrived_total = 0
        self.turned_away_total = 0
        self._queue: deque[_Queued] = deque()  # generating requests
        self._plain: deque[_Queued] = deque()  # others: they need a replica, and no room there
        self._reading = asyncio.Lock()
        fleet.when_room.append(self.assign)
        fleet.when_left.append(lambda member: self.policy.forget(member))

    def __repr__(self) -> str:
        waiting = f"{len(self._queue)} generating and {len(self._plain)} other requests waiting"
        return f"<Admission by {self.policy.name}: {waiting}; {self.fleet!r}>"

    @property
    def queue_depth(self) -> int:
        return len(self._queue) + len(self._plain)

    def must_read(self, prompt: Prompt) -> bool:
        """Should the prompt be read before a place is asked for? The policy goes by it, and it is heavy."""
        return self.policy.reads_prompts and prompt.is_heavy

    async def read(self, prompt: Prompt) -> None:
        """Reads a heavy prompt in its turn.

        One at a time, and all else in between: else those that come together would stop the loop for all of them.
        """
        async with self._reading:
            prompt.read()
            await asyncio.sleep(0)

    @property
    def generating_queued(self) -> int:
        return len(self._queue)

    def claim_now(self, waiter: Waiter) -> Claim[Choice] | None:
        """A place at once, or None where the request would have to wait."""
        if self._queue and waiter.is_generating:
            return None
        return self._claim(waiter)

    async def claim(self, waiter: Waiter) -> Claim[Choice]:
        """A place, after a wait if need be; raises ServeError when there is none, or the wait was in vain."""
        settings = self.fleet.settings
        if not self.fleet.has_other(waiter.tried):
            if not self.fleet.is_starting(waiter.is_generating) or not settings.start_wait:
                raise errors.no_replica()
            wait = settings.start_wait if waiter.is_waited_for else min(MOMENT, settings.start_wait)
        else:
            wait = settings.queue_timeout
        if self.queue_depth >= settings.queue_size:
            raise errors.queue_full(settings.queue_size)
        place: asyncio.Future[Claim[Choice]] = asyncio.get_running_loop().create_future()
        queued = _Queued(waiter, place, self.fleet.clock() + wait)
        queue = self._queue if waiter.is_generating else self._plain
        queue.append(queued)
        self.assign()  # who waits already may be waiting for a member that this one need not have
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.exception():
                place.result().__exit__(None, None, None)  # given while the client was leaving
            raise
        finally:
            with contextlib.suppress(ValueError):  # who got a place has left the queue already
                queue.remove(queued)

    def assign(self) -> None:
        """Gives places to those who wait, first come first served."""
        if not self._queue and not self._plain:
            return  # as it is after nearly every request
        for queue in (self._plain, self._queue):
            for queued in list(queue):
                if queued.place.done():
                    continue  # it is leaving by itself
                if claim := self._claim(queued.waiter):
                    queue.remove(queued)
                    queued.place.set_result(claim)
                elif not queued.waiter.tried:
                    break  # who comes later has no better chance; only earlier attempts narrow a request's choice

    def expire(self) -> None:
        """Says no to those who waited out, or who wait for nothing. Call it a few times a second."""
        self.assign()
        now = self.fleet.clock()
        for queued in (*self._plain, *self._queue):
            if not queued.place.done() and (refusal := self._refusal(queued, now)):
                queued.place.set_exception(refusal)

    def _claim(self, waiter: Waiter) -> Claim[Choice] | None:
        return self.fleet.claim(
            lambda members: self.policy.choose(members, waiter.prompt), waiter.is_generating, waiter.tried
        )

    def _refusal(self, queued: _Queued, now: float) -> errors.ServeError | None:
        settings = self.fleet.settings
        if self.fleet.has_other(queued.waiter.tried):
            return errors.queue_timeout(settings.queue_timeout) if now >= queued.until else None
        if now >= queued.until or not self.fleet.is_starting(queued.waiter.is_generating):
            return errors.no_replica()
        return None
