"""Counts requests and tokens on the hot path: the figures behind the metrics and the page.

A request makes about ten observations. prometheus-client takes 1.3 to 2.7 us for each, the classes here 0.2.
balancer/observe/metrics.py shows them.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from balancer.fleet.member import Member
from balancer.observe.record import CLIENT_LEFT, Record

# Upper bounds in seconds, chosen for language models: first tokens take from 20 ms (a cached prompt) to minutes (a long
# queue), tokens from 5 ms (a small model) to a stall of seconds, whole answers up to ten minutes.
TTFT: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
INTER_TOKEN: Final = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30)
DURATION: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600)
WAIT: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
CONNECT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# By how much the predicted cached share of a prompt was off.
MISJUDGED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)

PATHS: Final = frozenset(
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/generate",
        "/v1/embeddings",
        "/v1/models",
        "/v1/realtime",
        "/v1/score",
        "/v1/rerank",
        "/health",
        "/ready",
    ]
)
STATUSES: Final = tuple(f"{hundreds}xx" for hundreds in range(10))
PIECE = 250  # requests counted per call
REMEMBERED = 50  # requests whose routing the page shows


class Histogram:
    """How many values fell between each bound and the one before; the last count is for those above."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class InterTokenHistogram(Histogram):
    """Times between the pieces of streams. Pieces that arrived together count, with no time between them."""

    __slots__ = ("together",)

    def __init__(self) -> None:
        super().__init__(INTER_TOKEN)
        self.together = 0

    def note(self, value: float) -> None:
        if value:  # not super().note(): this runs for every event of every stream
            self.counts[bisect_left(INTER_TOKEN, value)] += 1
            self.total += value
        else:
            self.together += 1

    @property
    def pieces(self) -> int:
        return self.count + self.together


@dataclass(slots=True)
class MemberTally:
    """The counts of one replica, or of the requests that no replica answered."""

    requests: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT))
    inter_token: InterTokenHistogram = field(default_factory=InterTokenHistogram)
    duration: Histogram = field(default_factory=lambda: Histogram(DURATION))
    connect: Histogram = field(default_factory=lambda: Histogram(CONNECT))
    misjudged: Histogram = field(default_factory=lambda: Histogram(MISJUDGED))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: float = 0.0
    # Completion tokens of answers that were not streamed; streamed ones are counted as they pass, by `inter_token`.
    whole_tokens: int = 0


@dataclass(slots=True)
class KeyTally:
    """The counts of one API key."""

    requests: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Tallies:
    """All counts of one balancer. A replica's counts go when it leaves.

    Requests are only recorded when they end, and counted later in one go, which costs a third as much. Call `count`
    before reading the counts, and a few times a second.
    """

    def __init__(self) -> None:
        self._uncounted: deque[Record] = deque()
        self.when_counted: list[Callable[[Record], None]] = []
        self.members: dict[str, MemberTally] = {}
        self.nobody = MemberTally()
        self.keys: defaultdict[str, KeyTally] = defaultdict(KeyTally)
        self.errors: defaultdict[str, int] = defaultdict(int)
        self.retries: defaultdict[str, int] = defaultdict(int)
        self.continued = 0  # answers that broke, and that another replica went on with
        self.not_continued: defaultdict[str, int] = defaultdict(int)  # why others could not go on
        self.queue_wait = Histogram(WAIT)
        self.loop_lag = Histogram(LAG)
        self.bytes_in = 0
        self.bytes_out = 0
        self.routed = 0  # requests that went to a replica
        self.recent: deque[Record] = deque(maxlen=REMEMBERED)  # the latest of them

    # What the proxy tells

    def finished(self, record: Record) -> None:
        self._uncounted.append(record)

    def count(self) -> None:
        """Brings all counts up to date."""
        while self.count_some():
            pass

    def count_some(self) -> bool:
        """Counts for a few milliseconds at most. True if there is more to count."""
        for _ in range(min(PIECE, len(self._uncounted))):
            self._count(self._uncounted.popleft())
        return bool(self._uncounted)

    def _count(self, record: Record) -> None:
        for hook in self.when_counted:
            hook(record)
        tally = self.members.get(record.member, self.nobody)
        path = record.path if record.path in PATHS else "other"
        status = _status(record)
        tally.requests[path, status] += 1
        tally.duration.note(record.duration)
        self.bytes_in += record.bytes_in
        self.bytes_out += record.bytes_out
        if record.error:
            self.errors[record.error] += 1
        for reason in record.retries:
            self.retries[reason] += 1
        self.continued += record.is_continued
        if record.not_continued:
            self.not_continued[record.not_continued] += 1
        if record.connect is not None:
            tally.connect.note(record.connect)
        if record.key:
            self._note_key(record, status)
        if not record.attempts:
            return
        self.queue_wait.note(record.queued)
        self.routed += 1
        self.recent.append(record)
        if record.is_stream and record.first_byte is not None:
            tally.ttft.note(record.first_byte)
        if record.prompt_tokens is not None:
            self._note_tokens(record, tally, record.prompt_tokens)

    def inter_token(self, replica: str) -> InterTokenHistogram:
        """Collects the times between the pieces of one replica's streams, in seconds."""
        return self.members.get(replica, self.nobody).inter_token

    def _note_tokens(self, record: Record, tally: MemberTally, prompt: int) -> None:
        tally.prompt_tokens += prompt
        tally.completion_tokens += record.completion_tokens or 0
        tally.cached_tokens += record.cached_tokens or 0
        if not record.is_stream:
            tally.whole_tokens += record.completion_tokens or 0
        if record.matched is not None and record.cached_tokens is not None and prompt:
            tally.predicted_tokens += record.matched * prompt
            tally.misjudged.note(abs(record.matched - record.cached_tokens / prompt))

    def _note_key(self, record: Record, status: str) -> None:
        key = self.keys[record.key]
        key.requests[status] += 1
        key.prompt_tokens += record.prompt_tokens or 0
        key.completion_tokens += record.completion_tokens or 0

    def keep_keys(self, names: Set[str]) -> None:
        """Drops the counts of all other keys: where keys change often, they would grow for ever."""
        for gone in self.keys.keys() - names:
            del self.keys[gone]

    # What the fleet tells

    def member_joined(self, member: Member) -> None:
        self.count()  # requests that ended at an earlier replica of that name are not this one's
        self.members[member.name] = MemberTally()

    def member_left(self, member: Member) -> None:
        self.count()
        self.members.pop(member.name, None)


def _status(record: Record) -> str:
    """`2xx` to `5xx`, `client_left`, or `broken` for an answer that began well and broke off."""
    if record.status == CLIENT_LEFT:
        return "client_left"
    return "broken" if record.error and record.status < 400 else STATUSES[record.status // 100]
