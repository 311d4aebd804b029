"""The last fifteen minutes in five-second samples, for the sparklines on the page."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.observe.tally import MemberTally, Tallies
from balancer.routing.admission import Admission

INTERVAL = 5.0  # seconds
KEPT = 180  # samples
LATELY = 12  # samples (a minute) over which figures that need many requests are taken


@dataclass(frozen=True, slots=True)
class Sample:
    """What one replica did in one interval."""

    tokens_per_second: float
    ttft_total: float  # seconds, summed over the streams that ended
    ttft_count: int
    prompt_tokens: int
    cached_tokens: int
    in_flight: int

    @property
    def ttft_seconds(self) -> float | None:
        return self.ttft_total / self.ttft_count if self.ttft_count else None

    @property
    def cached_share(self) -> float | None:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def to_json(self) -> dict[str, float | None]:
        return {
            "tokens_per_second": round(self.tokens_per_second, 2),
            "ttft_seconds": _rounded(self.ttft_seconds),
            "cached_share": _rounded(self.cached_share),
            "in_flight": self.in_flight,
        }


@dataclass(frozen=True, slots=True)
class ServiceSample:
    """What the whole service did in one interval."""

    requests_per_second: float
    queue_depth: int
    in_flight: int

    def to_json(self) -> dict[str, float]:
        return {
            "requests_per_second": round(self.requests_per_second, 2),
            "queue_depth": self.queue_depth,
            "in_flight": self.in_flight,
        }


@dataclass(slots=True, eq=False)
class ReplicaHistory:
    """One replica's samples, oldest first, and its counters as of the last one."""

    tally: MemberTally
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    pieces: int = 0
    ttft_total: float = 0.0
    ttft_count: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def take(self, member: Member, seconds: float) -> None:
        tally = self.tally
        pieces = tally.inter_token.pieces + tally.whole_tokens
        self.samples.append(
            Sample(
                (pieces - self.pieces) / seconds,
                tally.ttft.total - self.ttft_total,
                tally.ttft.count - self.ttft_count,
                tally.prompt_tokens - self.prompt_tokens,
                tally.cached_tokens - self.cached_tokens,
                member.in_flight,
            )
        )
        self.pieces, self.ttft_total, self.ttft_count = pieces, tally.ttft.total, tally.ttft.count
        self.prompt_tokens, self.cached_tokens = tally.prompt_tokens, tally.cached_tokens

    def lately(self) -> Sample:
        """Tokens per second over the last interval, TTFT over the last minute, the cached share over all samples."""
        minute = list(self.samples)[-LATELY:]
        return Sample(
            self.samples[-1].tokens_per_second if self.samples else 0.0,
            sum(sample.ttft_total for sample in minute),
            sum(sample.ttft_count for sample in minute),
            sum(sample.prompt_tokens for sample in self.samples),
            sum(sample.cached_tokens for sample in self.samples),
            self.samples[-1].in_flight if self.samples else 0,
        )


class History:
    """Samples of the service and of each of its replicas. A restarted replica begins without any."""

    def __init__(self, fleet: Fleet, admission: Admission, tallies: Tallies) -> None:
        self.service: deque[ServiceSample] = deque(maxlen=KEPT)
        self.replicas: dict[int, ReplicaHistory] = {}
        self.taken = 0  # samples so far
        self._fleet = fleet
        self._admission = admission
        self._tallies = tallies
        self._requests = 0
        self._last_at = fleet.clock()

    def take(self, now: float) -> None:
        """Takes a sample if one is due; call it a few times a second. `now` is loop time in seconds."""
        seconds = now - self._last_at
        if seconds < INTERVAL:
            return
        self._last_at = now
        self._tallies.count()
        members = self._fleet.members.values()
        self.replicas = {member.id: self._replica(member) for member in members}
        for member in members:
            self.replicas[member.id].take(member, seconds)
        requests = _ended(self._tallies.members[member.name] for member in members) + _ended([self._tallies.nobody])
        # The counts of a replica that left are gone, so the sum may have shrunk.
        rate = max(0, requests - self._requests) / seconds
        in_flight = sum(member.in_flight for member in members)
        self.service.append(ServiceSample(rate, self._admission.queue_depth, in_flight))
        self._requests = requests
        self.taken += 1

    def _replica(self, member: Member) -> ReplicaHistory:
        tally = self._tallies.members[member.name]
        known = self.replicas.get(member.id)
        return known if known is not None and known.tally is tally else ReplicaHistory(tally)


def _ended(tallies: Iterable[MemberTally]) -> int:
    return sum(tally.duration.count for tally in tallies)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
