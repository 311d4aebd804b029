"""The set of replicas: who is in it, who may be given a request, and who holds how many."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import Phase, Status
from balancer.errors import ConfigError
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.aliases import sort_out
from balancer.fleet.claim import C, Claim
from balancer.fleet.ejection import Outlier
from balancer.fleet.member import UNKNOWN_LIMIT, Member, Verdict
from balancer.fleet.outliers import Outliers
from balancer.fleet.tenancy import Said, Tenancy, TenantState
from balancer.spec.settings import ReadinessProbe, Settings

Clock = Callable[[], float]

# Seconds for which a failed request still counts as load: otherwise a member that fails at once would look idle.
LINGERS = 1.0
# Seconds that a balancer which has just started may take to learn which replicas there are.
FIRST_LIST = 5.0
# Why no replica is ready, where there is none.
ASLEEP = "the service is scaled to zero, and a request to a model starts one"
NONE = "it has no replica now; start one (`groundserve scale`, or `docker compose up --scale`)"


class Fleet:
    """All members. Everything here is synchronous: between two awaits the fleet never changes.

    `clock` gives the loop's time in seconds. `when_room` is called whenever a waiting request might find a place,
    `when_refused` with a member at which nothing listens any more, `when_doubted` with one that should be asked
    whether it is alive, and `when_dozed` with one that gave back its KV cache. `when_shared` is called when it becomes
    known that a member shares its GPUs.
    """

    def __init__(self, settings: Settings, readiness: ReadinessProbe, clock: Clock) -> None:
        self.settings = settings
        self.readiness = readiness
        self.clock = clock
        self.members: dict[int, Member] = {}
        self.outliers = Outliers(clock, self.shown)
        self.when_room: list[Callable[[], None]] = []
        self.when_joined: list[Callable[[Member], None]] = []
        self.when_left: list[Callable[[Member], None]] = []
        self.when_refused: list[Callable[[Member], None]] = []
        self.when_doubted: list[Callable[[Member], None]] = []
        self.when_dozed: list[Callable[[Member], None]] = []
        self.when_shared: list[Callable[[], None]] = []
        self.is_asleep = False  # scaled to zero: a generating request makes the controller start a replica
        self.share = 1.0  # which part of each member's limit is ours, beside other balancers
        self.in_flight = 0  # requests at members, including members that have left
        self.generating = 0  # those of them that generate
        self.turns = 0  # choices so far
        self.models: dict[str, dict[str, Any]] = {}  # as the members list them, by name; while there are none, the last
        self.ready_since: float | None = None  # when a member first became ready
        self.start_took: float | None = None  # seconds from the last start of a member until it was ready
        self._available: list[Member] = []
        self._available_until = 0.0
        self._gone_at = math.inf  # since when no member has been available; inf while one is
        self._last_id = 0
        self._began = clock()
        self._is_listed = False  # it is known which replicas there are, if any
        self._lingering: deque[tuple[float, Member]] = deque()  # failed requests, and until when each counts as load

    def __repr__(self) -> str:
        now = self.clock()
        members = (f"{m.id} {m.name} {m.status(now)} {m.in_flight}/{m.limit}" for m in self.members.values())
        return f"<Fleet, {self.in_flight} in flight: {', '.join(members) or 'no members'}>"

    # Who is in it

    def reconcile(self, listings: Iterable[ReplicaListing]) -> None:
        """Makes the members those of `listings`. The same name, address, id and life is the same member; anything else
        is a new one.

        An id that the fleet assigned itself, because the listing had none, is replaced by the one that it has now.
        Raises ConfigError, and changes nothing, if two listings have the same name or id.
        """
        wanted = list(listings)
        ids = {listing.id for listing in wanted if listing.id is not None}
        if len({listing.name for listing in wanted}) < len(wanted):
            raise ConfigError("two replicas have the same name: give each its own")
        if len(ids) < sum(listing.id is not None for listing in wanted):
            raise ConfigError("two replicas have the same id: give each its own")
        self._is_listed = True
        known = {(member.name, member.url): member for member in self.members.values()}
        before, self.members = self.members, {}
        for listing in wanted:
            member = known.get((listing.name, listing.endpoint))
            number = listing.id
            if number is None:
                number = member.id if member and member.id not in ids else self._next_id(ids)
            self._last_id = max(self._last_id, number)
            is_renumbered = member is not None and member.id != number and member.listing.id is not None
            if member is None or is_renumbered or member.is_other_life(listing):
                member = self._new_member(listing, number)
            else:
                member.id = number
                member.renew(listing, self.clock())
            self.members[number] = member
        for member in before.values():
            if not self.has(member):
                self._tell(self.when_left, member)
        stayed = set(before.values())
        for member in self.members.values():
            if member not in stayed:
                self._tell(self.when_joined, member)
        self._collect_models()
        self.changed()

    def restarted(self, member: Member) -> None:
        """Another process answers at this address now: a new member, without a past, takes the place of this one.

        A drain carries over: only `undrain` ends it.
        """
        if not self.has(member):
            return
        fresh = self._new_member(member.listing, member.id)
        fresh.draining = member.draining
        self.members[member.id] = fresh
        self._tell(self.when_left, member)
        self._tell(self.when_joined, fresh)
        self.changed()

    def note_models(self, member: Member, models: Sequence[dict[str, Any]]) -> None:
        """The member lists these models, in OpenAI's form, each with an `id`."""
        member.models = tuple(models)
        self._collect_models()

    def _collect_models(self) -> None:
        listed = {str(model["id"]): model for member in self.members.values() for model in member.models}
        self.models = listed or self.models

    def _next_id(self, taken: Collection[int]) -> int:
        number = self._last_id + 1
        while number in taken:
            number += 1
        return number

    def _new_member(self, listing: ReplicaListing, number: int) -> Member:
        outlier = Outlier(self.settings.ejection_time, self.settings.max_ejection_time)
        member = Member(number, listing, self.clock(), outlier, self.readiness)
        member.limit = self.limit_of(member)
        return member

    def limit_of(self, member: Member) -> int:
        """How many generating requests it may hold: as configured, else as it reports, else what is safe to assume.

        With other balancers beside us, our share of that.
        """
        limit = self.settings.max_in_flight or member.own_limit or UNKNOWN_LIMIT
        return limit if self.share == 1 else math.ceil(limit * self.share)

    def take_share(self, share: float) -> None:
        """Another share of each limit is ours from now on."""
        if share != self.share:
            self.share = share
            for member in self.members.values():
                member.limit = self.limit_of(member)
            self.changed()

    def renew(self, readiness: ReadinessProbe) -> None:
        """Settings or the readiness probe changed: the new ones apply to all members from now on."""
        self.readiness = readiness
        for member in self.members.values():
            member.readiness = readiness
            member.limit = self.limit_of(member)
            member.outlier.base, member.outlier.longest = self.settings.ejection_time, self.settings.max_ejection_time
        self.changed()

    def _tell(self, hooks: list[Callable[[Member], None]], member: Member) -> None:
        for hook in hooks:
            hook(member)

    def has(self, member: Member) -> bool:
        """Is this very record, not another life of the same replica, still in the fleet?"""
        return self.members.get(member.id) is member

    def shown(self) -> list[Member]:
        """The members that are replicas of their own, without second addresses of the same one."""
        return [member for member in self.members.values() if not member.is_hidden]

    # Who may be given a request

    def available(self) -> list[Member]:
        """The members that may be given requests now, including full ones. The caller must not change the list."""
        now = self.clock()
        if now >= self._available_until:
            self._available = [member for member in self.members.values() if member.is_available(now)]
            ends = [member.ejected_until for member in self.members.values() if member.ejected_until > now]
            self._available_until = min(ends, default=math.inf)
            if not self._available:
                self._available = self._least_bad(now)
        return self._available

    def _least_bad(self, now: float) -> list[Member]:
        """The panic rule: if only ejected members are left, the one that returns first is used after all."""
        ejected = [member for member in self.members.values() if member.status(now) is Status.EJECTED]
        return [min(ejected, key=lambda member: member.ejected_until)] if ejected else []

    def claim(
        self,
        choose: Callable[[Sequence[Member]], C],
        is_generating: bool,
        tried: Collection[Member] = (),
        only: ReplicaAddress | None = None,
    ) -> Claim[C] | None:
        """Chooses a member that has room and was not tried, and takes a place there; None if there is none.

        `only`: no other than the member there. Only generating requests count against a member's limits.
        """
        candidates: Sequence[Member] = self.available()
        if tried:
            candidates = [member for member in candidates if member not in tried]
        if is_generating:
            now = self.clock()
            candidates = [m for m in candidates if m.generating < m.limit and m.full_until <= now]
            if (max_pending := self.settings.max_pending) is not None:
                candidates = [m for m in candidates if m.pending < max_pending]
        elif not candidates:
            candidates = [m for m in self.resting() if m not in tried]  # what needs no GPU is answered without one
        if only is not None:
            candidates = [m for m in candidates if m.address is only]
        if not candidates:
            return None
        self._lift()
        trial = None
        if not tried and only is None:
            candidates, trial = self.outliers.deal(candidates)
        return Claim(self, choose(candidates), is_generating, trial)

    def has_other(self, tried: Collection[Member]) -> bool:
        """Is there an available member, full or not, that has not been tried?"""
        return any(member not in tried for member in self.available())

    def can_wake(self, tried: Collection[Member] = ()) -> bool:
        """Is there a member that has not been tried, and would serve once it is woken?"""
        return any(member not in tried for member in self.resting())

    def why_away(self) -> str:
        """Why no member can be woken, in words; empty if one can, or nobody knows."""
        reasons = [member.tenancy.cannot_wake for member in self.resting() if member.tenancy]
        return reasons[0] if reasons and all(reasons) else ""

    def progress(self) -> str:
        """How far a replica is that starts, or why none does, in words; empty if nobody knows."""
        if not self.members:
            return ASLEEP if self.is_asleep else NONE
        for member in self.shown():
            if member.listing.state.is_before_start and member.listing.reason:
                return member.listing.reason
        if not (loading := self._loading_for()):
            return ""
        last = "" if self.start_took is None else f", and the last one took {self.start_took:.0f} s"
        return f"one has been loading for {loading:.0f} s{last}"

    def ready_in(self) -> float:
        """In how many seconds a replica that loads will be ready, if it takes as long as the last one; 0: unknown."""
        loading = self._loading_for()
        return max(0.0, self.start_took - loading) if loading and self.start_took is not None else 0.0

    def _loading_for(self) -> float:
        """Seconds for which the replica has been loading that will probably be ready first; 0 if none is."""
        now = self.clock()
        return max((now - m.launched_at for m in self.shown() if m.status(now) is Status.STARTING), default=0.0)

    @property
    def is_told(self) -> bool:
        """Is it known which replicas there are, or too late to wait for that?"""
        return self._is_listed or self.clock() - self._began >= FIRST_LIST

    def is_starting(self, wakes: bool = True) -> bool:
        """Is there a replica that has not been ready yet and may still become so, or will one soon be heard of?

        `wakes`: if the service is scaled to zero, the request that asks makes it start one.
        """
        now = self.clock()
        return (
            not self.is_told
            or (wakes and self.is_asleep)
            or any(m.status(now).phase is Phase.PENDING for m in self.shown())
        )

    def may_return(self) -> bool:
        """Is there a replica that was ready, is not now, and may be so again?"""
        now = self.clock()
        return any(member.status(now).phase is Phase.UNAVAILABLE for member in self.shown())

    def gone_for(self) -> float:
        """Seconds for which no member has been available; 0 while one is."""
        return max(0.0, self.clock() - self._gone_at)

    def room_made(self) -> None:
        """A place was given back, or a member became available: requests that wait may look again."""
        for hook in self.when_room:
            hook()

    def changed(self) -> None:
        """A fact about some member changed: everything derived from it is out of date."""
        sort_out(self.members.values())
        self._available_until = 0.0
        self._gone_at = math.inf if self.available() else min(self._gone_at, self.clock())
        self.room_made()

    # What happens to them

    def drain(self, member: Member) -> None:
        """No new claims; what is in flight finishes. Only `undrain` ends it."""
        member.draining = True
        self.changed()

    def undrain(self, member: Member) -> None:
        member.draining = False
        self.changed()

    def refused(self, member: Member) -> None:
        """The relay found nothing listening: the member is unavailable and probed again, both at once."""
        self._count_failure(member)
        if member.ready.surely_failed(self.clock()):
            self.changed()
        self._tell(self.when_refused, member)

    def doubted(self, member: Member) -> None:
        """One of its answers has stalled: the member is asked whether it still works; `alive_at` records a yes."""
        self._tell(self.when_doubted, member)

    def busy(self, member: Member, seconds: float, request: int) -> None:
        """It told a request that it is full; from the second such request in a row on, it counts as full.

        A full member is not broken, but gets no generating requests for that many seconds. One request alone proves
        nothing: it may be one that no replica accepts, and would block the service for everybody. `request` is the
        number of the request's first claim.
        """
        if member.said_full_to not in (0, request):
            member.full_until = self.clock() + seconds
        member.said_full_to, member.said_full_at = request, self.turns

    def note_queue(self, member: Member, waiting: int) -> None:
        """The length of its own queue, as it reports it: more reliable than what first bytes tell the balancer."""
        has_room = waiting < member.pending
        member.pending = waiting
        if has_room:
            self.room_made()

    def answered(self, place: Claim[C], is_well: bool) -> None:
        """It answered. If not `is_well`, either the request or the member may be to blame."""
        member = place.member
        if not is_well:
            self._count_failure(member)
        if self.has(member) and self.outliers.answered(member, is_well, place.trial):
            self.changed()

    def failed(self, member: Member) -> None:
        """It failed a request, by its own fault. Enough failures eject it, but never more than half of all members."""
        self._count_failure(member)
        if self.has(member) and self.outliers.failed(member):
            self.changed()

    def said(self, member: Member, said: Said) -> None:
        """The member says how it stands with its turn. Ignored while an order to it is under way."""
        now = self.clock()
        if (tenancy := member.tenancy) is None:
            tenancy = member.tenancy = Tenancy(said.gpus, TenantState.STARTING, now, idle_since=now)
            for hook in self.when_shared:
                hook()
        was_lost, tenancy.is_lost = tenancy.is_lost, False
        tenancy.gpus = said.gpus
        if tenancy.is_told:
            return
        tenancy.problem, tenancy.starting = said.problem, said.starting
        if said.state is not tenancy.state:
            self.moved(member, said.state, now - said.seconds)
        elif was_lost:
            self.changed()

    def moved(self, member: Member, state: TenantState, at: float | None = None) -> None:
        """A member that shares its GPUs entered this state (at that loop time, by default now)."""
        now = self.clock()
        at = now if at is None else at
        if (tenancy := member.tenancy) is None or state is tenancy.state:
            return
        was_away, since = tenancy.state.is_away, tenancy.away_since
        if state is TenantState.AWAKE:
            tenancy.cannot_wake = ""
        tenancy.enter(state, at)
        if state.is_away and not was_away:
            self._tell(self.when_dozed, member)
            if not member.has_passed:
                # It has started, which is as good as a probe: once it is woken, requests must not wait for one.
                member.ready.passed(now)
                member.service.passed(now)
                member.has_passed = True
                self.ready_since = now if self.ready_since is None else self.ready_since
        elif was_away and not state.is_away:
            # Its clocks have stood still.
            member.alive_at, member.refusing = now, False
            member.ready.since += now - since
            member.service.since += now - since
        self.changed()

    def lost(self, member: Member) -> None:
        """A member that shares its GPUs does not say any more how it stands with its turn."""
        if member.tenancy is not None and not member.tenancy.is_lost:
            member.tenancy.is_lost = True
            self.changed()

    def resting(self) -> list[Member]:
        """The members that doze or sleep, and could serve if they were woken."""
        now = self.clock()
        return [m for m in self.members.values() if m.is_resting and m.status(now).phase is Phase.READY]

    def serving(self) -> list[Member]:
        """The members that serve: those that may be given requests now, then those that can be woken for them."""
        return [*self.available(), *self.resting()]

    def _count_failure(self, member: Member) -> None:
        member.failures_total += 1
        member.lingering += 1
        self._lingering.append((self.clock() + LINGERS, member))

    def _lift(self) -> None:
        """Failed requests that have lingered long enough no longer count as load."""
        while self._lingering and self._lingering[0][0] <= self.clock():
            self._lingering.popleft()[1].lingering -= 1

    def note_probe(self, member: Member, has_changed: bool) -> None:
        """A probe of this member ended; `has_changed`: with another result than the last one."""
        if not member.has_passed and member.probe is Verdict.PASSING and not member.refusing:
            member.has_passed = has_changed = True
            if member.ready.failures_total:  # else it had started before it was seen
                self.start_took = self.clock() - member.launched_at
            if self.ready_since is None:
                self.ready_since = self.clock()
        if has_changed:
            self.changed()
