"""Places at replicas for one relay of several: the coordinator gives them."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from balancer import errors
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.relay.kept_responses import MOST
from balancer.relay.unavailable import FULL_FOR
from balancer.routing.admission import Waiter
from balancer.routing.one_at_a_time import OneAtATime
from balancer.routing.places import STALE, Attempt
from balancer.routing.prompt import Prompt
from balancer.workers.asking import Asking
from balancer.workers.known import KnownReplica, KnownService
from balancer.workers.link import Message
from balancer.workers.messages import (
    GENERATING,
    STREAMED,
    WAITED_FOR,
    Again,
    Asked,
    again_of,
    owner_text,
    restore,
)
from balancer.workers.told_deaths import ToldDeaths

MOST_UNHEARD = 4096  # acquittals kept while there is no coordinator


class RemotePlaces:
    """Implements balancer.relay.places.Places for one service."""

    def __init__(self, service: KnownService, asking: Asking, loop: asyncio.AbstractEventLoop) -> None:
        self.when_left: list[Callable[[ReplicaAddress], None]] = []
        self._service = service
        self._asking = asking
        self._loop = loop
        self._reading = OneAtATime()

    def claim_now(self, waiter: Waiter) -> "RemotePlace | None":
        """Never: the coordinator has to be asked."""
        return None

    async def claim(self, waiter: Waiter) -> "RemotePlace":
        asking, prompt, again = self._asking, waiter.prompt, self._again(waiter)
        blocks = None
        if self._service.reads_prompts:
            if again is None and prompt.is_heavy:
                await self.read(prompt, waiter.key)
            blocks = prompt.blocks
        number = asking.new_number()
        flags = waiter.is_generating * GENERATING | waiter.is_waited_for * WAITED_FOR | prompt.is_streamed * STREAMED
        message = [Asked.CLAIM, number, self._service.ident, flags, owner_text(waiter.key), waiter.arrived_at]
        only = None
        if waiter.only is not None:
            known = asking.by_address.get(waiter.only)
            if known is None:
                raise errors.keeper_gone(waiter.only.name)
            only = known.name, known.url
        if blocks is not None or again is not None or only is not None:
            message += (blocks, again, only)
        place = RemotePlace(asking, number, self._service.ident, waiter)
        given: asyncio.Future[None] = self._loop.create_future()
        asking.wait(number, message, given, place)
        try:
            await given
        except asyncio.CancelledError:
            if number in asking.held:
                place.end(None, NOTHING)  # it was given while the client was leaving
            else:
                asking.leave(number)
            raise
        waiter.waited += place.waited
        return place

    @property
    def is_only_one(self) -> bool:
        return sum(known.service == self._service.ident for known in self._asking.by_address.values()) < 2

    @property
    def has_any(self) -> bool:
        return any(known.service == self._service.ident for known in self._asking.by_address.values())

    def named(self, name: str, authority: bytes) -> ReplicaAddress | None:
        for known in self._asking.by_address.values():
            address = known.address
            if known.service == self._service.ident and address.name == name and address.authority == authority:
                return address
        return None

    async def may_go_on(self, waiter: Waiter) -> bool:
        if waiter.only is not None:
            return False
        may, again = await self._asking.ask(
            Asked.MAY_GO_ON, self._service.ident, waiter.is_generating, self._again(waiter) or again_of_new(waiter)
        )
        if again is not None:
            if not again[0]:
                waiter.tried.clear()
            restore(waiter, again)
        return bool(may)

    def retry_turn(self) -> int:
        """So rarely wanted that the coordinator is not asked: soon."""
        return FULL_FOR

    def lives(self, replica: ReplicaAddress, since: float) -> bool:
        known = self._asking.by_address.get(replica)
        if known is None or known.number < 0:
            return False
        return max(known.last_byte_at, known.alive_at) > since + STALE or known.passed_at > since

    async def read(self, prompt: Prompt, key: Hashable) -> None:
        async with self._reading.of(key):
            prompt.read()
            await asyncio.sleep(0)

    def _again(self, waiter: Waiter) -> Again | None:
        there = self._asking.by_address
        tried: list[KnownReplica] = waiter.tried
        return again_of(waiter, [(one.name, one.url) for one in tried if there.get(one.address) is one])


def again_of_new(waiter: Waiter) -> Again:
    return [[], waiter.waited, waiter.held_until, waiter.rounds, waiter.number, waiter.full_for]


class Nothing:
    """Of an attempt that was never made."""

    replica_status = 0
    full_for: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    texts = 1


NOTHING = Nothing()


class RemotePlace:
    """Implements balancer.relay.places.Place."""

    __slots__ = (
        "_asking",
        "_claim",
        "_heard_at",
        "_known",
        "_waiter",
        "_wants_begun",
        "id",
        "matched",
        "reason",
        "replica",
        "service",
        "waited",
    )

    def __init__(self, asking: Asking, number: int, service: str, waiter: Waiter) -> None:
        self.id = number
        self.service = service
        self._asking = asking
        self._waiter = waiter

    def given(self, known: KnownReplica, said: list[Any]) -> None:
        self._known = known
        self.replica = known.address
        _, _, _, self.reason, self.matched, self.waited, self._claim, self._wants_begun = said

    @property
    def known(self) -> KnownReplica:
        """Where it is; once it is given."""
        return self._known

    @property
    def holding(self) -> list[Any]:
        """What a new coordinator is told of it."""
        known = self._known
        return [self.id, self.service, known.name, known.url, self._waiter.is_generating]

    @property
    def alive_at(self) -> float:
        return self._known.alive_at

    def away(self, now: float) -> float:
        known = self._known
        return known.away_before + (now - known.away_since if known.away_since is not None else 0.0)

    def away_for(self, now: float) -> float:
        known = self._known
        return now - known.away_since if known.is_resting and known.away_since is not None else 0.0

    @property
    def is_answering(self) -> bool:
        return self._known.is_passing

    @property
    def is_leaving(self) -> bool:
        return self._known.is_leaving

    @property
    def reasoning_parser(self) -> str | None:
        return self._known.reasoning_parser

    async def continues(self) -> bool:
        return bool(await self._asking.ask(Asked.CONTINUES, self.id))

    def doubted(self) -> None:
        self._asking.send([Asked.DOUBTED, self.id])

    def heard(self, at: float) -> None:
        self._asking.heard(self._known, at)

    def begun(self, is_computed: bool) -> None:
        if self._wants_begun:
            self._asking.send([Asked.BEGUN, self.id, is_computed])

    def end(self, outcome: Outcome | None, attempt: Attempt) -> None:
        waiter = self._waiter
        said = None if outcome is None else outcome.value
        counts = (attempt.full_for, attempt.prompt_tokens, attempt.cached_tokens, attempt.texts)
        self._asking.send_later([Asked.END, self.id, said, attempt.replica_status, *counts])
        self._asking.held.pop(self.id, None)
        if outcome is None or outcome is Outcome.ANSWERED:
            return
        waiter.tried.append(self._known)
        if outcome is Outcome.BUSY and attempt.full_for is not None and not self._known.is_resting:
            waiter.number = waiter.number or self._claim
            waiter.full_for = min(attempt.full_for, waiter.full_for or attempt.full_for)

    def __repr__(self) -> str:
        return f"<RemotePlace at {self.replica.name}: {self.reason}>"


class OtherRelays:
    """Implements Hearers of balancer.relay.deaths and of balancer.relay.kept_responses.

    `untold` has the id, replica and key of each answer of which no coordinator could be told: there was none, or it did
    not know the replica yet. `deaths` are all that this relay has seen or heard of: each new coordinator is told them,
    for relays that come after it. `clock` gives the loop's time in seconds.
    """

    def __init__(self, service: str, asking: Asking, clock: Callable[[], float]) -> None:
        self.untold: deque[tuple[str, ReplicaAddress, str]] = deque(maxlen=MOST)
        self.deaths = ToldDeaths(clock)
        self._unheard: deque[Message] = deque(maxlen=MOST_UNHEARD)  # acquittals
        self._service = service
        self._asking = asking

    def noted(self, replica: ReplicaAddress, request: bytes, at: float) -> None:
        # By name: a coordinator that has just begun may never hear of a replica that is dead.
        authority = replica.authority.decode("latin-1")
        died = self.deaths.new(self._service, replica.name, authority, request.hex(), at)
        self._asking.send([Asked.DIED, *died])

    def acquitted(self, request: bytes) -> None:
        self.deaths.acquit(request.hex())
        message = [Asked.ACQUITTED, self._service, request.hex()]
        if self._asking.is_up:
            self._asking.send(message)
        else:
            self._unheard.append(message)

    def greeted(self) -> None:
        """There is a coordinator again."""
        while self._unheard:  # before the deaths: some are of the same requests, sent once more since
            self._asking.send(self._unheard.popleft())
        for died in self.deaths.lately():
            self._asking.send([Asked.DIED, *died])

    def learned(self, id_: str, replica: ReplicaAddress, key: str) -> None:
        if (known := self._asking.by_address.get(replica)) is None:
            return
        if self._asking.is_up and known.number >= 0:
            self._asking.send([Asked.KEPT, self._service, known.number, id_, key])
        else:
            self.untold.append((id_, replica, key))
