"""Places at replicas as the relay asks for them; what it learns there goes back to fleet, queue and policy."""

from collections.abc import Callable, Hashable
from typing import Protocol

from balancer.errors import ServeError
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member, Verdict
from balancer.fleet.outcome import BROKEN_STATUSES, DOUBTFUL, FAILURES, Outcome
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice
from balancer.routing.prompt import Prompt

STALE = 0.05  # seconds for which what a replica sent before it died may still be read
TURNED_AWAY = ("queue_full", "queue_timeout")  # more replicas would have taken it; and so for a last one that is busy


class Attempt(Protocol):
    """What one attempt at a replica brought, as far as that says something of the replica."""

    replica_status: int  # of its answer
    full_for: int | None  # seconds for which it says that it is full
    prompt_tokens: int | None
    cached_tokens: int | None
    texts: int  # how many prompts those are the sums of


class Places:
    """Gives each request its places, one after the other, while its attempts fail.

    `when_left` is called with a replica that is given to nobody any more.
    """

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.when_left: list[Callable[[ReplicaAddress], None]] = []
        self._fleet = fleet
        self._admission = admission
        fleet.when_left.append(self._left)

    async def claim(self, waiter: Waiter) -> "Place":
        """The next place, at a replica that the waiter has not been to; after a wait if need be. Raises ServeError."""
        admission = self._admission
        if not (waiter.tried or waiter.rounds):
            admission.arrived_total += waiter.is_generating
            if admission.must_read(waiter.prompt):
                await admission.read(waiter.prompt, waiter.key)
        if (claim := admission.claim_now(waiter)) is not None:
            return Place(self._fleet, admission, waiter, claim)
        asked_at = self._fleet.clock()
        try:
            claim = await admission.claim(waiter)
        except ServeError as error:
            admission.turned_away_total += waiter.is_generating and error.code in TURNED_AWAY
            raise
        place = Place(self._fleet, admission, waiter, claim)
        place.waited = self._fleet.clock() - asked_at
        return place

    def may_go_on(self, waiter: Waiter) -> bool:
        """May it claim another place: at a replica that it has not tried or, if all are full, at any replica later?"""
        if self._fleet.has_other(waiter.tried):
            return True
        if waiter.full_for is None:
            return False
        may = self._admission.may_wait_on(waiter, waiter.full_for)
        self._admission.turned_away_total += waiter.is_generating and not may
        return may

    def lives(self, replica: ReplicaAddress, since: float) -> bool:
        """Has it given a sign of life since then (loop time, seconds)? Then it did not die."""
        member = next((m for m in self._fleet.members.values() if m.address is replica), None)
        if member is None:
            return False
        if max(member.last_byte_at, member.alive_at) > since + STALE:
            return True
        is_asked = self._fleet.clock() > since + STALE + 2 * self._fleet.settings.ready_interval
        return is_asked and member.ready.verdict is Verdict.PASSING

    async def read(self, prompt: Prompt, key: Hashable) -> None:
        """Reads a heavy prompt when it is its key's turn."""
        await self._admission.read(prompt, key)

    def _left(self, member: Member) -> None:
        for hook in self.when_left:
            hook(member.address)


class Place:
    """A place at one replica, for one request; whoever has it calls `end` in any case.

    `reason` and `matched` are the policy's: why this replica, and which share of the prompt it has probably cached.
    `waited`: seconds in the queue.
    """

    __slots__ = ("_admission", "_claim", "_fleet", "_member", "_waiter", "matched", "reason", "replica", "waited")

    def __init__(self, fleet: Fleet, admission: Admission, waiter: Waiter, claim: Claim[Choice]) -> None:
        self._fleet = fleet
        self._admission = admission
        self._waiter = waiter
        self._claim = claim
        self._member = member = claim.member
        self.replica = member.address
        self.reason = claim.choice.reason
        self.matched = claim.choice.matched
        self.waited = 0.0

    # What comes of the attempt, as it comes

    @property
    def alive_at(self) -> float:
        """When the replica last said, asked amid a silence, that it is at work (loop time, seconds)."""
        return self._member.alive_at

    def doubted(self) -> None:
        """The answer is silent: the replica is to be asked whether it is at work. Said again while that goes on."""
        self._fleet.doubted(self._member)

    def heard(self, at: float) -> None:
        """The last bytes came then (loop time, seconds). Said a few times a second, and at the end."""
        self._member.last_byte_at = max(at, self._member.last_byte_at)

    def begun(self, is_computed: bool) -> None:
        """The first byte of an answer is here; `is_computed`: one to the prompt, which is in the cache then."""
        self._claim.begun(is_computed)

    def attempted(self, outcome: Outcome, attempt: Attempt) -> None:
        """That is how an attempt ended. Another may be made at the same place."""
        fleet, member = self._fleet, self._member
        if outcome is Outcome.ANSWERED:
            member.prompt_tokens_total += attempt.prompt_tokens or 0
            member.cached_tokens_total += attempt.cached_tokens or 0
            fleet.answered(self._claim, is_well=attempt.replica_status not in BROKEN_STATUSES)
        elif outcome is Outcome.REFUSED:
            fleet.refused(member)
        elif outcome is Outcome.BUSY:
            if attempt.full_for is not None:
                waiter = self._waiter
                waiter.number = waiter.number or self._claim.number
                waiter.full_for = min(attempt.full_for, waiter.full_for or attempt.full_for)
                fleet.busy(member, attempt.full_for, waiter.number)
        elif outcome in FAILURES:
            fleet.failed(member)
        elif outcome in DOUBTFUL:
            fleet.answered(self._claim, is_well=False)

    def end(self, outcome: Outcome | None, attempt: Attempt) -> None:
        """Gives the place back. No outcome: it was broken off, and nothing is to be learned of it."""
        if outcome is not None:
            self.attempted(outcome, attempt)
        self._claim.__exit__(None, None, None)
        waiter = self._waiter
        if outcome is Outcome.ANSWERED:
            if attempt.prompt_tokens and attempt.texts == 1:  # of a batch the policy knows the first prompt only
                choice, policy = self._claim.choice, self._admission.policy
                policy.answered(choice, waiter.prompt, attempt.prompt_tokens, attempt.cached_tokens)
        elif outcome is not None:
            waiter.tried.append(self._member)

    def __repr__(self) -> str:
        return f"<Place at {self.replica.name}: {self.reason}>"
