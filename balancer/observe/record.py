"""What is remembered of one request when it is over: the source of its log line and of the metrics."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class Record:
    """One request. Times are loop times, spans seconds, sizes bytes; None is unknown or does not apply."""

    id: str
    method: str
    path: str
    received_at: float
    status: int = 0
    member: str = ""
    attempts: int = 0
    queued: float = 0.0
    # A new connection to the member took this long; None where an idle one was used.
    connect: float | None = None
    # Why it was sent again, each time: how the attempt before failed, in the words of fleet/outcome.py, or the race
    # with the end of a kept connection, which costs no attempt.
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
    matched: float | None = None  # the share of the prompt that the policy took to be cached at the member
    key: str = ""
    error: str = ""
    replica_status: int = 0  # of the last attempt's answer, if one came; `status` is what the client got
    full_for: int | None = None  # seconds for which the last replica said that it is full
    texts: int = 1  # how many prompts the counts are the sums of, as far as the answer tells


class Spans(Protocol):
    """Takes note of one span after the other, in seconds."""

    def note(self, value: float) -> None: ...


class RequestObserver(Protocol):
    """Whoever wants to know of each request that is over. Called on the hot path: it must only take note."""

    def finished(self, record: Record) -> None: ...

    def inter_token(self, replica: str) -> Spans:
        """Where the spans between the pieces of a streamed answer of that replica go."""
