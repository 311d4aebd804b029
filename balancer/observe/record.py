"""What is kept about a request once it has ended: the source of its log line and of the metrics."""

from dataclasses import dataclass
from typing import Protocol

from balancer.observe.trace_context import Trace

CLIENT_LEFT = 499  # nginx's status for a client that left; seen only in logs and metrics


@dataclass(slots=True, init=False)
class Record:
    """One request. Times are loop times, durations in seconds, sizes in bytes; None is unknown or not applicable.

    `__init__` is written out, because mypyc compiles that, and not what `dataclass` makes.
    """

    id: str
    method: str
    path: str
    received_at: float
    status: int
    member: str
    attempts: int
    queued: float
    # How long connecting to the replica took; None if an idle connection was used.
    connect: float | None
    # Why each retry was made: how the attempt before it failed (fleet/outcome.py), or "race" if a kept-alive connection
    # was closing just as the request was sent on it, which does not count as an attempt.
    retries: tuple[str, ...]
    is_stream: bool
    first_byte: float | None
    duration: float
    bytes_in: int
    bytes_out: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reason: str
    matched: float | None  # share of the prompt that the policy expected to find in the replica's cache
    client: str  # its address; the one that a trusted proxy names
    key: str
    error: str
    replica_status: int  # the replica's own, of the last attempt that was answered; `status` is the client's
    lost_host: bool  # the last replica went away with its whole host, so not because of this request
    full_for: int | None  # seconds for which the last replica said it would be full
    is_continued: bool  # its answer broke, and another replica continued it
    not_continued: str  # why no other replica could, for an answer that broke
    model: str  # that answered it, where usage is kept
    reserved: int  # tokens that its key's limits hold for it until they are settled
    reserved_at: float  # since when
    trace: Trace | None
    sent_at: float  # when the last attempt was sent, where there was one
    prompt_bytes: int  # of its body, without embedded images, where usage is kept
    unseen: int  # tokens that its answer may have before its client has any of it, where usage is kept
    texts: int  # prompts that the token counts add up, as far as the answer tells

    def __init__(self, id: str, method: str, path: str, received_at: float, client: str = "") -> None:
        self.id = id
        self.method = method
        self.path = path
        self.received_at = received_at
        self.client = client
        self.status = 0
        self.member = ""
        self.attempts = 0
        self.queued = 0.0
        self.connect = None
        self.retries = ()
        self.is_stream = False
        self.first_byte = None
        self.duration = 0.0
        self.bytes_in = 0
        self.bytes_out = 0
        self.prompt_tokens = None
        self.completion_tokens = None
        self.cached_tokens = None
        self.reason = ""
        self.matched = None
        self.key = ""
        self.error = ""
        self.replica_status = 0
        self.lost_host = False
        self.full_for = None
        self.is_continued = False
        self.not_continued = ""
        self.model = ""
        self.reserved = 0
        self.reserved_at = 0.0
        self.trace = None
        self.sent_at = 0.0
        self.prompt_bytes = 0
        self.unseen = 0
        self.texts = 1


class Spans(Protocol):
    """Collects durations, in seconds."""

    def note(self, value: float) -> None: ...


class RequestObserver(Protocol):
    """Is told of every request that has ended. It is called on the hot path, so it may only record."""

    def finished(self, record: Record) -> None: ...

    def inter_token(self, replica: str) -> Spans:
        """Collects the times between the pieces of that replica's streamed answers."""
