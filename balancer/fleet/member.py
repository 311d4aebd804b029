"""One replica as the balancer knows it: separate facts, and the status that follows from them."""

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Any

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State, Status
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.ejection import Outlier
from balancer.fleet.tenancy import Tenancy
from balancer.spec.settings import ReadinessProbe

UNKNOWN_LIMIT = 256
FAILURES_TO_FAIL = 2
# Seconds for which a probe must fail before its failure is shown: while a replica starts, failures mean nothing.
SHOWN_AFTER = 10.0


class Verdict(enum.Enum):
    """What a probe concludes about a member."""

    UNKNOWN = "unknown"
    PASSING = "passing"
    FAILING = "failing"


@dataclass(slots=True)
class ProbeResult:
    """The result of one probe of one member, and since when it holds (loop time, seconds). Totals are for display."""

    verdict: Verdict = Verdict.UNKNOWN
    since: float = 0.0
    failures: int = 0  # in a row
    passes_total: int = 0
    failures_total: int = 0
    failure: str = ""  # what the last failure was; empty after a pass

    def passed(self, now: float) -> bool:
        """Notes a pass; True when the verdict changed."""
        self.failures, self.failure = 0, ""
        self.passes_total += 1
        return self._change(Verdict.PASSING, now)

    def failed(self, now: float, failure: str = "") -> bool:
        """Notes a failure; True when the verdict changed. A single failure does not undo a pass."""
        self.failure = failure
        self.failures += 1
        self.failures_total += 1
        if self.verdict is Verdict.PASSING and self.failures < FAILURES_TO_FAIL:
            return False
        return self._change(Verdict.FAILING, now)

    def surely_failed(self, now: float, failure: str = "") -> bool:
        """Notes a failure that needs no confirmation (nothing listens there); True when the verdict changed."""
        self.failure = failure
        self.failures = max(self.failures, FAILURES_TO_FAIL)
        self.failures_total += 1
        return self._change(Verdict.FAILING, now)

    def _change(self, verdict: Verdict, now: float) -> bool:
        if verdict is self.verdict:
            return False
        self.verdict, self.since = verdict, now
        return True


@dataclass(slots=True, eq=False, repr=False)
class Member:
    """The fleet's record of one replica's life. A replica that restarts is a new member, whatever its address.

    Times are loop times in seconds. `limit` is how many generating requests it may hold, `capacity_tokens` the size
    of its KV pool (None if unknown).
    """

    id: int
    listing: ReplicaListing
    since: float  # when its life began, as far as the balancer knows
    outlier: Outlier
    readiness: ReadinessProbe
    address: ReplicaAddress = field(init=False)

    alias_of: str = ""  # the name of the member that is the same replica at another address
    is_hidden: bool = False  # only another address of a replica, as far as is known
    draining: bool = False
    refusing: bool = False
    ready: ProbeResult = field(default_factory=ProbeResult)
    service: ProbeResult = field(default_factory=ProbeResult)
    has_passed: bool = False
    ejected_until: float = 0.0
    full_until: float = 0.0
    said_full_to: int = 0  # number of the last request that it refused as full, if it has accepted none since; 0: none
    said_full_at: int = 0  # when, counted in choices like `turn`
    in_flight: int = 0
    lingering: int = 0  # requests that failed here a moment ago and still count as load
    generating: int = 0
    pending: int = 0  # generating requests that it has probably not started; only counted if max_pending is set
    computing: int = 0  # blocks of prompt that it has to compute for answers that have not begun

    limit: int = UNKNOWN_LIMIT
    own_limit: int | None = None  # as the replica itself reports it
    capacity_tokens: int | None = None
    tenancy: Tenancy | None = None  # of a replica that shares its GPUs
    ranks: int = 1  # data-parallel ones; each has its share of the KV pool and of the requests
    identity: str | None = None
    models: tuple[dict[str, Any], ...] = ()  # that it serves, in OpenAI's form
    continues: bool | None = None  # does its chat template let a begun answer continue? None until that is known
    continues_known: asyncio.Event = field(default_factory=asyncio.Event)
    reasoning_parser: str | None = None  # by which it tells reasoning from answers, in SGLang's words
    last_byte_at: float = 0.0
    passed_at: float = 0.0  # when the last /ready was asked that it answered well
    alive_at: float = 0.0  # when it last answered, asked while its streams were silent, that it is working
    busy_since: float = 0.0
    turn: int = 0  # which of all choices was the last to fall on it

    launched_at: float = 0.0
    requests_total: int = 0
    failures_total: int = 0
    cached_tokens_total: int = 0
    prompt_tokens_total: int = 0

    def __post_init__(self) -> None:
        self.address = ReplicaAddress.of(self.listing.name, self.listing.endpoint)
        self.launched_at = self.since - (self.listing.launched_seconds or 0.0)

    def __repr__(self) -> str:
        facts = [f"ready {self.ready.verdict.value}", f"service {self.service.verdict.value}"]
        facts += [f"in flight {self.in_flight} of {self.limit}"]
        facts += [word for word in ("draining", "refusing", "is_hidden") if getattr(self, word)]
        facts += [f"alias of {self.alias_of}"] if self.alias_of else []
        facts += [f"ejected until {self.ejected_until:.1f}"] if self.ejected_until else []
        return f"<Member {self.id} {self.name} at {self.url or 'no place'}, {self.listing.state}: {', '.join(facts)}>"

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def url(self) -> str:
        return self.listing.endpoint

    @property
    def host(self) -> str:
        return self.address.host

    @property
    def port(self) -> int:
        return self.address.port

    @property
    def is_https(self) -> bool:
        return self.address.is_https

    @property
    def authority(self) -> bytes:
        return self.address.authority

    def is_other_life(self, listing: ReplicaListing) -> bool:
        """Does the engine list another start of this replica than the one that this record is about?"""
        before, now = self.listing.state, listing.state
        if now is before:
            return False
        return now is State.PROVISIONING or (now is State.RUNNING and not before.is_before_start)

    def renew(self, listing: ReplicaListing, now: float) -> None:
        """The same life is listed again; some of its facts may have changed."""
        if self.listing.state.is_before_start and not listing.state.is_before_start:
            self.since = now
        if listing.launched_seconds is not None:
            self.launched_at = now - listing.launched_seconds
        self.listing = listing

    @property
    def load(self) -> int:
        """In flight, and failed just now: a member that fails every request at once must not look idle."""
        return self.in_flight + self.lingering

    @property
    def is_leaving(self) -> bool:
        """Is it to finish what it has and take nothing new, by a drain here or by its engine?"""
        return self.draining or self.listing.state is State.SHUTTING_DOWN

    @property
    def probe(self) -> Verdict:
        """Both probes as one: failing if either fails, passing if both pass."""
        if Verdict.FAILING in (self.ready.verdict, self.service.verdict):
            return Verdict.FAILING
        if self.ready.verdict is self.service.verdict is Verdict.PASSING:
            return Verdict.PASSING
        return Verdict.UNKNOWN

    def failing_since(self) -> float:
        """Since when it has been failing; only meaningful while `probe` is failing."""
        return min(probe.since for probe in (self.ready, self.service) if probe.verdict is Verdict.FAILING)

    def is_failing_for(self, seconds: float, now: float) -> bool:
        """Has a probe been failing for longer than that?"""
        return self.probe is Verdict.FAILING and now - self.failing_since() > seconds

    @property
    def is_resting(self) -> bool:
        """Does it doze or sleep, so that it can be woken? Its probes say nothing then."""
        return self.tenancy is not None and self.tenancy.is_away and not self.alias_of and not self.is_hidden

    def status(self, now: float) -> Status:
        """The status that is displayed: the first that applies, in this order."""
        if self.listing.state is State.FAILED:
            return Status.FAILED
        if self.is_leaving:
            return Status.DRAINING if self.in_flight else Status.SHUTTING_DOWN
        if self.listing.state.is_before_start:
            return Status(self.listing.state)
        if not self.has_passed and now - self.since > self.readiness.initial_delay_seconds:
            return Status.FAILED_INITIAL_DELAY
        if not self.has_passed:
            return Status.STARTING
        if self.is_resting:
            return Status(self.tenancy.state)  # type: ignore[union-attr]
        if self.is_failing_for(self.readiness.consecutive_failure_threshold_timeout, now):
            return Status.FAILED_PROBING
        if self.refusing or self.probe is not Verdict.PASSING or self.alias_of or self.is_hidden:
            return Status.NOT_READY
        if self.ejected_until > now:
            return Status.EJECTED
        return Status.READY

    def trouble(self, now: float) -> str:
        """Why it gets no requests, if that has been so for a while; empty if there is nothing to say."""
        if self.listing.reason or self.is_leaving or self.listing.state is not State.RUNNING:
            return self.listing.reason
        if self.alias_of:
            return f"the same replica as {self.alias_of}"
        if self.is_resting:
            return self.tenancy.why_away  # type: ignore[union-attr]
        if self.is_failing_for(SHOWN_AFTER, now):
            return next(
                (p.failure for p in (self.ready, self.service) if p.verdict is Verdict.FAILING and p.failure), ""
            )
        return ""

    def is_available(self, now: float) -> bool:
        """May it be given requests at all? A member that is full is available, too."""
        return self.status(now) is Status.READY
