"""What is kept about a request once it has ended: the source of its log line and of the metrics."""

from dataclasses import dataclass
from typing import Protocol

from balancer.observe.trace_context import Trace

CLIENT_LEFT = 499  # nginx's status for a client that left; seen only in logs and metrics


@dataclass(slots=True)
class Record:
    """One request. Times are loop times, durations in seconds, sizes in bytes; None is unknown or not applicable."""

    id: str
    method: str
    path: str
    received_at: float
    status: int = 0
    member: str = ""
    attempts: int = 0
    queued: float = 0.0
    # How long connecting to the replica took; None if an idle connection was used.
    connect: float | None = None
    # Why each retry was made: how the attempt before it failed (fleet/outcome.py), or "race" if a kept-alive connection
    # was closing just as the request was sent on it, which does not count as an attempt.
    retries: tuple[str, ...] = ()
    is_stream: bool = False
    first_byte: float | None = None
    duration: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reason: str = ""
    matched: float | None = None  # share of the prompt that the policy expected to find in the replica's cache
    client: str = ""  # its address; the one that a trusted proxy names
    key: str = ""
    error: str = ""
    replica_status: int = 0  # the replica's own, of the last attempt that was answered; `status` is the client's
    lost_host: bool = False  # the last replica went away with its whole host, so not because of this request
    full_for: int | None = None  # seconds for which the last replica said it would be full
    is_continued: bool = False  # its answer broke, and another replica continued it
    not_continued: str = ""  # why no other replica could, for an answer that broke
    model: str = ""  # that answered it, where usage is kept
    reserved: int = 0  # tokens that its key's limits hold for it until they are settled
    trace: Trace | None = None
    sent_at: float = 0.0  # when the last attempt was sent, where there was one
    prompt_bytes: int = 0  # of its body, without embedded images, where usage is kept
    unseen: int = 0  # tokens that its answer may have before its client has any of it, where usage is kept
    texts: int = 1  # prompts that the token counts add up, as far as the answer tells


class Spans(Protocol):
    """Collects durations, in seconds."""

    def note(self, value: float) -> None: ...


class RequestObserver(Protocol):
    """Is told of every request that has ended. It is called on the hot path, so it may only record."""

    def finished(self, record: Record) -> None: ...

    def inter_token(self, replica: str) -> Spans:
        """Collects the times between the pieces of that replica's streamed answers."""
