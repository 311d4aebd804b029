"""Places at replicas, for the relay; what it learns from its attempts goes back to the fleet, queue and policy."""

from collections.abc import Callable, Hashable
from typing import Final, Protocol

from balancer.errors import ServeError
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member, Verdict
from balancer.fleet.outcome import BROKEN_STATUSES, DOUBTFUL, FAILURES, Outcome
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice
from balancer.routing.prompt import Prompt

# Why a replica was chosen where the policy had no choice: it has what the request builds on; outliers are told apart.
KEEPS: Final = "keeps the answer"
BY_LOT: Final = "by lot"
STALE = 0.05  # seconds after a replica's death in which bytes that it sent before may still be read
# Refusals that more replicas would have avoided; `may_go_on` counts one too when the last replica tried was busy.
TURNED_AWAY = ("queue_full", "queue_timeout")


class Attempt(Protocol):
    """What one attempt at a replica says about the replica."""

    replica_status: int  # of its answer
    full_for: int | None  # seconds for which it says that it is full
    prompt_tokens: int | None
    cached_tokens: int | None
    texts: int  # number of prompts over which the tokens are summed


class Places:
    """Gives a request one place after another while its attempts fail.

    `when_left` hooks are called with a replica that gets no more requests.
    """

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.when_left: list[Callable[[ReplicaAddress], None]] = []
        self._fleet = fleet
        self._admission = admission
        fleet.when_left.append(self._left)

    async def claim(self, waiter: Waiter) -> "Place":
        """The next place, at a replica that the waiter has not tried, after a wait if need be. Raises ServeError."""
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

    def claim_now(self, waiter: Waiter) -> "Place | None":
        """A place at once, or None where `claim` has to read the prompt first, to wait, or to refuse."""
        admission, is_new = self._admission, not (waiter.tried or waiter.rounds)
        if is_new and admission.must_read(waiter.prompt):
            return None
        if (claim := admission.claim_now(waiter)) is None:
            return None
        if is_new:
            admission.arrived_total += waiter.is_generating
        return Place(self._fleet, admission, waiter, claim)

    def hold(self, member: Member, is_generating: bool) -> "Place":
        """A place that a request has there already, given by a process that is gone."""
        waiter = Waiter(Prompt.of([], False), is_generating)
        claim = Claim(self._fleet, Choice(member, "held before"), is_generating)
        return Place(self._fleet, self._admission, waiter, claim)

    @property
    def is_only_one(self) -> bool:
        """Is there no more than one replica?"""
        return len(self._fleet.shown()) < 2

    @property
    def has_any(self) -> bool:
        """Is any replica listed, whatever its state?"""
        return bool(self._fleet.members)

    def named(self, name: str, authority: bytes) -> ReplicaAddress | None:
        """The replica of that name at that HOST:PORT, if there is one now."""
        for member in self._fleet.members.values():
            if member.name == name and member.address.authority == authority:
                return member.address
        return None

    async def may_go_on(self, waiter: Waiter) -> bool:
        """May it claim another place: at a replica that it has not tried, or at any later, if all are full or gone?"""
        if waiter.only is not None:
            return False
        if self._fleet.has_other(waiter.tried) or (waiter.is_generating and self._fleet.can_wake(waiter.tried)):
            return True
        if waiter.full_for is None:
            is_coming = waiter.is_generating and self._fleet.is_starting()
            return self._admission.may_wait_for_return(waiter) or is_coming
        may = self._admission.may_wait_on(waiter, waiter.full_for)
        self._admission.turned_away_total += waiter.is_generating and not may
        return may

    def retry_turn(self) -> int:
        """Retry-After, in whole seconds, for a model that has not got its turn on GPUs that it shares."""
        return self._admission.retry_turn()

    def lives(self, replica: ReplicaAddress, since: float) -> bool:
        """Has the replica given a sign of life since then (loop time, seconds)? Then it did not die."""
        member = next((m for m in self._fleet.members.values() if m.address is replica), None)
        if member is None:
            return False
        # By the clock alone it could not be told: after a pause of this process, what a probe found is not read yet.
        return max(member.last_byte_at, member.alive_at) > since + STALE or member.passed_at > since

    async def read(self, prompt: Prompt, key: Hashable) -> None:
        """Reads a heavy prompt when it is its key's turn."""
        await self._admission.read(prompt, key)

    def _left(self, member: Member) -> None:
        for hook in self.when_left:
            hook(member.address)


class Place:
    """A place at one replica, for one request; the caller must call `end` in any case.

    `reason` and `matched`: why this replica, in the policy's words where it had a choice, and which share of the prompt
    it has probably cached. `waited`: seconds in the queue.
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
        if waiter.only is not None:
            self.reason = KEEPS
        elif claim.trial is not None:
            self.reason = BY_LOT
        self.matched = claim.choice.matched
        self.waited = 0.0

    @property
    def member(self) -> Member:
        return self._member

    @property
    def number(self) -> int:
        """The claim's: it tells this request from others at the same replica."""
        return self._claim.number

    @property
    def wants_begun(self) -> bool:
        """Does anything depend on when its answer begins?"""
        return self._claim.is_pending or self._claim.choice.coming is not None or self._member.said_full_to != 0

    # Reports on the attempt, as it proceeds

    @property
    def alive_at(self) -> float:
        """When the replica, asked during a silence, last said that it is at work (loop time, seconds)."""
        return self._member.alive_at

    def away(self, now: float) -> float:
        """Seconds so far in which the replica had no turn on GPUs that it shares; 0 if it shares none."""
        tenancy = self._member.tenancy
        return tenancy.away(now) if tenancy is not None else 0.0

    def away_for(self, now: float) -> float:
        """Seconds for which it has been waiting for its turn; 0 if it is awake."""
        tenancy = self._member.tenancy
        return now - tenancy.away_since if tenancy is not None and tenancy.is_away else 0.0

    @property
    def is_answering(self) -> bool:
        """Did the replica's server answer /ready of late? One that has left is not asked, and stays what it was."""
        return self._member.ready.verdict is not Verdict.FAILING

    @property
    def is_leaving(self) -> bool:
        """Is the replica drained, or out of the fleet already?"""
        return self._member.is_leaving or not self._fleet.has(self._member)

    @property
    def reasoning_parser(self) -> str | None:
        """By which the replica tells reasoning from answers, in SGLang's words."""
        return self._member.reasoning_parser

    async def continues(self) -> bool:
        """Does its chat template let a begun answer continue? Waits until that is known, just after it became ready."""
        await self._member.continues_known.wait()
        return bool(self._member.continues)

    def doubted(self) -> None:
        """The answer is silent: ask the replica whether it is at work. Called repeatedly while the silence lasts."""
        self._fleet.doubted(self._member)

    def heard(self, at: float) -> None:
        """The last bytes came at that loop time in seconds. Called a few times a second, and at the end."""
        self._member.last_byte_at = max(at, self._member.last_byte_at)

    def begun(self, is_computed: bool) -> None:
        """The first byte of an answer is here; `is_computed`: it answers the prompt, which is therefore cached."""
        self._claim.begun(is_computed)

    def _tell(self, outcome: Outcome, attempt: Attempt) -> None:
        """An attempt ended like this."""
        fleet, member = self._fleet, self._member
        if outcome is Outcome.ANSWERED:
            member.prompt_tokens_total += attempt.prompt_tokens or 0
            member.cached_tokens_total += attempt.cached_tokens or 0
            fleet.answered(self._claim, is_well=attempt.replica_status not in BROKEN_STATUSES)
        elif outcome is Outcome.REFUSED:
            fleet.refused(member)
        elif outcome is Outcome.BUSY:
            if attempt.full_for is not None and not member.is_resting:  # what it said is that others have its GPU
                waiter = self._waiter
                waiter.number = waiter.number or self._claim.number
                waiter.full_for = min(attempt.full_for, waiter.full_for or attempt.full_for)
                fleet.busy(member, attempt.full_for, waiter.number)
        elif outcome in FAILURES:
            fleet.failed(member)
        elif outcome in DOUBTFUL:
            fleet.answered(self._claim, is_well=False)

    def end(self, outcome: Outcome | None, attempt: Attempt) -> None:
        """Gives the place back. No outcome: the attempt was broken off and says nothing about the replica."""
        if outcome is not None:
            self._tell(outcome, attempt)
        self._claim.__exit__(None, None, None)
        waiter = self._waiter
        if outcome is Outcome.ANSWERED:
            if attempt.prompt_tokens and attempt.texts == 1:  # the policy knows only the first prompt of a batch
                choice, policy = self._claim.choice, self._admission.policy
                policy.answered(choice, waiter.prompt, attempt.prompt_tokens, attempt.cached_tokens)
        elif outcome is not None:
            waiter.tried.append(self._member)

    def __repr__(self) -> str:
        return f"<Place at {self.replica.name}: {self.reason}>"
